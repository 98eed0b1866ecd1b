"""House rules that can be read from the source: who imports whom, how long things are, what is not used."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("moshi_ttt", "finetune", "inference", "evaluation", "benchmarks", "configs")


def sources(*rooms):
    """(path from the root, syntax tree) of every Python file in these folders."""
    files = [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]
    return [(str(path.relative_to(ROOT)), ast.parse(path.read_text(), str(path))) for path in files]


def imports(tree):
    """(line, dotted name) of everything that a file imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def forbidden_imports(room, forbidden, allowed=()):
    """Imports in `room` of packages it must not know."""
    return [
        f"{path}:{line} imports {name}"
        for path, tree in sources(room)
        for line, name in imports(tree)
        if name.split(".")[0] in forbidden
        and not any(name == module or name.startswith(f"{module}.") for module in allowed)
    ]


def test_there_is_a_house():
    assert len(sources("moshi_ttt")) >= 10
    names = {name for _, tree in sources("moshi_ttt") for _, name in imports(tree)}
    assert "moshi_ttt.config.TTTConfig" in names


def test_the_model_imports_no_application_and_no_command_line():
    above = {"finetune", "inference", "evaluation", "benchmarks"}
    tools = {"hydra", "omegaconf", "wandb", "argparse", "configs"}
    assert forbidden_imports("moshi_ttt", above | tools) == []


def test_inference_imports_neither_training_nor_evaluation():
    assert forbidden_imports("inference", {"finetune", "evaluation", "benchmarks"}) == []


def test_configs_import_nothing_of_ours():
    assert forbidden_imports("configs", set(ROOMS) - {"configs"}) == []


def test_training_imports_of_inference_the_stream_alone():
    assert forbidden_imports("finetune", {"inference"}, allowed=("inference.stream",)) == []
    assert forbidden_imports("finetune", {"benchmarks"}) == []


def test_evaluation_imports_of_training_the_data_and_the_loss_alone():
    assert forbidden_imports("evaluation", {"finetune"}, allowed=("finetune.data", "finetune.loss")) == []
    assert forbidden_imports("evaluation", {"benchmarks"}) == []


def test_nothing_imports_evaluation():
    rooms = [room for room in ROOMS if room != "evaluation"]
    assert [found for room in rooms for found in forbidden_imports(room, {"evaluation"})] == []


def test_no_file_is_named_for_everything_or_nothing():
    vague = {"utils", "util", "helpers", "helper", "common", "misc"}
    stems = [(path, Path(path).stem) for path, _ in sources(*ROOMS, "tests")]
    assert [path for path, stem in stems if stem in vague or stem.endswith("_backup")] == []


def test_files_stay_under_400_lines():
    lengths = {path: len((ROOT / path).read_text().splitlines()) for path, _ in sources(*ROOMS)}
    assert {path: length for path, length in lengths.items() if length >= 400} == {}


def test_functions_stay_under_60_lines():
    lengths = {
        f"{path}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path, tree in sources(*ROOMS)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: length for name, length in lengths.items() if length >= 60} == {}


def test_nothing_is_found_by_hasattr():
    found = [
        f"{path}:{node.lineno}"
        for path, tree in sources(*ROOMS, "tests")
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id == "hasattr"
    ]
    assert found == []


def broad(handler):
    """Whether an except clause catches everything, alone or in a tuple."""
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in kinds)


def test_no_except_clause_catches_everything():
    found = [
        f"{path}:{node.lineno}"
        for path, tree in sources(*ROOMS, "tests")
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and broad(node)
    ]
    assert found == []


def test_nothing_edits_the_import_path():
    found = [
        f"{path}:{node.lineno}"
        for path, tree in sources(*ROOMS, "tests")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path"
    ]
    found += [
        f"{path}:{line}" for path, tree in sources(*ROOMS) for line, n in imports(tree) if n == "sys.path"
    ]
    assert found == []


# Pictographs, dingbats and the selector that makes emoji of plain signs; arrows and letters are welcome.
EMOJI = re.compile("[\U0001f000-\U0001faff\u2600-\u27bf\u2b50-\u2b55\u231a-\u23ff\ufe0f]")


def test_no_emoji():
    suffixes = {".py", ".yaml", ".yml", ".toml", ".sh", ".sbatch", ".md"}
    folders = [ROOT / name for name in (*ROOMS, "tests", "configs", "scripts", "sample_data")]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in suffixes]
    files += [path for path in ROOT.iterdir() if path.suffix in suffixes or path.name == "Makefile"]
    lines = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if EMOJI.search(line)
    ]
    assert len(files) > 20
    assert lines == []

"""FSDP2 on 2 and 4 processes trains, saves, evaluates and answers as one does, with less memory each."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from sharded_training import CASES, STEPS, config_of, joined, trainer_of
from test_distributed import free_port
from training import CPU, ROOT, start_python, write_prompt

from finetune.config import FSDPConfig
from finetune.distributed import Process, find_place, first_host
from finetune.sharding import make_mesh
from moshi_ttt.device import device_of_process
from moshi_ttt.tiny_model import LM_CONFIG, hub_key_names, tiny_model_folder

LARGE = LM_CONFIG | {"dim": 512, "num_heads": 8, "num_layers": 8}
COMPARED = [(name, world) for name, case in CASES.items() for world in case.worlds if world > 1]


def write_large_model(folder):
    """A Moshi of 30 million parameters, with the tiny one's codec and tokenizer."""
    from moshi.models.loaders import MOSHI_NAME, get_moshi_lm

    folder.mkdir()
    source = tiny_model_folder()
    config = json.loads((source / "config.json").read_text())
    for path in source.iterdir():
        if path.name not in (MOSHI_NAME, "config.json"):
            (folder / path.name).symlink_to(path)
    (folder / "config.json").write_text(json.dumps(config | LARGE))
    model = get_moshi_lm(None, lm_kwargs=LARGE, device="cpu", dtype=torch.float32)
    state = hub_key_names(model.state_dict())
    save_file({name: tensor.bfloat16().contiguous() for name, tensor in state.items()}, folder / MOSHI_NAME)


def start_world(folder, world):
    """Start the processes of one launch: one alone, two by torchrun, four as srun starts tasks."""
    script = ("-m", "sharded_training", str(folder))
    path = {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        # Give what is freed back at once, so that the process's peak is what was held at a time.
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    }
    if world == 1:
        return [start_python(*script, **path)]
    port = str(free_port())
    if world == 2:
        torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}")
        return [start_python(*torchrun, *script, **path)]
    step = {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(world),
        "SLURM_STEP_NODELIST": "localhost",
        "MASTER_PORT": port,
    }
    ranks = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(world)]
    return [start_python(*script, **path, **step, **rank) for rank in ranks]


@pytest.fixture(scope="module")
def folder(private_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    write_large_model(folder / "large")
    write_prompt(folder / "prompt.wav")
    processes = [process for world in (1, 2, 4) for process in start_world(folder, world)]
    try:
        for process in processes:
            printed, _ = process.communicate(timeout=600)
            assert process.returncode == 0, printed
    finally:
        for process in processes:
            process.kill()
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """Results by number of processes and case, the tensors whole."""
    return {world: join_ranks(folder / str(world), world) for world in (1, 2, 4)}


def join_ranks(folder, world):
    ranks = [torch.load(folder / f"results_{rank}.pt") for rank in range(world)]
    results = ranks[0]
    for case in results:
        if case == "adamw":
            kinds = results[case]["tensors"]
            results[case]["tensors"] = {
                k: joined([rank[case]["tensors"][k] for rank in ranks]) for k in kinds
            }
        else:
            for kind in ("start", "gradients", "end"):
                results[case][kind] = joined([rank[case][kind] for rank in ranks])
    return results


def largest_difference(one, other):
    """Over two dicts of tensors with the same names."""
    assert one.keys() == other.keys()
    return max((one[name].float() - other[name].float()).abs().max().item() for name in one)


def reference(results, name):
    return results[1][CASES[name].like or name]


@pytest.mark.parametrize(("name", "world"), COMPARED)
def test_the_model_starts_as_in_one_process(results, name, world):
    expected, found = reference(results, name), results[world][name]
    assert found["trainable"] == expected["trainable"]
    assert found["start"].keys() == expected["start"].keys()
    assert all(torch.equal(tensor, expected["start"][key]) for key, tensor in found["start"].items())


@pytest.mark.parametrize(("name", "world"), COMPARED)
def test_training_is_that_of_one_process(results, name, world):
    expected, found = reference(results, name), results[world][name]
    near = 2e-2 if name == "bfloat16" else 1e-6
    assert found["gradients"].keys() == set(expected["trainable"])
    assert largest_difference(found["gradients"], expected["gradients"]) <= near
    assert largest_difference(found["end"], expected["end"]) <= near
    assert found["norm"].item() == pytest.approx(expected["norm"].item(), rel=1e-5 if near == 1e-6 else 0.1)
    losses = torch.stack(found["losses"]), torch.stack(expected["losses"])
    torch.testing.assert_close(*losses, rtol=0, atol=1e-5 if near == 1e-6 else 0.05)


@pytest.mark.parametrize(("name", "world"), [*COMPARED, *[(n, 1) for n, c in CASES.items() if not c.like]])
def test_every_trainable_parameter_moves_and_no_other(results, name, world):
    found = results[world][name]
    moved = {key for key, tensor in found["end"].items() if not torch.equal(tensor, found["start"][key])}
    assert moved <= set(found["trainable"])
    if name != "bfloat16":  # where small steps of plain SGD are lost to rounding
        # LoRA's A has no gradient before B has left 0, and a tiny one then.
        assert {key for key in found["trainable"] if ".lora_A." not in key} <= moved


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_trainable_parameter_moves_with_adamw(results, world):
    start, end = results[world]["both"]["start"], results[world]["adamw"]["tensors"]["parameter"]
    assert end.keys() == set(results[world]["both"]["trainable"])
    assert [key for key, tensor in end.items() if torch.equal(tensor, start[key])] == []


def test_the_cases_reach_what_they_are_named_for(results):
    # Rows without targets change the loss, and a carried state is not a fresh one.
    one = results[1]
    assert not torch.equal(one["uneven"]["losses"][0], one["both"]["losses"][0])
    assert not torch.equal(one["carried"]["losses"][1], one["carried"]["losses"][0])


@pytest.mark.parametrize("world", [2, 4])
def test_adamw_and_evaluation_are_those_of_one_process(results, world):
    expected, found = results[1]["adamw"], results[world]["adamw"]
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert len(found["losses"]) == STEPS
    for one, other in zip(expected["valid"], found["valid"], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert found["valid"][0]["loss"] != found["valid"][1]["loss"]


@pytest.mark.parametrize("world", [2, 4])
def test_answers_are_those_of_one_process(folder, world):
    # Before training the parameters are the same to the last bit, so the answers are.
    for suffix in ("wav", "json"):
        one, other = (folder / f"{n}/run/answers/step_000000.{suffix}" for n in (1, world))
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_checkpoint_is_that_of_a_plain_model_with_the_same_parameters(folder, results, world):
    (sharded,) = (folder / str(world) / "run/checkpoints").iterdir()
    (plain,) = (folder / str(world) / "plain/checkpoints").iterdir()
    files = {path.name for path in (plain / "consolidated").iterdir()}
    assert {"lora.safetensors", "ttt.safetensors", "checkpoint.json"} < files
    for name in files:
        assert (sharded / "consolidated" / name).read_bytes() == (plain / "consolidated" / name).read_bytes()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("world", [2, 4])
def test_optimiser_state_is_loaded_by_one_process(folder, results, tmp_path, world):
    (tmp_path / "x").mkdir()
    trainer = trainer_of(config_of(tmp_path / "x", CPU, "mode=lora+ttt", "eval.prompt=null"), CPU)
    tensors = trainer.optimizer.tensors()
    dcp.load(tensors, checkpoint_id=folder / str(world) / "sharded", no_dist=True)
    saved = results[world]["adamw"]["tensors"]
    assert saved["exp_avg"].keys() == set(results[world]["both"]["trainable"])
    for kind, of in saved.items():
        assert of.keys() == tensors[kind].keys()
        assert all(torch.equal(tensor, tensors[kind][name]) for name, tensor in of.items())
    assert all(step.item() == STEPS for step in tensors["step"].values())
    live = dict(trainer.parts.model.named_parameters())
    assert all(torch.equal(tensor, live[name]) for name, tensor in saved["parameter"].items())


def test_memory_falls_with_processes(folder):
    peak, held = {}, {}
    for world in (1, 2, 4):
        ranks = [json.loads((folder / f"{world}/memory_{r}.json").read_text()) for r in range(world)]
        # The main process has the pages of the weights' file in its memory as well.
        peak[world] = max(rank["peak"] for rank in ranks[1:] or ranks)
        held[world] = [rank["held"] for rank in ranks]
    assert sum(held[2]) == pytest.approx(held[1][0], rel=0.001)
    assert max(held[2]) < 0.51 * held[1][0]
    assert max(held[4]) < 0.26 * held[1][0]
    # A part of it, some 100 MB, is code that is loaded on the way.
    assert peak[2] < 0.7 * peak[1]
    assert peak[4] < 0.8 * peak[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shard": "zero"}, "fsdp.shard must be auto, full, hybrid or none; got 'zero'"),
        ({"shard": "hybrid"}, "fsdp.replicate=None with fsdp.shard=hybrid"),
        ({"replicate": 2}, "fsdp.replicate=2 with fsdp.shard=auto"),
        ({"shard": "hybrid", "replicate": 1}, "fsdp.replicate must be at least 2, got 1"),
        ({"reduce_dtype": "float16"}, "fsdp.reduce_dtype must be one of float32, bfloat16; got 'float16'"),
    ],
)
def test_settings_that_cannot_be_sharded_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FSDPConfig(**settings).validate()


@pytest.mark.parametrize(("world", "replicate"), [(1, 2), (4, 4), (6, 4)])
def test_a_mesh_that_does_not_divide_is_refused(world, replicate):
    process = Process(0, world, torch.device("cpu"))
    with pytest.raises(ValueError, match=f"fsdp.replicate={replicate} needs .* there are {world}"):
        make_mesh(FSDPConfig("hybrid", replicate), process)
    assert make_mesh(FSDPConfig(), CPU) is None


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SRUN = {
    "SLURM_JOB_ID": "1001",
    "SLURM_STEP_ID": "2",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "gpu[007-009,12]",
}


def test_the_place_comes_from_the_launcher():
    place = find_place(SRUN | TORCHRUN)  # torchrun started by srun
    assert (place.rank, place.world_size, place.local_rank, place.rendezvous) == (3, 8, 1, "env://")
    place = find_place(SRUN)
    assert (place.rank, place.world_size, place.local_rank) == (2, 4, 0)
    assert place.rendezvous == f"tcp://gpu007:{15000 + (16 * 1001 + 2) % 15000}"
    assert (
        find_place(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "99"}).rendezvous == "tcp://10.0.0.1:99"
    )
    # A batch script, or a shell of salloc: a plain `python` there is one process.
    assert find_place({"SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}).world_size == 1
    assert find_place({}).world_size == 1
    with pytest.raises(ValueError, match="LOCAL_RANK is None, not a number; start with torchrun or srun"):
        find_place({"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match="names no host; set MASTER_ADDR"):
        find_place(SRUN | {"SLURM_STEP_NODELIST": ""})


@pytest.mark.parametrize(
    ("nodes", "host"), [("n1", "n1"), ("a,b", "a"), ("a-[3,5]", "a-3"), ("r[01-02]-ib,x", "r01-ib")]
)
def test_the_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


def test_each_process_of_a_node_has_its_gpu():
    assert device_of_process("auto", 3, 8) == torch.device("cuda", 3)
    assert device_of_process("cuda", 3, 1) == torch.device("cuda", 0)  # it is shown its own alone
    assert device_of_process("auto", 3, 0) == device_of_process("cpu", 3, 8) == torch.device("cpu")
    with pytest.raises(ValueError, match="process 4 of this node has no GPU: torch sees 4"):
        device_of_process("auto", 4, 4)

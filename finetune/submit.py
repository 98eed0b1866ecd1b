"""`python -m finetune.submit JOB [launch=SITE] [launch.KEY=VALUE ...] ARGUMENTS`: a job for SLURM.

JOB is train, annotate, prepare, batch_inference or paper_metrics (a script in scripts/slurm), or sweep: one
training job for each combination of values, by Hydra's multirun and submitit. What the site wants to know of
a job is in configs/launch/SITE.yaml; ARGUMENTS are those of the command that the job runs.
"""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException

from configs.typed import typed_config
from finetune.config import register, to_typed

SCRIPTS = Path(__file__).parents[1] / "scripts" / "slurm"
FILES = {
    "train": "train.sbatch",
    "annotate": "annotate.sbatch",
    "prepare": "prepare.sbatch",
    "batch_inference": "batch_inference.sbatch",
    "paper_metrics": "run_paper_metrics.sh",
}
JOBS = (*FILES, "sweep")
# Arguments that are the site's, not the command's.
OWN = ("launch=", "launch.", "+launch.", "++launch.", "~launch.")
ARRAYS = ("annotate", "prepare", "batch_inference", "paper_metrics")


@dataclass
class LaunchConfig:
    """What a site wants to know of a job. None leaves it to SLURM and its SBATCH_... variables."""

    nodes: int = 1
    """Nodes of a training job. Tasks of arrays have one."""

    gpus_per_node: int | None = None
    """GPUs of each node or task. None asks for none: training starts one process on each node."""

    processes_per_node: int | None = None
    """Processes of training and paper_metrics on each node. None is one on each GPU."""

    cpus_per_task: int | None = None
    """CPU cores of each node of a training job, or of each task of an array."""

    mem: str | None = None
    """Memory of each node, such as 200G; 0 is all of it."""

    time: str | None = None
    """Time limit, such as 1-00:00:00."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None

    array: str | None = None
    """Tasks of what is shared by an array (all but train and sweep): 0-31%8 is 32 tasks, 8 at a time."""

    grace_sec: int = 180
    """A training job is asked to save and stop so long before its time limit. SLURM may be a minute early."""

    flags: list[str] = field(default_factory=list)
    """Other flags of sbatch, such as --exclusive or --reservation=NAME."""

    setup: str = ""
    """Shell lines that each job runs first, such as `module load cuda`."""

    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of the job."""

    python: str | None = None
    """The Python of the jobs. None is the one that submits."""

    log_dir: str = "logs/slurm"
    """Where logs go, on a file system that all nodes share."""

    preflight: bool = True
    """Check nodes, data and disk before training starts; model and data before paper_metrics."""

    restarts: int = 0
    """How many times torchrun starts the training processes again after one has failed."""

    print_only: bool = False
    """Print the command that would submit the job, and stop."""


@dataclass
class SubmitConfig:
    """A site, chosen by launch=NAME from configs/launch."""

    launch: LaunchConfig = field(default_factory=LaunchConfig)


ConfigStore.instance().store(name="submit_schema", node=SubmitConfig)


def read_launch(overrides: Sequence[str]) -> LaunchConfig:
    """The site's settings, checked.

    Raises:
        ValueError: an unknown site or setting, or a value that cannot be.
    """
    with initialize_config_module("configs", version_base="1.3"):
        try:
            config = compose("submit", list(overrides))
        except HydraException as error:
            raise ValueError(
                f"{error}\nlaunch=NAME is a file configs/launch/NAME.yaml, launch.KEY one of "
                f"{', '.join(LaunchConfig.__dataclass_fields__)}"
            ) from error
    launch = typed_config(config, SubmitConfig).launch
    for name in ("nodes", "gpus_per_node", "processes_per_node", "cpus_per_task", "grace_sec"):
        value = getattr(launch, name)
        if value is not None and value < 1:
            raise ValueError(f"launch.{name} must be at least 1, got {value}")
    if launch.restarts < 0:
        raise ValueError(f"launch.restarts must be 0 or more, got {launch.restarts}")
    for flag in launch.flags:
        if not flag.startswith("--"):
            raise ValueError(f"launch.flags are such as --exclusive or --reservation=NAME; got {flag!r}")
    return launch


def sbatch_flags(job: str, launch: LaunchConfig) -> dict[str, str | bool]:
    """Flags of sbatch without dashes, and their values; True for those without one."""
    flags: dict[str, str | bool | int | None] = {
        "nodes": 1 if job in ARRAYS else launch.nodes,
        "gpus-per-node": launch.gpus_per_node,
        "cpus-per-task": launch.cpus_per_task,
        "mem": launch.mem,
        "time": launch.time,
        "partition": launch.partition,
        "account": launch.account,
        "qos": launch.qos,
        "constraint": launch.constraint,
    }
    if job == "train":
        flags["signal"] = f"B:USR1@{launch.grace_sec}"
    if job in ARRAYS:
        flags["array"] = launch.array
    if job != "sweep":
        one = job not in ARRAYS or launch.array is None
        flags["output"] = str(Path(launch.log_dir, "%x-%j.out" if one else "%x-%A-%a.out"))
    for flag in launch.flags:
        name, has_value, value = flag.removeprefix("--").partition("=")
        flags[name] = value if has_value else True
    return {name: v if v is True else str(v) for name, v in flags.items() if v is not None}


def environment(launch: LaunchConfig) -> dict[str, str]:
    """What scripts/slurm read, and the site's own variables."""
    variables = {
        **launch.env,
        "MOSHI_TTT_PYTHON": launch.python or sys.executable,
        "MOSHI_TTT_LOG_DIR": launch.log_dir,
        "MOSHI_TTT_PREFLIGHT": "on" if launch.preflight else "off",
        "MOSHI_TTT_RESTARTS": str(launch.restarts),
    }
    if launch.setup:
        variables["MOSHI_TTT_SETUP"] = launch.setup
    if launch.processes_per_node is not None:
        variables["MOSHI_TTT_PROCESSES"] = str(launch.processes_per_node)
    return variables


def sbatch_command(job: str, launch: LaunchConfig, arguments: Sequence[str]) -> list[str]:
    """The command that submits a script.

    Raises:
        ValueError: an array without its tasks, or no scripts.
    """
    if job in ("annotate", "prepare") and launch.array is None:
        raise ValueError(f"{job} is an array: give its tasks, such as launch.array=0-31%8")
    if job == "train" and launch.array is not None:
        raise ValueError(f"launch.array is for {', '.join(ARRAYS)}; a training job per value is `sweep`")
    script = SCRIPTS / FILES[job]
    if not script.is_file():
        raise ValueError(f"{script} does not exist; submit from a checkout, installed by pip install -e .")
    flags = [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in sbatch_flags(job, launch).items()
    ]
    return ["sbatch", "--parsable", *flags, str(script), *arguments]


def sweep_command(launch: LaunchConfig, arguments: Sequence[str]) -> list[str]:
    """The command by which Hydra submits one job for each combination of values.

    Raises:
        ValueError: the jobs would share a run directory, or the launcher is missing.
    """
    run_dirs = [argument for argument in arguments if argument.startswith("run_dir=")]
    if not run_dirs or "${" not in run_dirs[-1]:
        raise ValueError(
            "each run of a sweep needs a run_dir of its own: name what varies, as in "
            "'run_dir=runs/lr-${optim.lr}', or the run's number, '${hydra:job.num}'"
        )
    if find_spec("hydra_plugins.hydra_submitit_launcher") is None:
        raise ValueError("sweeps need hydra-submitit-launcher; pip install 'moshi-ttt[slurm]'")
    if launch.time is None:
        raise ValueError("submitit would set a time limit of an hour; give launch.time, such as 1-00:00:00")
    flags = sbatch_flags("sweep", launch)
    tasks = launch.processes_per_node or launch.gpus_per_node or 1
    own = ("nodes", "cpus-per-task", "time")  # which submitit knows itself
    launcher = {
        "timeout_min": minutes(launch.time),
        "tasks_per_node": tasks,
        "nodes": launch.nodes,
        "signal_delay_s": launch.grace_sec,
        "setup": launch.setup.splitlines(),
        # Ours are those of a node, submitit's of one of its tasks.
        "cpus_per_task": None if launch.cpus_per_task is None else max(1, launch.cpus_per_task // tasks),
        "additional_parameters": {name: value for name, value in flags.items() if name not in own},
    }
    overrides = [f"hydra.launcher.{name}={_hydra_value(value)}" for name, value in launcher.items()]
    folder = str(Path(launch.log_dir, f"sweep-{datetime.now():%Y%m%d-%H%M%S}"))
    return [
        *(launch.python or sys.executable, "-m", "finetune.train", "--multirun"),
        *("hydra/launcher=submitit_slurm", f"hydra.sweep.dir={_hydra_value(folder)}"),
        "hydra.launcher.submitit_folder=${hydra.sweep.dir}/%j",
        *overrides,
        *arguments,
    ]


def minutes(limit: str) -> int:
    """A time limit as sbatch takes it, in whole minutes.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if found is None:
        raise ValueError(
            f"launch.time is such as 1-00:00:00 (a day), 04:00:00 or 90 (minutes), got {limit!r}"
        )
    days, *parts = found.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is None and len(numbers) < 3:  # minutes:seconds
        numbers = [0, *numbers]
    hours, mins, seconds = (*numbers, 0, 0)[:3]
    return math.ceil(int(days or 0) * 1440 + hours * 60 + mins + seconds / 60)


def _hydra_value(value: object) -> str:
    """A value as the grammar of Hydra's overrides has it."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{_hydra_value(k)}:{_hydra_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_hydra_value, value)) + "]"
    if isinstance(value, str):
        return "'" + value.replace("'", "\\'") + "'"
    return json.dumps(value)


def check_training(arguments: Sequence[str]) -> None:
    """Compose the training config here, so that a misspelt setting does not wait in the queue.

    Raises:
        ValueError: what training would say to it.
    """
    register()
    with initialize_config_module("configs", version_base="1.3"):
        try:
            to_typed(compose("train", list(arguments)))
        except HydraException as error:
            raise ValueError(f"finetune.train would not take these arguments: {error}") from error


def submit(arguments: Sequence[str]) -> None:
    """Submit what a command line says, and print the job's number.

    Raises:
        ValueError: what is wrong with it.
    """
    if not arguments or arguments[0] not in JOBS:
        received = arguments[0] if arguments else "nothing"
        raise ValueError(f"expected one of {', '.join(JOBS)} first, got {received}")
    job = arguments[0]
    own = [argument for argument in arguments[1:] if argument.startswith(OWN)]
    rest = [argument for argument in arguments[1:] if argument not in own]
    launch = read_launch(own)
    if job == "train":
        check_training(rest)
    command = sweep_command(launch, rest) if job == "sweep" else sbatch_command(job, launch, rest)
    variables = environment(launch)
    if launch.print_only:
        print(shlex.join(["env", *(f"{name}={value}" for name, value in variables.items()), *command]))
        return
    if shutil.which("sbatch") is None:
        raise ValueError("there is no sbatch here; submit from a login node, or see launch.print_only=true")
    Path(launch.log_dir).mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, env=os.environ | variables, check=False)
    if done.returncode != 0:
        sys.exit(done.returncode)


def main() -> None:
    try:
        submit(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

"""Settings of a site become flags of sbatch, and what is wrong is said before anything is queued."""

import shlex

import pytest
from training import ROOT

from finetune.submit import LaunchConfig, minutes, read_launch, sbatch_flags, submit, sweep_command

RUN = ("experiment=demo", "run_dir=runs/a")


def printed_by(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    submit([arguments[0], "launch.print_only=true", *arguments[1:]])
    return shlex.split(capsys.readouterr().out)


def test_a_site_that_says_nothing_leaves_everything_to_slurm(capsys):
    words = printed_by(capsys, "train", *RUN)
    script = str(ROOT / "scripts" / "slurm" / "train.sbatch")
    assert words[words.index("sbatch") :] == [
        *("sbatch", "--parsable", "--nodes=1", "--signal=B:USR1@180", "--output=logs/slurm/%x-%j.out"),
        *(script, *RUN),
    ]


def test_every_setting_of_a_site_reaches_the_job(capsys):
    site = {
        "nodes": "4", "gpus_per_node": "8", "cpus_per_task": "96", "mem": "0", "time": "1-00:00:00",
        "partition": "gpu", "account": "speech", "qos": "high", "constraint": "h100", "grace_sec": "300",
        "flags": "[--exclusive,'--reservation=ours']", "setup": "'module load cuda'",
        "python": "/opt/python", "log_dir": "/logs", "preflight": "false",
        "restarts": "2", "processes_per_node": "7",
    }  # fmt: skip
    settings = [f"launch.{key}={value}" for key, value in site.items()]
    words = printed_by(capsys, "train", *settings, "+launch.env.NCCL_DEBUG=WARN", *RUN)
    flags = [
        *("--nodes=4", "--gpus-per-node=8", "--cpus-per-task=96", "--mem=0", "--time=1-00:00:00"),
        *("--partition=gpu", "--account=speech", "--qos=high", "--constraint=h100", "--signal=B:USR1@300"),
        *("--output=/logs/%x-%j.out", "--exclusive", "--reservation=ours"),
    ]
    assert words[words.index("--parsable") + 1 : -1 - len(RUN)] == flags
    assert words[1 : words.index("sbatch")] == [
        *("NCCL_DEBUG=WARN", "MOSHI_TTT_PYTHON=/opt/python", "MOSHI_TTT_LOG_DIR=/logs"),
        *("MOSHI_TTT_PREFLIGHT=off", "MOSHI_TTT_RESTARTS=2", "MOSHI_TTT_SETUP=module load cuda"),
        "MOSHI_TTT_PROCESSES=7",
    ]
    told = {*site, "env", "array", "print_only"}  # `array` in the next test
    assert told == set(LaunchConfig.__dataclass_fields__)


@pytest.mark.parametrize("job", ["annotate", "prepare"])
def test_tasks_of_an_array_have_one_node_each(job, capsys):
    words = printed_by(capsys, job, "launch=h100", "launch.nodes=4", "launch.array=0-31%8", "data=a.jsonl")
    assert {"--nodes=1", "--array=0-31%8", "--output=logs/slurm/%x-%A-%a.out"} < set(words)
    assert words[-2:] == [str(ROOT / "scripts" / "slurm" / f"{job}.sbatch"), "data=a.jsonl"]


def test_paper_metrics_take_one_node_or_an_array(capsys):
    script = str(ROOT / "scripts" / "slurm" / "run_paper_metrics.sh")
    words = printed_by(
        capsys, "paper_metrics", "launch.nodes=4", "launch.gpus_per_node=8", "runs/a", "limit=9"
    )
    assert words[words.index("--parsable") + 1 :] == [
        *("--nodes=1", "--gpus-per-node=8", "--output=logs/slurm/%x-%j.out"),
        *(script, "runs/a", "limit=9"),
    ]
    words = printed_by(capsys, "paper_metrics", "launch.array=0-3", "runs/a")
    assert {"--nodes=1", "--array=0-3", "--output=logs/slurm/%x-%A-%a.out"} < set(words)


def test_no_site_stands_in_a_script():
    settings = ("partition", "account", "qos", "gpus", "time", "mem", "constraint", "nodelist")
    for script in (ROOT / "scripts" / "slurm").iterdir():
        flags = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH --")]
        assert len(flags) >= 4
        assert [flag for flag in flags if flag.removeprefix("#SBATCH --").startswith(settings)] == []


def test_every_site_can_be_read():
    names = [path.stem for path in (ROOT / "configs" / "launch").glob("*.yaml")]
    assert {"slurm", "h100"} <= set(names)
    for name in names:
        sbatch_flags("train", read_launch([f"launch={name}"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected one of train, annotate, prepare, paper_metrics, sweep first, got nothing"),
        (["trian", *RUN], "expected one of train, annotate, prepare, paper_metrics, sweep first, got trian"),
        (["train", "launch=nowhere", *RUN], "launch=NAME is a file configs/launch/NAME.yaml"),
        (["train", "launch.node=2", *RUN], "node"),
        (["train", "launch.nodes=0", *RUN], "launch.nodes must be at least 1, got 0"),
        (["train", "launch.restarts=-1", *RUN], "launch.restarts must be 0 or more, got -1"),
        (["train", "launch.flags=[exclusive]", *RUN], "launch.flags are such as --exclusive"),
        (["train", "launch.array=0-3", *RUN], "launch.array is for annotate, prepare, paper_metrics"),
        (["train", "experiment=demo"], "the config lacks run_dir; give them as run_dir=VALUE"),
        (["train", *RUN, "optim.lrr=1"], "finetune.train would not take these arguments"),
        (["annotate", "data=a.jsonl"], "annotate is an array: give its tasks, such as launch.array=0-31%8"),
        (["sweep", *RUN, "optim.lr=1,2"], "each run of a sweep needs a run_dir of its own"),
        (["sweep", "run_dir=runs/${optim.lr}", "optim.lr=1,2"], "give launch.time, such as 1-00:00:00"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_queued(arguments, message):
    with pytest.raises(ValueError, match="^[^$]*" + message.replace("$", r"\$").replace("%", "%")):
        submit(arguments)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("90", 90), ("90:30", 91), ("01:30:00", 90), ("2-0", 2880), ("1-02:30", 1590), ("1-00:00:01", 1441)],
)
def test_time_limits_are_read_as_sbatch_reads_them(limit, expected):
    assert minutes(limit) == expected


def test_what_is_no_time_limit_is_refused():
    with pytest.raises(ValueError, match="launch.time is such as 1-00:00:00"):
        minutes("a day")


def test_a_sweep_hands_the_site_to_submitit():
    launch = read_launch(["launch=h100", "launch.setup='module load cuda'", "launch.account=speech"])
    command = sweep_command(launch, ["run_dir=runs/${optim.lr}", "optim.lr=1,2"])
    assert {
        "--multirun",
        "hydra/launcher=submitit_slurm",
        "hydra.launcher.timeout_min=1440",
        "hydra.launcher.tasks_per_node=8",
        "hydra.launcher.cpus_per_task=12",
        "hydra.launcher.setup=['module load cuda']",
        "hydra.launcher.additional_parameters={'gpus-per-node':'8','mem':'0','partition':'gpu',"
        "'account':'speech','exclusive':true}",
        "optim.lr=1,2",
    } < set(command)

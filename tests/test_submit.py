"""Settings of a site become flags of sbatch, and what is wrong is said before anything is queued."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from training import ROOT, compose_config

from configs.typed import typed_config
from finetune.submit import LaunchConfig, minutes, read_launch, sbatch_flags, submit, sweep_command
from inference.batch.settings import BatchConfig

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


@pytest.mark.parametrize("job", ["annotate", "prepare", "batch_inference"])
def test_tasks_of_an_array_have_one_node_each(job, capsys):
    words = printed_by(capsys, job, "launch=h100", "launch.nodes=4", "launch.array=0-31%8", "data=a.jsonl")
    assert {"--nodes=1", "--array=0-31%8", "--output=logs/slurm/%x-%A-%a.out"} < set(words)
    assert words[-2:] == [str(ROOT / "scripts" / "slurm" / f"{job}.sbatch"), "data=a.jsonl"]


def test_batch_inference_can_be_one_task(capsys):
    words = printed_by(capsys, "batch_inference", "checkpoint=c")
    assert "--output=logs/slurm/%x-%j.out" in words
    assert not any(word.startswith("--array") for word in words)


def test_paper_metrics_take_one_node_or_an_array(capsys):
    script = str(ROOT / "scripts" / "slurm" / "run_paper_metrics.sh")
    gpus = ("launch.nodes=4", "launch.gpus_per_node=8")
    words = printed_by(capsys, "paper_metrics", *gpus, "runs/a", "limit=9")
    assert words[words.index("--parsable") + 1 :] == [
        *("--nodes=1", "--gpus-per-node=8", "--output=logs/slurm/%x-%j.out"),
        *(script, "runs/a", "limit=9"),
    ]
    words = printed_by(capsys, "paper_metrics", "launch.array=0-3", "runs/a")
    assert {"--nodes=1", "--array=0-3", "--output=logs/slurm/%x-%A-%a.out"} < set(words)


def nine(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`submit_batch_inference.sh ARGUMENTS`, which then prints what it would submit."""
    script = str(ROOT / "scripts" / "slurm" / "submit_batch_inference.sh")
    variables = {"MOSHI_TTT_PYTHON": sys.executable, "MOSHI_TTT_LAUNCH": "launch.print_only=true"}
    environment = os.environ | variables
    return subprocess.run(
        ["bash", script, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def batch_config(printed: str) -> BatchConfig:
    """The config of the command that the last line would submit."""
    words = shlex.split(printed.splitlines()[-1])
    script = str(ROOT / "scripts" / "slurm" / "batch_inference.sbatch")
    (place,) = (i for i, word in enumerate(words) if Path(word).name == Path(script).name)
    return typed_config(compose_config(*words[place + 1 :], name="batch"), BatchConfig)


def test_nine_arguments_in_their_order_reach_batch_inference():
    names = "it's [odd]/*.wav,b c.wav"
    done = nine("/runs/a b", names, "./out", "org/repo", "90.5", "true", "false", "true", "50")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert f"inputs:       {names}" in lines
    assert "diagnostics:  true, every 50 frames" in lines
    config = batch_config(done.stdout)
    assert config.checkpoint == "/runs/a b"
    assert config.inputs == names.split(",")
    assert (config.output, config.base, config.max_sec) == ("./out", "org/repo", 90.5)
    assert (config.perplexity.enable, config.generate, config.diagnostics.every_frames) == (True, False, 50)


def test_what_is_left_out_or_empty_has_its_default():
    for more in ((), ("", "", "false", "true", "false", "10")):
        done = nine("run", "a.wav", "out", *more)
        config = batch_config(done.stdout)
        assert (config.base, config.max_sec, config.perplexity.enable) == (None, None, False)
        assert (config.generate, config.diagnostics.every_frames) == (True, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "a.wav"), "expected 3 to 9 arguments, got 2"),
        (("run", "a.wav", "out", "", "", "yes"), "perplexity must be true or false, got 'yes'"),
        (("run", "a.wav", "out", "", "", "", "", "true", "0"), "got '0'"),
        (
            ("run", "a.wav", "out", "", "long"),
            "length is a number of seconds, such as 600; got 'long'",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    done = nine(*arguments)
    assert done.returncode != 0
    assert message in done.stderr


def test_no_site_stands_in_a_script():
    settings = ("partition", "account", "qos", "gpus", "time", "mem", "constraint", "nodelist")
    for script in (ROOT / "scripts" / "slurm").glob("*.sbatch"):
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
        (
            [],
            "annotate, prepare, batch_inference, paper_metrics, sweep first, got nothing",
        ),
        (
            ["trian", *RUN],
            "prepare, batch_inference, paper_metrics, sweep first, got trian",
        ),
        (["train", "launch=nowhere", *RUN], "launch=NAME is a file configs/launch/NAME.yaml"),
        (["train", "launch.node=2", *RUN], "node"),
        (["train", "launch.nodes=0", *RUN], "launch.nodes must be at least 1, got 0"),
        (["train", "launch.restarts=-1", *RUN], "launch.restarts must be 0 or more, got -1"),
        (["train", "launch.flags=[exclusive]", *RUN], "launch.flags are such as --exclusive"),
        (
            ["train", "launch.array=0-3", *RUN],
            "launch.array is for annotate, prepare, batch_inference, paper_metrics",
        ),
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

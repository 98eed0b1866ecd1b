"""An API key never reaches a file of the run, a log or the terminal."""

from training import TINY, start_python

KEY = "deadbeef0123456789abcdef" + "feedc0de01234567"


def test_the_wandb_key_is_in_no_file_of_the_run(tmp_path):
    assert len(KEY) == 40  # what wandb takes for a key
    run_dir = tmp_path / "run"
    settings = ("wandb.mode=offline", "wandb.project=secrets", "eval.every_steps=1", "eval.max_clips=1")
    tiny = [override for override in TINY if not override.startswith("eval.every_steps")]
    process = start_python(
        *("-m", "finetune.train", *tiny, f"run_dir={run_dir}", *settings),
        WANDB_API_KEY=KEY,
        WANDB_SILENT="true",
        # What wandb would write beside the run must not hide the key there.
        WANDB_CONFIG_DIR=str(tmp_path / "config"),
        WANDB_CACHE_DIR=str(tmp_path / "cache"),
        WANDB_DATA_DIR=str(tmp_path / "data"),
    )
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
    assert KEY not in printed

    (offline,) = (run_dir / "wandb").glob("offline-run-*")
    (record,) = offline.glob("*.wandb")
    content = record.read_bytes()
    for name in (
        b"train/loss",
        b"train/lr_gate",
        b"valid/perplexity",
        b"non_ttt_layer_context",
        b"diagnostics/layer_",
    ):
        assert name in content

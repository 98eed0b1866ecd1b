"""A training step of the tiny Moshi with LoRA against moshi-finetune's, on the CPU, in float32.

Both train the same model with the same rank on the same three clips of the sample, with recomputed layers
(moshi-finetune's default) and without. "Compute" is forward, loss, backward, clipping and the optimiser on
codes that are there; "with data" adds what each does to get them: moshi-finetune decodes and encodes every
clip in every step; ours remembers the codes of clips that it has seen, as in every epoch after the first.
"""

from contextlib import ExitStack

from benchmarks.harness import (
    ROOT,
    Contestant,
    Entry,
    Options,
    lower_is_better,
    medians,
    not_measured,
    rounds_of,
)

GOAL = 2.0
KINDS = [
    ("compute, layers recomputed", {"data": False, "checkpointing": True}),
    ("compute", {"data": False, "checkpointing": False}),
    ("with data, layers recomputed", {"data": True, "checkpointing": True}),
]


def entries(options: Options) -> list[Entry]:
    names = [f"training step of the tiny model, {kind}" for kind, _ in KINDS]
    if options.peers is None:
        return [not_measured(name, GOAL, "give peers=FOLDER with its checkout") for name in names]
    before = [options.peers / "moshi-finetune", options.peers / "site"]
    folder = ROOT / "sample_data"
    shared = {"rank": 32, "duration_sec": 14.56, "manifest": str(folder / "train.jsonl")}
    shared["paths"] = [str(folder / f"audio/dialogue_{number}.flac") for number in (1, 2, 3)]
    found = []
    for name, (_, kind) in zip(names, KINDS, strict=True):
        with ExitStack() as stack:
            given = shared | kind
            works = {"ours": Contestant("step_ours", given), "peer": Contestant("step_peer", given, before)}
            for contestant in works.values():
                stack.callback(contestant.close)
            seconds = medians(rounds_of(works, 5))
        found.append(
            lower_is_better(name, seconds["ours"], seconds["peer"], GOAL, "CPU s", "moshi-finetune's step")
        )
    return found

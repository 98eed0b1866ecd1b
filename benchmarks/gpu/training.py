"""A training step of Moshi 7B: what `benchmarks.train_step` measures on a GPU."""

from benchmarks import train_step
from benchmarks.gpu.results import Results


def run(results: Results) -> None:
    train_step.report_gpu(results)

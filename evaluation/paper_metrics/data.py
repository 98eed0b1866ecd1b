"""The data of all tasks that are asked for."""

from evaluation.paper_metrics.pairs import TaskData
from evaluation.paper_metrics.salmon import read_salmon
from evaluation.paper_metrics.settings import PaperMetricsConfig
from evaluation.paper_metrics.slm21 import read_slm21
from evaluation.paper_metrics.storycloze import read_storycloze


def read_tasks(config: PaperMetricsConfig) -> list[TaskData]:
    """Every task's clips and pairs; audio is not opened.

    Raises:
        ValueError: what is wrong with a data set, in which file, and what to do.
    """
    tasks: list[TaskData] = []
    for task in config.tasks:
        if task in ("swuggy", "sblimp"):
            tasks += [read_slm21(task, split, config.data.slm21) for split in config.splits]
        elif task in ("tsc", "ssc"):
            tasks.append(read_storycloze(task, getattr(config.data, task)))
        else:
            tasks += read_salmon(config.data.salmon)
    return [task.sampled(config.limit, config.seed) for task in tasks]

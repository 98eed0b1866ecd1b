"""Tests that need a GPU: `make test-gpu`. Without one each is skipped and says so."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from device_under_test import DEVICE, missing
from moshi.models.lm import LMModel

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing()
    if reason is not None:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Say at once what went wrong: on a lent machine the run may be cut off before pytest's summary."""
    if report.failed:
        print(f"\n{report.when} of {report.nodeid}:\n{report.longreprtext[-1500:]}", flush=True)


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture
def build_there(build: Callable[..., LMModel], perturb: Callable[..., LMModel]) -> Callable[..., LMModel]:
    """Builds the tiny hybrid model of `build` on the device, its TTT parameters off their initial values."""

    def build_there(**settings: Any) -> LMModel:
        return perturb(build(**settings), "ttt", "gate").to(DEVICE)

    return build_there

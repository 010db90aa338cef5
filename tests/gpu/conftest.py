"""Skips what this machine's devices cannot run, with a reason; fixtures of the tests of a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.gpu import DEVICE, lacking

# Each of the four processes of `make test-gpu` would start a compiler for every core.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")

FOLDER = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    """Markers of this folder."""
    config.addinivalue_line("markers", "two_gpus: needs two GPUs, or a CPU that stands for them")
    config.addinivalue_line("markers", "only_gpu: cannot be tried on a CPU (kernels, memory of a device)")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(FailuresAtOnce(config))


class FailuresAtOnce:
    """Prints a failure of this folder's tests when it happens, too: a run that is cut short never comes to its end."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal and (self.config.rootpath / report.fspath).parent == FOLDER:
            terminal.write_line(f"\n{report.nodeid}, {report.when}:\n{report.longreprtext}", flush=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """They take longer than a second; files with tests of two GPUs, which take longest, come first."""
    own = [item for item in items if FOLDER in item.path.parents]
    for item in own:
        item.add_marker("slow")
    longest = {item.path for item in own if item.get_closest_marker("two_gpus")}
    ordered = iter(sorted(own, key=lambda item: item.path not in longest))
    items[:] = [next(ordered) if FOLDER in item.path.parents else item for item in items]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what cannot run here; raised in one place, the reason is printed once and not for every test."""
    if (reason := lacking(2 if item.get_closest_marker("two_gpus") else 1)) is not None:
        pytest.skip(reason)
    if DEVICE.type == "cpu" and item.get_closest_marker("only_gpu"):
        pytest.skip("cannot be tried on a CPU")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that is tested."""
    return DEVICE


@pytest.fixture
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 is float32, also in convolutions."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def own_settings() -> Iterator[None]:
    """New modules have the same weights in every run, and what a test held on the GPU is given back.

    What is computed on the CPU for comparison takes several threads, a quarter of them for each of `make test-gpu`'s
    processes; the other tests' tensors are too small for it.
    """
    count = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 4))
    torch.manual_seed(0)
    yield
    torch.set_num_threads(count)
    if DEVICE.type == "cuda" and torch.cuda.is_initialized():
        torch.cuda.empty_cache()

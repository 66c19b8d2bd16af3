"""Tests that run side by side share the CPUs of the machine, and processes that tests start share what they import.

With ``--skip-without-extras``, what needs a package that is not installed is skipped, and does not fail.
"""

import gc
import multiprocessing
import os
import re
import sys
from collections.abc import Generator, Iterator
from typing import TypeVar
from unittest.mock import patch

import pytest

Report = TypeVar("Report", pytest.CollectReport, pytest.TestReport)

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported, which reads it once
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# a process that is started with the method "forkserver" has these at once, in place of seconds later
multiprocessing.set_forkserver_preload(["dia_lightning.callbacks", "dia_lightning.tasks", "diffusers", "timm"])


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of ``.ci/bare``, which tests installations without some extras."""
    parser.addoption("--skip-without-extras", action="store_true", help="skip what needs a package that is missing")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skip a file that imports what is missing."""
    return _skipped_if_missing((yield), collector.config)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Skip a test that needs what is missing, in this process or in one that it has started."""
    return _skipped_if_missing((yield), item.config)


def _skipped_if_missing(report: Report, config: pytest.Config) -> Report:
    if report.failed and config.getoption("skip_without_extras"):
        crash = getattr(report.longrepr, "reprcrash", None)
        said = str(report.longrepr) if crash is None else crash.message
        # what a test compares may quote such a message; what a program has printed does not lie
        text = report.capstderr + ("" if said.startswith(("AssertionError", "assert ")) else said)
        found = re.search(r"No module named '(?!dia_lightning|tests)\w+|pip install \\?\"dia-lightning\[\w+", text)
        found = found or re.search(r"Neither `tensorboard` nor `tensorboardX` is available", text)
        if found:
            report.outcome, report.longrepr = "skipped", (__file__, 0, f"Skipped: {found[0]}")
    return report


def pytest_collection_finish() -> None:
    """Leave out what is imported by now when garbage is looked for: a million objects, none of which is garbage."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes long, so that no process is left alone with it at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def _compiled_code(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what torch compiles with the other files of the tests, for all processes in common.

    The folder of the user stays as it was, and what an interrupted run has left in it is not used. Only headers of C++
    are taken from there and left there: 150 MB, once for a version of torch.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(shared / "compiled")


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_workers() -> None:
    """Wait half a second, not five, for the workers of a data loader that is collected as a part of a cycle.

    Its queues may be gone by then, so that the workers cannot be told to end. Tests of errors leave such loaders.
    """
    import torch.utils.data._utils as loading  # not before OMP_NUM_THREADS is set

    loading.MP_STATUS_CHECK_INTERVAL = 0.5


@pytest.fixture(autouse=True)
def _examples_register_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Forget the units and networks that an example registers: the names in their code are gone when it ends."""
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    from dia_lightning.attention import _registry as units
    from dia_lightning.models import _registry as networks

    with patch.dict(units._BUILDERS), patch.dict(networks._BUILDERS):
        yield


@pytest.fixture(autouse=True)
def _no_wandb_process_is_left() -> Iterator[None]:
    """End the run of W&B that a test has left open, and W&B's process.

    The next run of this process would go on in the one that is open. The process stays in the folder of the test that
    started it, which is removed, and writes no pictures from there.
    """
    yield
    wandb = sys.modules.get("wandb")
    if wandb is not None:
        if wandb.run is not None:
            wandb.finish()
        wandb.teardown()  # leaves the run as it is

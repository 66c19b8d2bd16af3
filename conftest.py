"""Tests that run side by side share the CPUs of the machine, and processes that tests start share what they import."""

import gc
import multiprocessing
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported, which reads it once
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# a process that is started with the method "forkserver" has these at once, in place of seconds later
multiprocessing.set_forkserver_preload(["dia_lightning.callbacks", "dia_lightning.tasks", "diffusers", "timm"])


def pytest_collection_finish() -> None:
    """Leave out what is imported by now when garbage is looked for: a million objects, none of which is garbage."""
    gc.collect()
    gc.freeze()

"""Measurements that go well or wrong, for the test of benchmarks/gpu/run.py."""

import os
import time
from collections.abc import Iterator

from benchmarks.figure import Figure
from benchmarks.gpu.setting import Setting


def well(setting: Setting) -> Iterator[Figure]:
    """Yield a figure."""
    yield Figure("processes", float(setting.sizes.group_size), "processes", 1.0, "at least")


def raises(setting: Setting) -> Iterator[Figure]:
    """Yield a figure, and fail."""
    yield from well(setting)
    raise ValueError("the planted fault")


def dies(setting: Setting) -> Iterator[Figure]:
    """End as after a wild write: without a word of Python's."""
    print("about to die")
    os.abort()
    yield from well(setting)


def hangs(setting: Setting) -> Iterator[Figure]:
    """Yield a figure, and then nothing for ever."""
    yield from well(setting)
    time.sleep(1000)

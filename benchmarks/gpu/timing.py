"""Seconds of work on a device, and the memory that it took."""

import statistics
import time
from collections.abc import Callable

from benchmarks.figure import Figure
from megatron_mm.parallel.platform import Platform

GIBIBYTE = 2**30


def seconds(platform: Platform, work: Callable[[], object]) -> float:
    """Return the time from when the device is free to when it has done `work`."""
    platform.synchronize()
    started = time.perf_counter()
    work()
    platform.synchronize()
    return time.perf_counter() - started


def median_seconds(platform: Platform, work: Callable[[], object], *, warm_up: int, repeats: int) -> float:
    """Return the median of `repeats` after `warm_up` that do not count."""
    for _ in range(warm_up):
        work()
    return statistics.median(seconds(platform, work) for _ in range(repeats))


def peak_memory(platform: Platform) -> Figure:
    """Return the most memory that this process has held; on a device what tensors took of it."""
    return Figure("peak memory", next(iter(platform.peak_memory_bytes().values())) / GIBIBYTE, "GiB")

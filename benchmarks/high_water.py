"""What a process grew by at most, as Linux counts it."""

import gc
from collections.abc import Callable
from pathlib import Path

from megatron_mm.parallel.platform.cpu import CpuPlatform

# For the environment of a process before it starts: blocks above 256 KiB are given back when they are freed.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "262144"}


def growth(run: Callable[[], object]) -> int:
    """Bytes by which this process' resident memory exceeds, at most while `run` runs, the most of before."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the high-water mark starts anew
    peak = CpuPlatform().peak_memory_bytes
    before = peak()["resident"]
    run()
    return peak()["resident"] - before

"""The plan's memory of the fullest rank against what a real step allocates, for layouts that run on a CPU.

Measured by torch's own allocator (tests/memory.py says why); the second step, the first one making the optimizer's
state. The test tests/distributed/test_plan_memory.py holds some of these layouts to the same bar.
"""

from benchmarks.figure import Figure
from tests.memory import LAYOUTS, compare

BAR = 0.1


def measure() -> list[Figure]:
    """Each layout's error, prediction and measurement."""
    figures = []
    for name, found in compare(LAYOUTS).items():
        figures += [
            Figure(f"{name}: |predicted / measured - 1|", abs(found.ratio - 1), "ratio", BAR),
            Figure(f"{name}: predicted / measured", found.ratio, "ratio"),
            Figure(f"{name}: predicted", found.predicted / 2**20, "MiB"),
            Figure(f"{name}: measured", found.measured / 2**20, "MiB"),
        ]
    return figures

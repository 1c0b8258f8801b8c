"""The plan of a mix like R-4B's stage 3: how full packs are, how even the ranks' shares, what 37M samples cost.

Synthetic indices of benchmarks/stage3_mix.py, R-4B's tiles, packs of 16,384 tokens, 1,024 packs a step.
"""

import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.figure import Figure
from benchmarks.loader import loader_config, peak_bytes, run_python
from benchmarks.stage3_mix import write_stage3_index
from megatron_mm.data.index import Index
from megatron_mm.data.plan import Plan, balanced, plan_of_run

SAMPLES = 1_000_000
LARGE = 37_000_000
CAPACITY, GLOBAL_BATCH = 16_384, 1024
STEPS = 50
RANKS = (8, 64, 256)
SHARE_BAR, IMBALANCE_BAR, IMBALANCE_RANKS = 0.98, 1.03, 64


def measure() -> list[Figure]:
    """All figures."""
    with tempfile.TemporaryDirectory() as scratch:
        small, large = (Path(scratch) / f"{name}.arrow" for name in ("small", "large"))
        write_stage3_index(small, SAMPLES)
        write_stage3_index(large, LARGE)
        return [*_quality(small), *_cost(large)]


def stage3_plan(index: Index) -> Plan:
    """R-4B's stage 3 over an index."""
    return plan_of_run(index, loader_config(index.path, **{"train.global_batch": GLOBAL_BATCH, "train.steps": 10_000}))


def _quality(path: Path) -> list[Figure]:
    plan = stage3_plan(Index(path))
    tokens, packs = 0, 0
    imbalance = {(ranks, how): [] for ranks in RANKS for how in ("planned", "random")}
    random = np.random.default_rng(0)
    for step in range(STEPS):
        units = plan.global_batch(step)
        tokens, packs = tokens + int(plan.sizes.tokens[units.rows].sum()), packs + len(units)
        costs = plan.costs(units)
        for ranks in RANKS:
            shares = {"planned": balanced(costs, ranks), "random": random.permutation(len(costs)).reshape(ranks, -1)}
            for how, share in shares.items():
                sums = np.array([costs[list(mine)].sum() for mine in share])
                imbalance[ranks, how].append(sums.max() / sums.mean())
    figures = [
        Figure("tokens of a sample, mean", float(plan.sizes.tokens.mean()), "tokens"),
        Figure("packing share at 16,384 tokens", tokens / packs / CAPACITY, "", SHARE_BAR, "at least"),
    ]
    for (ranks, how), values in imbalance.items():
        bar = IMBALANCE_BAR if (ranks, how) == (IMBALANCE_RANKS, "planned") else None
        name = f"cost of the dearest rank / mean, {ranks} ranks, {how}"
        figures += [Figure(f"{name}, worst of {STEPS} steps", max(values), "", bar)]
        figures += [Figure(f"{name}, mean", float(np.mean(values)), "")]
    return figures


def _cost(path: Path) -> list[Figure]:
    said = run_python(f"from benchmarks.data_plan import plan_large; plan_large({str(path)!r})")
    opened, planned, peak, sizes = map(float, said.split())
    return [
        Figure("37M samples: different sizes of pictures", sizes, "sizes"),
        Figure("37M samples: index opened, every sample's tokens and tiles reckoned", opened, "s"),
        Figure("37M samples: last step of the epoch found, nothing known before", planned, "s", 10),
        Figure("37M samples: memory of the process, peak", peak / 2**20, "MiB", 2048),
    ]


def plan_large(path: str) -> None:
    """Plan the last step of the epoch; print seconds, seconds, bytes, and the number of sizes."""
    started = time.monotonic()
    index = Index(Path(path))
    plan = stage3_plan(index)
    opened = time.monotonic()
    tokens = int(plan.sizes.tokens.sum(dtype=np.int64))
    units = plan.global_batch(int(tokens / CAPACITY / GLOBAL_BATCH) - 1)
    assert len(units) == GLOBAL_BATCH
    print(opened - started, time.monotonic() - opened, peak_bytes(), len(index.picture_sizes))

"""What a run does beside forward, backward and update: its share of the loop's time, on the mini recipe.

Two ranks of mini/stage3 as it is shipped, with TensorBoard and checkpoints in the background, every 100 steps here. All
that lies between two calls of `train_step` counts: waiting for batches, metrics, checkpoints, agreeing on whether to
stop. The first 20 steps, in which workers start, do not count.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.figure import Figure
from megatron_mm.config.load import load_config
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.digits import prepare_digits
from megatron_mm.train import learning
from megatron_mm.train.loop import train
from tests.ranks import run_on_ranks

FIRST, STEPS, SAVE_EVERY = 20, 420, 100


def measure() -> list[Figure]:
    """Run it."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare_digits(root / "digits", num_train=3000, num_heldout=4, seed=0)
        overrides = [
            f"data.path={root / 'digits'}",
            f"run_dir={root / 'run'}",
            "init_from=null",
            f"train.steps={STEPS}",
            f"checkpoint.save_every={SAVE_EVERY}",
        ]
        of_ranks = run_on_ranks(_seconds, 2, load_config("mini/stage3", overrides=overrides))
    seconds, outside = max(of_ranks, key=lambda rank: rank[1] / rank[0])
    steps = STEPS - FIRST
    return [
        Figure("share of the loop outside forward, backward and optimizer, worse rank", outside / seconds, "", 0.03),
        Figure("a step", 1000 * seconds / steps, "ms"),
        Figure("of it outside", 1000 * outside / steps, "ms"),
    ]


def _seconds(config: RunConfig) -> tuple[float, float]:
    """Seconds of the loop behind the first steps, and of these outside `train_step`. Runs on every rank."""
    take, began, inside = learning.train_step, [], []

    def timed(*arguments: Any, **keywords: Any) -> Any:
        began.append(time.monotonic())
        result = take(*arguments, **keywords)
        inside.append(time.monotonic() - began[-1])
        return result

    learning.train_step = timed
    train(config)
    # From the beginning of one step to the beginning of the last.
    seconds = began[-1] - began[FIRST]
    return seconds, seconds - sum(inside[FIRST:-1])

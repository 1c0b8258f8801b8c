"""Learning rates of each step, against their formulas written out."""

import math
from collections.abc import Callable

import pytest
import torch

from megatron_mm.train.assemble import make_scheduler
from tests.tiny import tiny_config

STEPS, WARMUP, HIGH, LOW, DECAY = 40, 5, 1e-3, 1e-4, 10
FORMULAS: dict[str, Callable[[int], float]] = {
    "constant": lambda step: HIGH,  # noqa: ARG005
    "cosine": lambda step: LOW + (HIGH - LOW) * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2,
    "wsd": lambda step: HIGH if step <= STEPS - DECAY else LOW + (HIGH - LOW) * (STEPS - step) / DECAY,
}


@pytest.mark.parametrize("schedule", FORMULAS)
def test_rates_follow_the_formula(schedule: str) -> None:
    config = tiny_config(
        train__steps=STEPS,
        optim__schedule=schedule,
        optim__warmup_steps=WARMUP,
        optim__lr=HIGH,
        optim__min_lr=LOW,
        optim__decay_steps=DECAY if schedule == "wsd" else "null",
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = make_scheduler(config, optimizer)
    for step in range(1, STEPS + 1):
        scheduler.step(1)
        expected = HIGH * step / WARMUP if step <= WARMUP else FORMULAS[schedule](step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-12), step

"""One GPU: trainer and engine in the same memory, which each gives back while the other works."""

from pathlib import Path

import pytest
import torch

from megatron_mm.config.schema import RunConfig
from megatron_mm.generation.engine import Engine
from megatron_mm.rl.job import reinforce
from tests.gpu.conftest import Measured
from tests.ranks import run_on_ranks
from tests.runs import metrics
from tests.tiny import digits_config

pytestmark = pytest.mark.gpu

STEPS = 4
# bf16 on both sides, kernels of two libraries. To be set when it is first measured.
TOLERANCE = 0.05
CACHE_GIB = 2.0


def _reinforced(config: RunConfig) -> list[float]:
    """Bytes that each rest gave back."""
    rest, given_back = Engine.rest, []

    def noted(self: Engine, *, keeps_weights: bool) -> None:
        before = torch.cuda.mem_get_info()[0]
        rest(self, keeps_weights=keeps_weights)
        given_back.append(torch.cuda.mem_get_info()[0] - before)

    Engine.rest = noted
    reinforce(config)
    return given_back


@pytest.mark.parametrize("offload", [False, True])
def test_an_engine_that_sleeps_draws_with_the_trainers_weights(
    digits: Path, tmp_path: Path, offload: bool, measured: Measured
) -> None:
    stages = f"[{{steps: {STEPS}, max_response_tokens: 8, group_size: 4}}]"
    rollout = f"{{cache_gib: {CACHE_GIB}, offload: {str(offload).lower()}, compare_all_every: 1}}"
    config = digits_config(
        digits,
        tmp_path,
        precision="bf16",
        model__language__head_dim=64,
        data__blend="{digits/easy/non_thinking: 1, digits/caption/non_thinking: 1}",
        train__steps=STEPS,
        train__micro_batch=8,
        train__log_every=1,
        train__validate_every=2,
        rl=f"{{algorithm: bpo, stages: {stages}, heldout_questions: 4, rollout: {rollout}}}",
    )
    (given_back,) = run_on_ranks(_reinforced, 1, config)
    lines = metrics(tmp_path)
    worst = max(line["logprob_difference/mean"] for line in lines)
    measured("mean difference of log-probabilities between engine and trainer", worst, TOLERANCE)
    assert len(given_back) == 1 + STEPS + STEPS // 2  # when it is made, after drawing, and after held-out questions
    kept = CACHE_GIB - min(given_back) / 2**30
    measured(f"GiB of {CACHE_GIB:g} for keys and values that a sleeping engine keeps", kept, 0.1 * CACHE_GIB)

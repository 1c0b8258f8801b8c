"""One GPU: packs, recomputation and FP8 recipes by Transformer Engine against its own unpacked bf16."""

from pathlib import Path

import numpy as np
import pytest

from megatron_mm.data.shards import TOKENIZER
from tests.gpu.conftest import Measured
from tests.layouts import layout, outcomes
from tests.ranks import run_on_ranks
from tests.tiny import r4b_tensors, reference_models

pytestmark = pytest.mark.gpu

# bf16 losses of about 6 in other orders of summation; 8-bit products keep 2 to 3 bits of mantissa. To be set when they
# are first measured.
BF16_TOLERANCE, FP8_TOLERANCE = 0.05, 0.3
# A head of 64 and sides that are multiples of 32, for Transformer Engine's kernels.
MODEL = {"model__language__head_dim": 64, "precision": "bf16"}


@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [
        ({}, BF16_TOLERANCE),
        ({"train__recompute": "full"}, BF16_TOLERANCE),
        ({"train__recompute": "selective"}, BF16_TOLERANCE),
        ({"fp8__recipe": "delayed"}, FP8_TOLERANCE),
        ({"fp8__recipe": "tensorwise", "fp8__modules": "[vision, projector, language]"}, FP8_TOLERANCE),
        ({"fp8__recipe": "blockwise"}, FP8_TOLERANCE),
    ],
)
def test_losses_of_three_steps(
    overrides: dict[str, object], tolerance: float, digits: Path, measured: Measured
) -> None:
    unpacked, other = layout(**MODEL, data__packed="false"), layout(**MODEL, **overrides)
    tensors = r4b_tensors(unpacked, *reference_models(unpacked))
    ((reference, outcome),) = run_on_ranks(outcomes, 1, "cuda", [unpacked, other], tensors, digits / TOKENIZER)
    difference = np.abs(np.array(outcome.losses) - np.array(reference.losses)).max()
    measured("largest difference of a loss", float(difference), tolerance)

"""The CPU's parity tests on a GPU machine: the Transformer Engine layers against transformers."""

import pytest

from tests.gpu.conftest import Measured
from tests.parity import against_transformers
from tests.ranks import run_on_ranks
from tests.tiny import tiny_config

pytestmark = pytest.mark.gpu

# Room for TF32's 10 bits of mantissa in Transformer Engine's fp32 products; to be set when it is first measured.
LOGITS_TOLERANCE = 2e-2


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers(tied: bool, measured: Measured) -> None:
    config = tiny_config(model__language__tied_embeddings=tied)
    ((differences,),) = run_on_ranks(against_transformers, 1, "cuda", [config])
    assert differences["weights"] == 0.0
    for name in ("vision", "logits", "loss"):
        measured(f"largest difference of {name}", differences[name], LOGITS_TOLERANCE)

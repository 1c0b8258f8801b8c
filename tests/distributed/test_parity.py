"""Our model against transformers' classes, and every layout against a single process, in fp32."""

from pathlib import Path

import numpy as np
import pytest

from tests.parity import against_transformers, layout_configs, one_step
from tests.ranks import run_on_ranks
from tests.tiny import r4b_tensors, reference_models, tiny_config

# fp32 against transformers: rounding of differently ordered sums, measured at 4e-6 on logits of about 3.
LOGITS_TOLERANCE = 1e-4
# Sums over ranks round differently; measured at 5e-7.
LOSS_TOLERANCE = 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers_at_tp_1_and_tp_2(tied: bool) -> None:
    configs = [tiny_config(parallel__tensor=size, model__language__tied_embeddings=tied) for size in (1, 2)]
    for rank_results in run_on_ranks(against_transformers, 2, "cpu", configs):
        for differences in rank_results:
            assert differences["weights"] == 0.0
            assert differences["vision"] < LOGITS_TOLERANCE
            assert differences["logits"] < LOGITS_TOLERANCE


def test_every_layout_gives_the_loss_of_a_single_process(digits: Path) -> None:
    layouts = layout_configs(digits)
    single = layouts.pop("single")
    tensors = r4b_tensors(single, *reference_models(single))
    (reference,) = run_on_ranks(one_step, 1, "cpu", [single], tensors)[0]
    assert np.isfinite(reference).all()
    # The update must matter, or the comparison after it compares nothing.
    assert abs(reference[0] - reference[2]) > 100 * LOSS_TOLERANCE
    for rank_results in run_on_ranks(one_step, 2, "cpu", list(layouts.values()), tensors):
        for name, result in zip(layouts, rank_results, strict=True):
            before, grad_norm, after = np.abs(np.array(result) - np.array(reference))
            assert before < LOSS_TOLERANCE, f"{name}: loss {result[0]} against {reference[0]}"
            assert grad_norm < 1e-4 * reference[1], f"{name}: gradient norm {result[1]} against {reference[1]}"
            assert after < LOSS_TOLERANCE, f"{name}: loss after the update {result[2]} against {reference[2]}"

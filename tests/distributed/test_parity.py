"""Our ViT and language model against transformers' classes, in fp32."""

import pytest

from tests.layouts import EXPERTS
from tests.parity import against_transformers
from tests.ranks import run_on_ranks
from tests.tiny import tiny_config

# fp32 against transformers: rounding of differently ordered sums, measured at 4e-6 on logits of about 3.
LOGITS_TOLERANCE = 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers_at_tp_1_and_tp_2(tied: bool) -> None:
    models = [{"model__language__vocab_size": size, "model__language__tied_embeddings": tied} for size in (128, 100)]
    configs = [tiny_config(**model, parallel__tensor=size) for model in models for size in (1, 2)]
    for rank_results in run_on_ranks(against_transformers, 2, "cpu", configs):
        for differences in rank_results:
            assert differences["weights"] == 0.0
            assert differences["vision"] < LOGITS_TOLERANCE
            assert differences["logits"] < LOGITS_TOLERANCE
            assert differences["loss"] < LOGITS_TOLERANCE


def test_a_model_with_experts() -> None:
    configs = [tiny_config(**EXPERTS, parallel__expert=size) for size in (1, 2)]
    for rank_results in run_on_ranks(against_transformers, 2, "cpu", configs):
        for differences in rank_results:
            assert differences["weights"] == 0.0
            assert differences["logits"] < LOGITS_TOLERANCE

"""A run trained on four ranks, exported: vLLM, transformers and our own forward say the same, in both formats."""

from pathlib import Path

import pytest

from megatron_mm.weights.export import Format
from tests.formats import FORMATS, largest_difference, same_answers, say_everywhere

# fp32 on all sides, sums in another order.
TOLERANCE = 1e-4


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=() if form is Format.R4B else pytest.mark.slow) for form in FORMATS]
)
def test_a_trained_model_says_the_same_everywhere(form: Format, digits: Path, tmp_path: Path) -> None:
    by_vllm, by_transformers, by_ourselves = say_everywhere(form, digits, tmp_path)
    assert sum(len(completion.ids) for completion in by_vllm) > 60
    for said in (by_transformers, by_ourselves):
        assert same_answers(by_vllm, said)
        assert largest_difference(by_vllm, said) < TOLERANCE

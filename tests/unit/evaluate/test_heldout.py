"""What held-out questions are answered in."""

import pytest

from megatron_mm.evaluate.heldout import chosen_dtype


@pytest.mark.parametrize(("has_own_memory", "default"), [(True, "bfloat16"), (False, "float32")])
def test_a_device_answers_in_bf16_unless_asked_otherwise(has_own_memory: bool, default: str) -> None:
    assert chosen_dtype(None, has_own_memory=has_own_memory) == default
    for asked_for in ("float32", "bfloat16"):
        assert chosen_dtype(asked_for, has_own_memory=has_own_memory) == asked_for

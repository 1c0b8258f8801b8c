"""A position table for another tile size, against transformers'."""

import logging

import pytest
import torch
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

from megatron_mm.models.vision import fitted_positions


@pytest.mark.parametrize(("old", "new"), [(4, 6), (6, 4), (3, 7)])
def test_interpolation_equals_transformers(old: int, new: int, caplog: pytest.LogCaptureFixture) -> None:
    embeddings = SiglipVisionEmbeddings(SiglipVisionConfig(hidden_size=16, image_size=old * 8, patch_size=8))
    table = embeddings.position_embedding.weight
    theirs = embeddings.interpolate_pos_encoding(torch.zeros(1, new * new, 16), new * 8, new * 8)[0]
    with caplog.at_level(logging.WARNING):
        ours = fitted_positions(table, new * new, "weights.safetensors")
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert (
        f"weights.safetensors: the position table of {old} x {old} patches is interpolated to {new} x {new}"
        in caplog.text
    )


def test_a_table_that_fits_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    table = torch.randn(16, 8)
    assert fitted_positions(table, 16, "weights") is table
    assert not caplog.text

"""Floating-point operations against PyTorch's own count of the reference models' matrix products."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_mm.config.flops import training_flops
from tests.tiny import reference_models, tiny_config

TOKENS = 24


def _counted(run, *trained: torch.nn.Module) -> int:
    """Operations of a forward and backward pass in which the modules learn."""
    for module in trained:
        module.requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        run().float().sum().backward()
    return counter.get_total_flops()


def test_a_language_models_tokens_and_squares() -> None:
    config = tiny_config()
    _, qwen = reference_models(config)
    qwen.config._attn_implementation = "eager"
    flops = training_flops(config.model, ["language", "embeddings"])
    ids = torch.zeros((1, TOKENS), dtype=torch.long)
    counted = _counted(lambda: qwen.model(ids).last_hidden_state, qwen)
    # PyTorch counts all pairs of tokens, we those under the causal mask.
    assert flops.of(TOKENS, 2 * TOKENS**2, 0) == pytest.approx(counted, rel=0.01)


def test_a_vits_tile() -> None:
    config = tiny_config()
    siglip, _ = reference_models(config)
    siglip.config._attn_implementation = "eager"
    side = config.model.vision.image_size
    pixels = torch.zeros((1, 3, side, side))
    counted = _counted(lambda: siglip(pixel_values=pixels).last_hidden_state, siglip)
    vision = training_flops(config.model, ["vision"]).tile
    projector = 2 * (64 + 128) * 128 * config.model.vision.patches_per_tile
    # The embedding of patches is left out: a hundredth of a real ViT, more of a tiny one.
    patches = config.model.vision.patches_per_tile
    embedding = 2 * 2 * patches * 3 * config.model.vision.patch_size**2 * config.model.vision.hidden_size
    # The projector passes the gradient on: forward and the gradient of its input.
    assert vision - 2 * projector == pytest.approx(counted - embedding, rel=0.01)


def test_what_does_not_learn_costs_less() -> None:
    model = tiny_config().model
    everything = training_flops(model, ["vision", "projector", "language", "embeddings"])
    projector = training_flops(model, ["projector"])
    assert everything.token == pytest.approx(projector.token * 3 / 2)
    assert everything.squared_token == projector.squared_token
    assert everything.tile > 2 * projector.tile
    assert training_flops(model, ["language"]).token == pytest.approx(everything.token * 2 / 3)

"""Megatron-Core's fused SwiGLU, which runs on GPUs alone, computes what the unfused one computes; gradients as well."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl, weighted_bias_swiglu_impl

from megatron_mm.config.load import load_config
from megatron_mm.models.megatron_config import language_config, projector_config, vision_config
from megatron_mm.parallel.platform.cpu import CpuPlatform


@pytest.fixture(autouse=True)
def _uncompiled() -> Iterator[None]:
    """torch.compile wants a C++ compiler on CPUs; it changes how this is computed, not what."""
    with torch.compiler.set_stance("force_eager"):
        yield


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def _unfused(gate_and_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_and_up.chunk(2, -1)
    return F.silu(gate) * up


def _assert_equal(ours: torch.Tensor, theirs: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    slopes = _random(*ours.shape)
    pairs = zip(torch.autograd.grad(ours, inputs, slopes), torch.autograd.grad(theirs, inputs, slopes), strict=True)
    for our_grad, their_grad in pairs:
        assert our_grad.abs().max() > 0
        assert torch.allclose(our_grad, their_grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 2, 24), (7, 24), (0, 24)])
def test_of_a_dense_layer(shape: tuple[int, ...]) -> None:
    x = _random(*shape).requires_grad_()
    ours, theirs = bias_swiglu_impl(x, None), _unfused(x)
    if not ours.numel():
        assert ours.shape == theirs.shape
        return
    _assert_equal(ours, theirs, [x])


def test_of_experts_whose_probabilities_weigh_it() -> None:
    x, probabilities = _random(7, 24).requires_grad_(), _random(7, 1).requires_grad_()
    ours = weighted_bias_swiglu_impl(x, None, probabilities)
    _assert_equal(ours, _unfused(x) * probabilities, [x, probabilities])


class _Fusing(CpuPlatform):
    """A CPU that fuses as a GPU does."""

    def language_settings(self) -> dict[str, bool]:
        return {"apply_rope_fusion": False, "bias_activation_fusion": True}


def test_the_language_model_alone_is_fused() -> None:
    stage = ["run_dir=x", "train={steps: 1, global_batch: 2, micro_batch: 1}", "optim={lr: 1}"]
    config = load_config("r4b/base", overrides=stage)
    assert language_config(config, _Fusing()).bias_activation_fusion
    assert not language_config(config, CpuPlatform()).bias_activation_fusion
    # Their activations are other GELUs than the one that Megatron-Core fuses.
    assert not vision_config(config, _Fusing()).bias_activation_fusion
    assert not projector_config(config, _Fusing()).bias_activation_fusion

"""The platforms: which machine takes which, and the optimizer that stands in for Apex' and Transformer Engine's."""

import pytest
import torch

from megatron_mm.config.errors import InputError
from megatron_mm.parallel.platform import get_platform, to_device
from megatron_mm.parallel.platform.cpu import CpuPlatform, FusedAdam
from tests.ranks import run_alone


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU; tests/gpu has the others")
def test_a_machine_without_a_gpu() -> None:
    assert get_platform("auto").name == "cpu"
    assert get_platform("cpu").layer_backend == "local"
    with pytest.raises(InputError, match="torch sees no CUDA device; use platform=cpu"):
        get_platform("cuda")


def test_copies_to_another_memory_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    locked = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: locked.append(self) or self)
    tensor = torch.arange(3)
    assert to_device(tensor, torch.device("cpu")) is tensor
    assert not locked
    asked = []
    copy = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: asked.append(kwargs) or copy(self, *args))
    assert to_device(tensor, torch.device("meta")).is_meta
    assert locked == [tensor]
    assert asked == [{"non_blocking": True}]


def test_fused_adam_follows_torchs_adamw() -> None:
    settings = {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(3, 4, generator=generator), torch.randn(5, generator=generator)]
    ours, theirs = ([tensor.clone().requires_grad_() for tensor in start] for _ in range(2))
    optimizers = FusedAdam(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for _ in range(20):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other, begun in zip(ours, theirs, start, strict=True):
        assert (mine - begun).abs().max() > 0.1
        assert torch.allclose(mine, other, atol=1e-6)


def test_fused_adam_has_no_coupled_weight_decay() -> None:
    with pytest.raises(ValueError, match="only decoupled weight decay"):
        FusedAdam([torch.zeros(1, requires_grad=True)], adam_w_mode=False)


def _peaks_before_and_after_holding(num_bytes: int) -> tuple[int, int]:
    platform = CpuPlatform()
    before = platform.peak_memory_bytes()["resident"]
    held = torch.ones(num_bytes, dtype=torch.uint8)
    del held
    return before, platform.peak_memory_bytes()["resident"]


def test_peak_memory_is_this_processs_own_and_remembered() -> None:
    size = 2**29
    held = torch.ones(2 * size, dtype=torch.uint8)
    before, after = run_alone(_peaks_before_and_after_holding, size)
    own = CpuPlatform().peak_memory_bytes()["resident"]
    assert own > len(held)
    # A process starts without its parent's; what it has given back still counts.
    assert before < own - size
    assert 0.9 * size < after - before < 1.1 * size


def test_a_cpu_has_no_stated_peak() -> None:
    assert CpuPlatform().peak_tflops() is None

"""Products of bf16 through fp32: the same numbers, rounded once, and nothing else changes."""

import warnings

import pytest
import torch
from torch import Tensor

from megatron_mm.parallel.platform import bf16, get_platform
from tests.ranks import run_alone

# Half of a bf16's last place, relative.
ROUNDING = 2**-8


def _results(dtype: torch.dtype) -> dict[str, Tensor]:
    """Every product that is replaced, and what autograd makes of a layer, from the same numbers in any dtype."""
    generator = torch.Generator().manual_seed(0)
    left, right, added = (
        # Such that no dtype rounds them.
        torch.randn(*shape, generator=generator).bfloat16().to(dtype)
        for shape in ((3, 40, 70), (3, 70, 20), (3, 40, 20))
    )
    inputs, weight, bias = left.clone().requires_grad_(), right[0].T.clone().requires_grad_(), added[0, 0].clone()
    output = torch.nn.functional.linear(inputs, weight, bias.requires_grad_())
    output.backward(added)
    assert inputs.grad is not None
    assert weight.grad is not None
    return {
        "mm": left[0] @ right[0],
        "bmm": left @ right,
        "addmm": torch.addmm(added[0], left[0], right[0], beta=0.5, alpha=2),
        "baddbmm": torch.baddbmm(added, left, right, beta=0.5, alpha=2),
        "linear": output.detach(),
        "gradient of the inputs": inputs.grad,
        "gradient of the weight": weight.grad,
    }


def _before_and_after() -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """In fp64, in fp32 before and after, and in bf16 after. Runs in a process of its own."""
    exact, before = _results(torch.float64), _results(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bf16.multiply_through_fp32()
    return exact, before, _results(torch.float32), _results(torch.bfloat16)


def test_bf16_is_rounded_once_and_fp32_is_what_it_was() -> None:
    exact, before, after, halves = run_alone(_before_and_after)
    for name, expected in exact.items():
        assert torch.equal(before[name], after[name]), name
        assert halves[name].dtype == torch.bfloat16
        assert halves[name].shape == expected.shape
        off = (halves[name].double() - expected).abs()
        assert (off <= ROUNDING * expected.abs() + 1e-5).all(), name


def _mixed() -> list[str]:
    """What is said of fp32 times bf16 and the other way round. Runs in a process of its own."""
    bf16.multiply_through_fp32()
    said = []
    for dtypes in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        left, right = (torch.ones(2, 2, dtype=dtype) for dtype in dtypes)
        with pytest.raises(RuntimeError) as refused:
            torch.mm(left, right)
        said.append(str(refused.value))
    return said


def test_types_are_not_mixed() -> None:
    assert all("same dtype" in one for one in run_alone(_mixed))


def _is_mended(*, is_fast: bool) -> bool:
    """Whether a training process mends its products. Runs in a process of its own."""
    bf16._is_fast = lambda: is_fast
    get_platform("cpu").prepare(0)
    return bf16.multiply_through_fp32.cache_info().currsize == 1


@pytest.mark.parametrize("is_fast", [True, False])
def test_only_cpus_without_bf16_are_mended(is_fast: bool) -> None:
    assert run_alone(_is_mended, is_fast=is_fast) is not is_fast

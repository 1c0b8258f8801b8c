"""Matrix products in bf16 on a CPU without instructions for them, as those of most laptops are.

torch 2.13 multiplies there in a plain loop, which takes 30 to 70 times as long as the same product in fp32.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")


def mend_products() -> None:
    """Where this CPU is one of them, have the whole process multiply bf16 through fp32, rounded once at the end."""
    if not _is_fast():
        multiply_through_fp32()


def _is_fast() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@functools.cache
def multiply_through_fp32() -> torch.library.Library:
    """Take the place of torch's own products on the CPU for as long as the process lives."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for name in _PRODUCTS:
            library.impl(name, _through_fp32(getattr(torch.ops.aten, name).out), "CPU")
    return library  # is undone when nothing holds it any more


def _through_fp32(into: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A product, made of its form that writes into a given tensor, which stays torch's."""

    def multiply(*tensors: Tensor, **factors: Any) -> Tensor:
        out = tensors[0].new_empty(0)
        # Others are torch's as they were, and so is its refusal to mix them.
        if any(tensor.dtype != torch.bfloat16 for tensor in tensors):
            return into(*tensors, **factors, out=out)
        return into(*(tensor.float() for tensor in tensors), **factors, out=out.float()).bfloat16()

    return multiply

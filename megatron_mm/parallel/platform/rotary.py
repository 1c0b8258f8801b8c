"""Rotary embedding on a CPU: two passes over memory, where Megatron-Core's unfused form makes seven.

Megatron-Core joins the halves of each vector, negated and swapped, to a copy, and its result to an empty rest to
another; autograd takes all of them apart again.
"""

from typing import Any

import torch
from torch import Tensor


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(vectors, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        # The transpose of a rotation turns the other way.
        return _rotated(grad, cos, -sin), None, None


def _rotated(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = vectors.shape[-1] // 2
    rotated = vectors * cos
    rotated[..., :half].addcmul_(vectors[..., half:], sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(vectors[..., :half], sin[..., half:])
    return rotated


def rotate(vectors: Tensor, angles: Tensor) -> Tensor:
    """Rotate each vector, in the plane of each element of its first half and that of its second, by an angle.

    Args:
        vectors: [..., dim].
        angles: float32, broadcast to the vectors; its second half repeats the first.
    """
    cos, sin = angles.cos().to(vectors.dtype), angles.sin().to(vectors.dtype)
    return _Rotate.apply(vectors, cos, sin)  # pyright: ignore[reportReturnType]

"""Rotary angles of each token (RoPE, arXiv 2104.09864), whatever pack or part of a sequence it stands in."""

import torch
from torch import Tensor


def rotary_angles(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Return the angles by which queries and keys are rotated, as Megatron-Core's RotaryEmbedding makes them.

    Args:
        positions: int64 [S], of each token in its sample.
        frequencies: float32 [dim / 2], angle per position of each pair of elements (arXiv 2104.09864, section 3.2.2).

    Returns:
        float32 [S, 1, 1, dim]; the second half repeats the first.
    """
    angles = torch.outer(positions.to(frequencies.dtype), frequencies)
    return torch.cat((angles, angles), -1)[:, None, None]

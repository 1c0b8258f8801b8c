"""SwiGLU of the local backend (arXiv 2002.05202), of which only the input is kept for the backward pass.

Megatron-Core's unfused form copies one half, and its gradient joins both halves' in another copy.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gate_and_up,) = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, -1)
        result = torch.empty_like(gate_and_up)
        of_gate, of_up = result.chunk(2, -1)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=of_gate)
        torch.mul(F.silu(gate), grad, out=of_up)
        return result


class SwiGLU(MegatronModule):
    """[..., 2 F], gate and up projection of the same tokens -> silu(gate) * up, [..., F].

    A module of Megatron-Core's: its MLP asks each of its modules for a sharded state.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        assert config.gated_linear_unit
        assert config.activation_func is F.silu

    def forward(self, gate_and_up: Tensor) -> Tensor:
        return _SwiGLU.apply(gate_and_up)  # pyright: ignore[reportReturnType]

"""SwiGLU of the local backend against torch's own differentiation of its formula."""

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from megatron_mm.models.swiglu import SwiGLU


def test_value_and_gradient_are_those_of_the_formula() -> None:
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, gated_linear_unit=True, activation_func=F.silu
    )
    random = torch.Generator().manual_seed(0)
    values, incoming = torch.randn(6, 3, 10, generator=random), torch.randn(6, 3, 5, generator=random)
    for dtype in (torch.float32, torch.bfloat16):
        ours, expected = (values.to(dtype).requires_grad_() for _ in range(2))
        out = SwiGLU(config)(ours)
        formula = F.silu(expected[..., :5]) * expected[..., 5:]
        assert torch.equal(out, formula)
        out.backward(incoming.to(dtype))
        formula.backward(incoming.to(dtype))
        torch.testing.assert_close(ours.grad, expected.grad)

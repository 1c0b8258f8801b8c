"""The CPU's rotary embedding against its formula, written with complex numbers and differentiated by torch."""

import torch

from megatron_mm.parallel.platform.rotary import rotate


def test_each_pair_of_elements_is_turned_by_its_angle() -> None:
    random = torch.Generator().manual_seed(0)
    values, incoming = (torch.randn(7, 2, 3, 8, generator=random) for _ in range(2))
    angles = 6 * torch.rand(7, 1, 1, 4, generator=random)
    ours, expected = (values.clone().requires_grad_() for _ in range(2))
    out = rotate(ours, torch.cat([angles, angles], -1))
    turned = torch.complex(expected[..., :4], expected[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    formula = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(out, formula)
    out.backward(incoming)
    formula.backward(incoming)
    torch.testing.assert_close(ours.grad, expected.grad)

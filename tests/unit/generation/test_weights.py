"""What is read back is what a worker multiplies by, packed or not."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_mm.generation.weights import Part

WEIGHT, PACKED = torch.arange(6.0).view(2, 3), -torch.arange(6.0).view(2, 3)


def _with_copy(copy: Tensor) -> Callable[..., Tensor]:
    return lambda inputs, weight, bias: nn.functional.linear(inputs, copy, bias)  # noqa: ARG005


def _with_default(inputs: Tensor, weight: Tensor, bias: Tensor | None, copy: Tensor = PACKED) -> Tensor:
    del weight
    return nn.functional.linear(inputs, copy, bias)


class _Method:
    """As vLLM's layers have one."""

    def apply(self, module: Any, inputs: Tensor, bias: Tensor | None) -> Tensor:
        return module.cpu_linear(inputs, module.weight, bias)


@pytest.mark.parametrize(
    ("multiply", "expected"),
    [
        (lambda inputs, weight, bias: nn.functional.linear(inputs, weight, bias), WEIGHT),
        (_with_copy(PACKED), PACKED),
        (_with_default, PACKED),
        (functools.partial(_with_default, copy=PACKED), PACKED),
    ],
    ids=["the parameter", "a copy", "a default", "a partial"],
)
def test_what_is_multiplied_by_is_read(multiply: Callable[..., Tensor], expected: Tensor) -> None:
    module: Any = nn.Linear(3, 2)
    module.weight.data = WEIGHT.clone()
    module.input_size_per_partition, module.quant_method, module.cpu_linear = 3, _Method(), multiply
    part = Part("a.weight", (slice(0, 2), slice(0, 3)), module, "weight", slice(0, 2), multiplies=True)
    assert torch.equal(part.read(), expected)

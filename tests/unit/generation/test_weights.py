"""What a worker multiplies by, packed or not, is what is read back and what is written over."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_mm.generation.weights import Part, load_weights, uncovered

WEIGHT, PACKED = torch.arange(6.0).view(2, 3), -torch.arange(6.0).view(2, 3)


def _with_copy(copy: Tensor) -> Callable[..., Tensor]:
    return lambda inputs, weight, bias: nn.functional.linear(inputs, copy, bias)  # noqa: ARG005


def _with_default(inputs: Tensor, weight: Tensor, bias: Tensor | None, copy: Tensor = PACKED) -> Tensor:
    del weight
    return nn.functional.linear(inputs, copy, bias)


class _Method:
    """As vLLM's layers have one.

    Args:
        drops: whether a packed parameter is dropped, as those of linear layers are, and of tables not.
    """

    def __init__(self, drops: bool = True):
        self._drops = drops

    def apply(self, module: Any, inputs: Tensor, bias: Tensor | None) -> Tensor:
        return module.cpu_linear(inputs, module.weight, bias)

    def process_weights_after_loading(self, module: Any) -> None:
        module.cpu_linear = _with_copy(module.weight.data.clone())
        if self._drops:
            module.weight = nn.Parameter(torch.empty(0), requires_grad=False)


def _plain(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(inputs, weight, bias)


def _module(multiply: Callable[..., Tensor], method: _Method) -> Any:
    module: Any = nn.Linear(3, 2)
    module.weight.data = WEIGHT.clone()
    module.input_size_per_partition, module.output_size_per_partition = 3, 2
    module.quant_method, module.cpu_linear = method, multiply
    return module


@pytest.mark.parametrize(
    ("multiply", "expected"),
    [
        (_plain, WEIGHT),
        (_with_copy(PACKED), PACKED),
        (_with_default, PACKED),
        (functools.partial(_with_default, copy=PACKED), PACKED),
    ],
    ids=["the parameter", "a copy", "a default", "a partial"],
)
def test_what_is_multiplied_by_is_read(multiply: Callable[..., Tensor], expected: Tensor) -> None:
    module = _module(multiply, _Method())
    part = Part((slice(0, 2), slice(0, 3)), module, "weight", slice(0, 2), multiplies=True)
    assert torch.equal(part.read(), expected)


@pytest.mark.parametrize("sent", [("a", "b"), ("b",)], ids=["all rows", "the last row"])
@pytest.mark.parametrize("drops", [True, False])
@pytest.mark.parametrize("is_packed", [True, False])
def test_what_is_multiplied_by_is_written_over(is_packed: bool, drops: bool, sent: tuple[str, ...]) -> None:
    module = _module(_plain, _Method(drops))
    if is_packed:
        module.quant_method.process_weights_after_loading(module)
    # Of tensors with a column more at either side.
    index = (slice(0, 1), slice(1, 4))
    parts = {name: [Part(index, module, "weight", slice(row, row + 1), True)] for row, name in enumerate("ab")}
    parts["bias"] = [Part((slice(0, 2),), module, "bias", slice(0, 2), False)]
    tensors = dict(zip("ab", torch.full((2, 1, 5), 9.0).cumsum(0), strict=True)) | {"bias": torch.ones(2)}
    for round_number in (1, 2):
        load_weights(parts, [(name, tensors[name] * round_number) for name in ("bias", *sent)])
        assert torch.equal(module.bias, tensors["bias"] * round_number)
        for row, name in enumerate("ab"):
            expected = tensors[name][index] * round_number if name in sent else WEIGHT[row : row + 1]
            assert torch.equal(parts[name][0].read(), expected)
            assert torch.equal(module.quant_method.apply(module, torch.eye(3), None)[:, row], expected[0])
    assert (module.weight.numel() == 0) == (is_packed and drops)


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        (((0, 3), (3, 8)), []),
        (((3, 8), (0, 3)), []),
        (((None, None),), []),
        ((), ["0 to 8"]),
        (((0, 3), (5, 8)), ["3 to 5"]),
        (((1, 3), (3, 7)), ["0 to 1", "7 to 8"]),
        (((0, 5), (3, 8)), ["3 to 5"]),
    ],
    ids=["all", "in any order", "in one", "nothing", "a gap", "both ends", "twice"],
)
def test_rows_that_not_one_part_is_for_are_named(spans: tuple[tuple[Any, Any], ...], expected: list[str]) -> None:
    model: Any = nn.Sequential(nn.Linear(3, 8, bias=False))
    parts = [Part((slice(None),), model[0], "weight", slice(*span), False) for span in spans]
    assert uncovered(model, parts) == ([f"0.weight (of 8 rows: {', '.join(expected)})"] if expected else [])

"""The trainer's weights for the engine, and the proof that they arrived."""

import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_mm.generation.engine import Engine
from megatron_mm.models.vlm import VisionLanguageModel
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import Platform
from megatron_mm.weights.mapping import Rule, hf_shapes
from megatron_mm.weights.stream import to_hf

# Words of 64 bits in a row, half a megabyte; rows and their sums are the same however many are worked on at a time.
_ROW = 2**16
# What a row's sum is multiplied by when the next one is added; any odd number does.
_TURN = 0x9E3779B97F4A7C15 - 2**64


class StaleWeightsError(RuntimeError):
    """The engine does not compute with the trainer's weights."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """What one exchange cost.

    Attributes:
        num_bytes: of what this rank's worker took.
        load_seconds: for gathering, and for the engine to take them; where the device computes while the host goes on,
            the sums of what was sent are in here.
        check_seconds: for noting what was sent, and comparing what the engine holds with it.
    """

    num_bytes: int
    load_seconds: float
    check_seconds: float


class WeightExchange:
    """Hands over a sharded model's weights, and compares what every rank's worker then computes with.

    Args:
        chunks: this rank's part of the trained model.
        table: of all weights.
        engine: takes them.
        platform: of the weights.

    Attributes:
        own: cut parameters of which no worker holds more than its rank's trainer does. They are not gathered.
    """

    def __init__(
        self,
        chunks: Sequence[VisionLanguageModel],
        table: Sequence[Rule],
        engine: Engine,
        platform: Platform,
    ):
        self._chunks, self._table, self._engine, self._platform = chunks, table, engine, platform
        self._words = platform.words_at_a_time
        self._parts = engine.parts(hf_shapes(table))
        groups = chunks[0].groups
        self.own = self._held_by_trainer(groups.tp.rank(), groups.tp.size())

    def __call__(self, *, compare_all: bool = False) -> Exchange:
        """Bring the engine up to date; all ranks do it together.

        Args:
            compare_all: compare every element, and not only a sum over the bits of each tensor.

        Raises:
            StaleWeightsError: a tensor did not arrive as it is, with its name.
        """
        self._platform.synchronize()
        started, num_bytes, noting = time.monotonic(), 0, 0.0
        sent: dict[str, list[Tensor]] = {}

        def noted() -> Iterator[tuple[str, Tensor]]:
            nonlocal num_bytes, noting
            for name, tensor in to_hf(self._chunks, self._table, own=self.own):
                began = time.monotonic()
                wanted = [tensor[part.index].to(part.dtype) for part in self._parts[name]]
                num_bytes += sum(one.nbytes for one in wanted)
                sent[name] = [one.to("cpu", copy=True) if compare_all else bit_sum(one, self._words) for one in wanted]
                noting += time.monotonic() - began
                yield name, tensor

        self._engine.load(noted(), self._parts)
        self._platform.synchronize()
        loaded = time.monotonic()
        self._check(sent, compare_all)
        return Exchange(num_bytes, loaded - started - noting, time.monotonic() - loaded + noting)

    def _held_by_trainer(self, rank: int, ranks: int) -> set[str]:
        """Cut parameters of which no worker wants anything that its rank's trainer does not hold; all ranks ask."""
        cut = [rule for rule in self._table if rule.axis is not None]
        device = next(self._chunks[0].parameters()).device
        fits = torch.tensor([self._is_held(rule, rank, ranks) for rule in cut], dtype=torch.int, device=device)
        everywhere = state.least_of_all(fits).tolist()
        return {rule.megatron for rule, fit in zip(cut, everywhere, strict=True) if fit}

    def _is_held(self, rule: Rule, rank: int, ranks: int) -> bool:
        axis = rule.axis or 0
        for name, shape in zip(rule.hf, rule.shapes, strict=True):
            held = rule.span(shape[axis], rank, ranks)
            wanted = [part.index[axis] for part in self._parts[name]]
            if any(one.start < held.start or one.stop > held.stop for one in wanted if one.start < one.stop):
                return False
        return True

    def _check(self, sent: dict[str, list[Tensor]], compare_all: bool) -> None:
        faults = []
        for name, parts in self._parts.items():
            for part, wanted in zip(parts, sent[name], strict=True):
                held = part.read()
                if compare_all:
                    fault = _difference(wanted, held.cpu())
                else:
                    fault = "" if torch.equal(bit_sum(held, self._words), wanted) else "other bits"
                if fault:
                    place = "" if len(parts) == 1 or not part.multiplies else " as the output matrix"
                    faults.append(f"{name}{place}: {fault}")
        if faults:
            raise StaleWeightsError(
                f"the engine does not hold the trainer's weights in {len(faults)} tensors: {'; '.join(faults[:8])}"
            )


def bit_sum(tensor: Tensor, words_at_a_time: int = _ROW) -> Tensor:
    """Return a sum over a tensor's bits and places, modulo 2^64, that two exchanged elements change as well.

    Args:
        tensor: of any shape.
        words_at_a_time: words of 64 bits that are worked on at a time, one row at least; the sum does not depend on it.

    Returns:
        int64 scalar on the tensor's device.
    """
    device, per_word = tensor.device, 8 // tensor.element_size()
    total = torch.full((), tensor.numel(), dtype=torch.int64, device=device)
    flat, row = tensor.flatten(), _ROW * per_word
    rows_at_a_time = words_at_a_time // _ROW
    whole = flat.numel() // row * row if rows_at_a_time > 1 else 0
    if whole:
        for elements in flat[:whole].split(rows_at_a_time * row):
            rows = _mixed(elements).view(-1, _ROW).mul_(_factors(device)).sum(1)
            total = (torch.cat([total.view(1), rows]) * _turns(len(rows), device)).sum()
        flat = flat[whole:]
    if not len(flat):
        return total
    for elements in flat.split(row):
        if elements.numel() % per_word:
            elements = nn.functional.pad(elements, (0, -elements.numel() % per_word))
        mixed = _mixed(elements)
        total = total * _TURN + mixed.mul_(_factors(device)[: len(mixed)]).sum()
    return total


def _mixed(elements: Tensor) -> Tensor:
    """Return the words of elements, of which high bits count below as well, or their products would leave 64 bits."""
    # Minus zero is zero, as packed matrices give it back.
    words = (elements + 0).view(torch.int64)
    return (words >> 32).bitwise_xor_(words)


@functools.cache
def _factors(device: torch.device) -> Tensor:
    """Return an odd number for each place of a row, the same on all ranks."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**62), 2**62, (_ROW,), generator=generator).mul_(2).add_(1).to(device)


@functools.cache
def _turns(number: int, device: torch.device) -> Tensor:
    """Return the powers of _TURN that what came before and so many rows are multiplied by; the last row's is 1."""
    powers = [pow(_TURN, number - place, 2**64) for place in range(number + 1)]
    return torch.tensor([power - 2**64 if power >= 2**63 else power for power in powers], device=device)


def _difference(wanted: Tensor, held: Tensor) -> str:
    if wanted.shape != held.shape:
        return f"{list(held.shape)} where {list(wanted.shape)} was sent"
    unequal = wanted != held
    if not unequal.any():
        return ""
    largest = float((wanted.double() - held.double()).abs().max())
    return f"{int(unequal.sum())} of {unequal.numel()} elements differ, by up to {largest:.3g}"

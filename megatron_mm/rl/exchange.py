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
from megatron_mm.weights.mapping import Rule
from megatron_mm.weights.stream import to_hf

# Words of 64 bits that are summed at a time: half a megabyte, so that they stay in a cache.
_PIECE = 2**16
# What a piece's sum is multiplied by when the next one is added; any odd number does.
_TURN = 0x9E3779B97F4A7C15 - 2**64


class StaleWeightsError(RuntimeError):
    """The engine does not compute with the trainer's weights."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """What one exchange cost.

    Attributes:
        num_bytes: of what this rank's worker took.
        load_seconds: for gathering, and for the engine to take them.
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

    Attributes:
        own: cut parameters of which no worker holds more than its rank's trainer does. They are not gathered.
    """

    def __init__(self, chunks: Sequence[VisionLanguageModel], table: Sequence[Rule], engine: Engine):
        self._chunks, self._table, self._engine = chunks, table, engine
        shapes = {name: shape for rule in table for name, shape in zip(rule.hf, rule.shapes, strict=True)}
        self._parts = engine.parts(shapes)
        groups = chunks[0].groups
        self.own = self._held_by_trainer(groups.tp.rank(), groups.tp.size())

    def __call__(self, *, compare_all: bool = False) -> Exchange:
        """Bring the engine up to date; all ranks do it together.

        Args:
            compare_all: compare every element, and not only a sum over the bits of each tensor.

        Raises:
            StaleWeightsError: a tensor did not arrive as it is, with its name.
        """
        started, num_bytes, noting = time.monotonic(), 0, 0.0
        sent: dict[str, list[Tensor]] = {}

        def noted() -> Iterator[tuple[str, Tensor]]:
            nonlocal num_bytes, noting
            for name, tensor in to_hf(self._chunks, self._table, own=self.own):
                began = time.monotonic()
                wanted = [tensor[part.index].to(part.dtype) for part in self._parts[name]]
                num_bytes += sum(one.nbytes for one in wanted)
                sent[name] = (
                    [one.to("cpu", copy=True) for one in wanted] if compare_all else [bit_sum(one) for one in wanted]
                )
                noting += time.monotonic() - began
                yield name, tensor

        self._engine.load(noted(), self._parts)
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
                    fault = "" if torch.equal(bit_sum(held), wanted) else "other bits"
                if fault:
                    place = "" if len(parts) == 1 or not part.multiplies else " as the output matrix"
                    faults.append(f"{name}{place}: {fault}")
        if faults:
            raise StaleWeightsError(
                f"the engine does not hold the trainer's weights in {len(faults)} tensors: {'; '.join(faults[:8])}"
            )


def bit_sum(tensor: Tensor) -> Tensor:
    """A sum over a tensor's bits and places, modulo 2^64, that an exchange of two elements changes as well: int64."""
    factors, per_word = _factors(tensor.device), 8 // tensor.element_size()
    total = torch.full((), tensor.numel(), dtype=torch.int64, device=tensor.device)
    for elements in tensor.flatten().split(_PIECE * per_word):
        # Minus zero is zero, as packed matrices give it back.
        elements = elements + 0
        if elements.numel() % per_word:
            elements = nn.functional.pad(elements, (0, -elements.numel() % per_word))
        piece = elements.view(torch.int64)
        # High bits count below as well, or their products would leave the 64 bits.
        mixed = (piece >> 32).bitwise_xor_(piece).mul_(factors[: len(piece)])
        total = total * _TURN + mixed.sum()
    return total


@functools.cache
def _factors(device: torch.device) -> Tensor:
    """An odd number for each place of a piece, the same on all ranks."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**62), 2**62, (_PIECE,), generator=generator).mul_(2).add_(1).to(device)


def _difference(wanted: Tensor, held: Tensor) -> str:
    if wanted.shape != held.shape:
        return f"{list(held.shape)} where {list(wanted.shape)} was sent"
    unequal = wanted != held
    if not unequal.any():
        return ""
    largest = float((wanted.double() - held.double()).abs().max())
    return f"{int(unequal.sum())} of {unequal.numel()} elements differ, by up to {largest:.3g}"

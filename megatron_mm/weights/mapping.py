"""The pure rules between Hugging Face tensors and one Megatron-Core parameter.

A rule works on whole tensors and on what one tensor-parallel rank holds of them alike, because the cut goes through
every Hugging Face tensor of a rule in the same way: rank r of n holds the r-th n-th along `axis`. So a rank reads only
its parts, and parts of all ranks are joined after they have been taken apart. Every rule is exact: tensors are cut and
joined, never computed with.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Readable(Protocol):
    """A tensor, or one in a file that reads no more than it is asked for."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __getitem__(self, index: tuple[slice, ...], /) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Rule:
    """A parameter that equals one Hugging Face tensor.

    Attributes:
        megatron: the parameter's name in VisionLanguageModel, layers and experts numbered over the whole model.
        hf: names of the Hugging Face tensors it holds.
        shapes: of these tensors.
        axis: dimension cut over tensor-parallel ranks, of the parameter and of each Hugging Face tensor; None where
            every rank holds all of it. Which pipeline stage or expert-parallel rank holds it follows from the name.
    """

    megatron: str
    hf: tuple[str, ...]
    shapes: tuple[Shape, ...]
    axis: int | None = None

    def to_megatron(self, parts: Sequence[Tensor]) -> Tensor:
        """The parameter, or a rank's shard, from the tensors in the order of `hf`, or from the rank's parts of them."""
        (part,) = parts
        return part

    def to_hf(self, shard: Tensor) -> tuple[Tensor, ...]:
        """The way back, of a whole parameter or of a rank's shard."""
        return (shard,)

    def span(self, size: int, rank: int, ranks: int) -> slice:
        """What rank `rank` of `ranks` holds of a Hugging Face tensor's `size` along the axis."""
        return slice(size * rank // ranks, size * (rank + 1) // ranks)

    def shard(self, tensors: Sequence[Readable], rank: int, ranks: int) -> Tensor:
        """What tensor-parallel rank `rank` of `ranks` holds; no more than that is read."""
        return self.to_megatron([tensor[self.index(tensor.shape, rank, ranks)] for tensor in tensors])

    def index(self, shape: Sequence[int], rank: int, ranks: int) -> tuple[slice, ...]:
        """Where the part of rank `rank` of `ranks` lies in a Hugging Face tensor of this shape."""
        if self.axis is None:
            return (slice(None),)
        return (*(slice(None),) * self.axis, self.span(shape[self.axis], rank, ranks))

    def join(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The whole Hugging Face tensors from the shards of all tensor-parallel ranks."""
        if self.axis is None or len(shards) == 1:
            return self.to_hf(shards[0])
        parts = [self.to_hf(shard) for shard in shards]
        return tuple(torch.cat(of_ranks, self.axis) for of_ranks in zip(*parts, strict=True))

    def shard_shape(self, ranks: int) -> Shape:
        """Shape of what one tensor-parallel rank holds."""
        (shape,) = self.shapes
        return _cut(shape, self.axis, ranks)


@dataclass(frozen=True, slots=True)
class PatchConvolution(Rule):
    """A patch convolution's kernel [H, 3, p, p] held as the weight of a linear layer [H, 3 * p * p]."""

    def to_megatron(self, parts: Sequence[Tensor]) -> Tensor:
        (kernel,) = parts
        return kernel.flatten(1)

    def to_hf(self, shard: Tensor) -> tuple[Tensor, ...]:
        (shape,) = self.shapes
        return (shard.view(len(shard), *shape[1:]),)

    def shard_shape(self, ranks: int) -> Shape:
        assert self.axis is None, ranks
        ((out, *rest),) = self.shapes
        return (out, rest[0] * rest[1] * rest[2])


@dataclass(frozen=True, slots=True)
class FusedQkv(Rule):
    """Query, key and value (weight or bias) fused by query group: its queries, its key, its value."""

    head_dim: int = 0

    def to_megatron(self, parts: Sequence[Tensor]) -> Tensor:
        num_groups = len(parts[1]) // self.head_dim
        return torch.cat([part.unflatten(0, (num_groups, -1)) for part in parts], 1).flatten(0, 1)

    def to_hf(self, shard: Tensor) -> tuple[Tensor, ...]:
        queries_per_group = self.shapes[0][0] // self.shapes[1][0]
        grouped = shard.unflatten(0, (-1, (queries_per_group + 2) * self.head_dim))
        parts = grouped.split([queries_per_group * self.head_dim, self.head_dim, self.head_dim], 1)
        return tuple(part.flatten(0, 1) for part in parts)

    def shard_shape(self, ranks: int) -> Shape:
        rows = sum(shape[0] for shape in self.shapes)
        return _cut((rows, *self.shapes[0][1:]), self.axis, ranks)


@dataclass(frozen=True, slots=True)
class GatedMlp(Rule):
    """Gate and up projection stacked; where they are cut, every rank stacks its own share of each."""

    def to_megatron(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))

    def to_hf(self, shard: Tensor) -> tuple[Tensor, ...]:
        return shard.chunk(2)

    def shard_shape(self, ranks: int) -> Shape:
        rows, columns = self.shapes[0]
        return _cut((2 * rows, columns), self.axis, ranks)


@dataclass(frozen=True, slots=True)
class PaddedVocabulary(Rule):
    """A table [V, H] with rows of zeros behind it, so that it can be cut evenly."""

    padded: int = 0

    def span(self, size: int, rank: int, ranks: int) -> slice:
        each = self.padded // ranks
        return slice(min(rank * each, size), min((rank + 1) * each, size))

    def shard(self, tensors: Sequence[Readable], rank: int, ranks: int) -> Tensor:
        (table,) = tensors
        rows = table[(self.span(table.shape[0], rank, ranks),)]
        missing = self.padded // ranks - len(rows)
        return torch.cat([rows, rows.new_zeros(missing, rows.shape[1])]) if missing else rows

    def join(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        num_rows = self.shapes[0][0]
        if len(shards) == 1:
            return (shards[0][:num_rows],)
        return (torch.cat(list(shards))[:num_rows],)

    def shard_shape(self, ranks: int) -> Shape:
        return (self.padded // ranks, self.shapes[0][1])


def hf_shapes(table: Iterable[Rule]) -> dict[str, Shape]:
    """Return the shape of each Hugging Face tensor of a table, by its name, in the table's order."""
    return {name: shape for rule in table for name, shape in zip(rule.hf, rule.shapes, strict=True)}


def _cut(shape: Shape, axis: int | None, ranks: int) -> Shape:
    if axis is None:
        return shape
    assert shape[axis] % ranks == 0, f"{shape} cannot be cut into {ranks} along {axis}"
    return (*shape[:axis], shape[axis] // ranks, *shape[axis + 1 :])

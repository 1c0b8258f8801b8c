"""The pure rules between Hugging Face tensors and one whole Megatron-Core parameter, and between that and its shards.

Every rule is exact: tensors are cut and joined, never computed with.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rule:
    """A parameter that equals one Hugging Face tensor.

    Attributes:
        megatron: the parameter's name in VisionLanguageModel, layers numbered over the whole model.
        hf: names of the Hugging Face tensors it holds.
        axis: dimension cut over tensor-parallel ranks, None where every rank holds all of it.
    """

    megatron: str
    hf: tuple[str, ...]
    axis: int | None = None

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        """The whole parameter."""
        (tensor,) = tensors
        return tensor

    def to_hf(self, whole: Tensor) -> tuple[Tensor, ...]:
        """The tensors in the order of `hf`."""
        return (whole,)

    def shard(self, whole: Tensor, rank: int, ranks: int) -> Tensor:
        """What tensor-parallel rank `rank` of `ranks` holds."""
        return whole if self.axis is None else whole.chunk(ranks, self.axis)[rank]

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        """The whole parameter from the shards of all ranks."""
        return shards[0] if self.axis is None else torch.cat(list(shards), self.axis)


@dataclass(frozen=True, slots=True)
class PatchConvolution(Rule):
    """A patch convolution's kernel [H, 3, p, p] held as the weight of a linear layer [H, 3 * p * p]."""

    patch_size: int = 0

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        (kernel,) = tensors
        return kernel.flatten(1)

    def to_hf(self, whole: Tensor) -> tuple[Tensor, ...]:
        return (whole.view(whole.shape[0], 3, self.patch_size, self.patch_size),)


@dataclass(frozen=True, slots=True)
class FusedQkv(Rule):
    """Query, key and value (weight or bias) fused by query group: its queries, its key, its value."""

    num_groups: int = 0
    head_dim: int = 0

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        rest = tensors[0].shape[1:]
        grouped = [tensor.reshape(self.num_groups, -1, *rest) for tensor in tensors]
        return torch.cat(grouped, 1).flatten(0, 1)

    def to_hf(self, whole: Tensor) -> tuple[Tensor, ...]:
        grouped = whole.view(self.num_groups, -1, *whole.shape[1:])
        queries = grouped.shape[1] - 2 * self.head_dim
        parts = grouped.split([queries, self.head_dim, self.head_dim], 1)
        return tuple(part.flatten(0, 1) for part in parts)


@dataclass(frozen=True, slots=True)
class GatedMlp(Rule):
    """Gate and up projection stacked; where they are cut, every rank stacks its own share of each."""

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors))

    def to_hf(self, whole: Tensor) -> tuple[Tensor, ...]:
        return whole.chunk(2)

    def shard(self, whole: Tensor, rank: int, ranks: int) -> Tensor:
        if self.axis is None:
            return whole
        return torch.cat([half.chunk(ranks)[rank] for half in whole.chunk(2)])

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        if self.axis is None:
            return shards[0]
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([torch.cat([half[side] for half in halves]) for side in range(2)])

"""Angles kept for each token rotate packs, and context-parallel parts of them, as Megatron-Core's own way does."""

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import (
    _apply_rotary_pos_emb_bshd,
    _apply_rotary_pos_emb_thd,
    get_pos_emb_on_this_cp_rank,
)
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_mm.models.packing import positions_in_samples, zigzag
from megatron_mm.models.rotary import rotary_angles

HEADS, DIM = 3, 16


@dataclass(frozen=True)
class _Group:
    """A process group as far as rotary embedding asks."""

    number: int
    ranks: int

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.ranks


def _rotary() -> tuple[RotaryEmbedding, torch.Tensor]:
    """Megatron-Core's embedding, and its table of angles for 64 positions."""
    group: Any = _Group(0, 1)
    rotary = RotaryEmbedding(DIM, 1.0, rotary_base=1_000_000, use_cpu_initialization=True, cp_group=group)
    frequencies = rotary.get_freqs_non_repeated(64)
    return rotary, torch.cat((frequencies, frequencies), -1)[:, None, None, :]


def _rotated(tokens: torch.Tensor, starts: list[int], part: torch.Tensor | None) -> torch.Tensor:
    """Tokens [S, B, heads, dim] by the formula for one sequence and our angles."""
    positions = positions_in_samples(starts)
    positions = positions if part is None else positions[part]
    return _apply_rotary_pos_emb_bshd(tokens, rotary_angles(positions, _rotary()[0].inv_freq))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(24,), (8, 40, 16), (32, 8, 8, 64)])
def test_packs(lengths: tuple[int, ...], ranks: int, dtype: torch.dtype) -> None:
    starts = [0, *itertools.accumulate(lengths)]
    table = _rotary()[1][: max(lengths)]
    for rank in range(ranks):
        part = zigzag(starts, rank, ranks)
        tokens = torch.randn(len(part), HEADS, DIM, generator=torch.Generator().manual_seed(rank)).to(dtype)
        group: Any = _Group(rank, ranks)
        theirs = _apply_rotary_pos_emb_thd(tokens, torch.tensor(starts).int(), table, cp_group=group)
        ours = _rotated(tokens[:, None], starts, part)[:, 0]
        assert torch.equal(ours, theirs)
        assert not torch.equal(ours, tokens)


@pytest.mark.parametrize("ranks", [1, 2])
def test_padded_samples(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if ranks > 1:  # it locks an index's pages
        monkeypatch.setattr(torch.Tensor, "cuda", lambda self, **_: self)
        tensor = torch.tensor
        monkeypatch.setattr(torch, "tensor", lambda *values, **_: tensor(*values))
    for rank in range(ranks):
        part = zigzag([0, 32], rank, ranks) if ranks > 1 else None
        tokens = torch.randn(32 // ranks, 5, HEADS, DIM)
        table, group = _rotary()[1][:32], _Group(rank, ranks)
        if ranks > 1:
            table = get_pos_emb_on_this_cp_rank(table, 0, group)  # pyright: ignore[reportArgumentType]
        assert torch.equal(_rotated(tokens, [0, 32], part), _apply_rotary_pos_emb_bshd(tokens, table))

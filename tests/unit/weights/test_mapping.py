"""The pure rules: exact both ways at any degree, right by an independent computation, and no more read than needed."""

from typing import Any

import pytest
import torch

from megatron_mm.weights.mapping import FusedQkv, GatedMlp, PaddedVocabulary, PatchConvolution, Rule

HIDDEN, HEADS, GROUPS, DIM = 12, 8, 4, 3


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _case(kind: type[Rule], tensors: list[torch.Tensor], axis: int | None = None, **more: Any):
    names = tuple("abc"[: len(tensors)])
    return kind("m", names, tuple(tuple(tensor.shape) for tensor in tensors), axis, **more), tensors


CASES = {
    "copy": _case(Rule, [_random(5, 7)]),
    "columns": _case(Rule, [_random(8, 3)], 0),
    "rows": _case(Rule, [_random(3, 8)], 1),
    "patch convolution": _case(PatchConvolution, [_random(6, 3, 2, 2)]),
    "qkv weight": _case(
        FusedQkv,
        [_random(HEADS * DIM, HIDDEN), _random(GROUPS * DIM, HIDDEN), _random(GROUPS * DIM, HIDDEN) + 1],
        0,
        head_dim=DIM,
    ),
    "qkv bias": _case(
        FusedQkv, [_random(HEADS * DIM), _random(GROUPS * DIM), _random(GROUPS * DIM) + 1], 0, head_dim=DIM
    ),
    "gated": _case(GatedMlp, [_random(8, 5), _random(8, 5) + 1], 0),
    "vocabulary": _case(PaddedVocabulary, [_random(9, 5)], 0, padded=16),
    "vocabulary without padding": _case(PaddedVocabulary, [_random(16, 5)], 0, padded=16),
}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_cut_and_joined_again_is_exact(case: str, ranks: int) -> None:
    rule, tensors = CASES[case]
    shards = [rule.shard(tensors, rank, ranks) for rank in range(ranks)]
    assert {tuple(shard.shape) for shard in shards} == {rule.shard_shape(ranks)}
    for back, original in zip(rule.join(shards), tensors, strict=True):
        assert torch.equal(back, original)


class _Watched:
    """A tensor that counts what is read of it."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self.num_read = tensor, 0
        self.shape, self.dtype = tensor.shape, tensor.dtype

    def __getitem__(self, index: tuple[slice, ...]) -> torch.Tensor:
        part = self.tensor[index]
        self.num_read += part.numel()
        return part


@pytest.mark.parametrize("case", CASES)
def test_a_rank_reads_its_own_part_only(case: str) -> None:
    rule, tensors = CASES[case]
    for rank in range(4):
        watched = [_Watched(tensor) for tensor in tensors]
        shard = rule.shard(watched, rank, 4)
        assert sum(each.num_read for each in watched) <= shard.numel()


def test_a_rank_gets_whole_query_groups_in_megatrons_order() -> None:
    rule, (query, key, value) = CASES["qkv weight"]
    shard = rule.shard((query, key, value), 1, 2)
    heads_per_group = HEADS // GROUPS
    expected = []
    for group in (2, 3):
        expected.append(query[group * heads_per_group * DIM : (group + 1) * heads_per_group * DIM])
        expected += [key[group * DIM : (group + 1) * DIM], value[group * DIM : (group + 1) * DIM]]
    assert torch.equal(shard, torch.cat(expected))


def test_a_rank_gets_its_share_of_gate_and_of_up() -> None:
    rule, (gate, up) = CASES["gated"]
    assert torch.equal(rule.shard((gate, up), 1, 2), torch.cat([gate[4:], up[4:]]))


def test_rows_behind_the_vocabulary_are_zero() -> None:
    rule, (table,) = CASES["vocabulary"]
    assert torch.equal(rule.shard((table,), 0, 2), table[:8])
    assert torch.equal(rule.shard((table,), 1, 2), torch.cat([table[8:], torch.zeros(7, 5)]))

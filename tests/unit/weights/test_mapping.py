"""The pure rules: exact both ways at any degree, and right by an independent computation."""

import pytest
import torch

from megatron_mm.weights.mapping import FusedQkv, GatedMlp, PatchConvolution, Rule

HIDDEN, HEADS, GROUPS, DIM = 12, 8, 4, 3


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


CASES = {
    "copy": (Rule("m", ("a",)), [_random(5, 7)]),
    "columns": (Rule("m", ("a",), 0), [_random(8, 3)]),
    "rows": (Rule("m", ("a",), 1), [_random(3, 8)]),
    "patch convolution": (PatchConvolution("m", ("a",), patch_size=2), [_random(6, 3, 2, 2)]),
    "qkv weight": (
        FusedQkv("m", ("q", "k", "v"), 0, GROUPS, DIM),
        [_random(HEADS * DIM, HIDDEN), _random(GROUPS * DIM, HIDDEN), _random(GROUPS * DIM, HIDDEN) + 1],
    ),
    "qkv bias": (
        FusedQkv("m", ("q", "k", "v"), 0, GROUPS, DIM),
        [_random(HEADS * DIM), _random(GROUPS * DIM), _random(GROUPS * DIM) + 1],
    ),
    "gated": (GatedMlp("m", ("gate", "up"), 0), [_random(8, 5), _random(8, 5) + 1]),
}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_cut_and_joined_again_is_exact(case: str, ranks: int) -> None:
    rule, tensors = CASES[case]
    whole = rule.to_megatron(tensors)
    shards = [rule.shard(whole, rank, ranks) for rank in range(ranks)]
    assert torch.equal(rule.join(shards), whole)
    for back, original in zip(rule.to_hf(rule.join(shards)), tensors, strict=True):
        assert torch.equal(back, original)


def test_a_rank_gets_whole_query_groups_in_megatrons_order() -> None:
    rule, (query, key, value) = CASES["qkv weight"]
    shard = rule.shard(rule.to_megatron((query, key, value)), 1, 2)
    heads_per_group = HEADS // GROUPS
    expected = []
    for group in (2, 3):
        expected.append(query[group * heads_per_group * DIM : (group + 1) * heads_per_group * DIM])
        expected += [key[group * DIM : (group + 1) * DIM], value[group * DIM : (group + 1) * DIM]]
    assert torch.equal(shard, torch.cat(expected))


def test_a_rank_gets_its_share_of_gate_and_of_up() -> None:
    rule, (gate, up) = CASES["gated"]
    shard = rule.shard(rule.to_megatron((gate, up)), 1, 2)
    assert torch.equal(shard, torch.cat([gate[4:], up[4:]]))

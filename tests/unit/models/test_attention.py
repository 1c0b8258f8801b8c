"""Attention over padded samples and packs, short and long, against scores held whole."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer import TransformerConfig

from megatron_mm.models.attention import CoreAttention, Norm
from megatron_mm.models.packing import packed_sequence, zigzag

HEADS, KV_HEADS, DIM = 4, 2, 8


def _attention(*, causal: bool = True) -> CoreAttention:
    """A CoreAttention without a process group."""
    attention = CoreAttention.__new__(CoreAttention)
    torch.nn.Module.__init__(attention)
    attention.causal, attention.scale, attention.context = causal, 1 / math.sqrt(DIM), None
    return attention


Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _inputs(*shape: int) -> Inputs:
    """Queries, keys and values [*shape, heads, DIM]."""
    generator = torch.Generator().manual_seed(sum(shape))

    def random(heads: int) -> torch.Tensor:
        return torch.randn(*shape, heads, DIM, generator=generator, requires_grad=True)

    return random(HEADS), random(KV_HEADS), random(KV_HEADS)


def _dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attention [S, n, d] of one sequence under a mask [S, S]."""
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (key, value))
    scores = torch.einsum("qnd,knd->nqk", query, key) / math.sqrt(DIM)
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return torch.einsum("nqk,knd->qnd", weights, value)


def _assert_equal(ours: torch.Tensor, theirs: torch.Tensor, inputs: Inputs) -> None:
    assert torch.allclose(ours, theirs, atol=1e-5)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0))
    our_grads = torch.autograd.grad((ours * weights).sum(), inputs)
    their_grads = torch.autograd.grad((theirs * weights).sum(), inputs)
    for ours_, theirs_ in zip(our_grads, their_grads, strict=True):
        assert torch.allclose(ours_, theirs_, atol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [7, 256, 300])
def test_padded_samples(length: int, causal: bool) -> None:
    inputs = _inputs(length, 3)
    ours = _attention(causal=causal)(*inputs, None)
    mask = torch.ones(length, length, dtype=torch.bool)
    mask = mask.tril() if causal else mask
    query, key, value = inputs
    theirs = torch.stack([_dense(query[:, i], key[:, i], value[:, i], mask) for i in range(3)], 1)
    _assert_equal(ours, theirs.flatten(2), inputs)


@pytest.mark.parametrize("lengths", [(5,), (3, 1, 8), (300, 20, 257, 2)])
def test_packs(lengths: tuple[int, ...]) -> None:
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    inputs = _inputs(int(starts[-1]))
    rows = (tensor[:, None] for tensor in inputs)
    ours = _attention()(*rows, None, packed_seq_params=packed_sequence(starts, starts.device))[:, 0]
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (sample[:, None] == sample).tril()
    _assert_equal(ours, _dense(*inputs, mask).flatten(1), inputs)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(4, 8), (100, 400), (2100, 2500)])
def test_queries_in_the_middle_of_a_sample(num_queries: int, num_keys: int) -> None:
    inputs = _inputs(num_keys)
    whole = _dense(*inputs, torch.ones(num_keys, num_keys, dtype=torch.bool).tril())
    ours = _attention()._attend(inputs[0][-num_queries:], *inputs[1:])
    _assert_equal(ours, whole[-num_queries:], inputs)


def test_a_long_pack_holds_no_scores() -> None:
    """Half a gigabyte of scores would be held for one head of this pack; less than a tenth of it is."""
    starts = torch.tensor([0, 6000, 12000]).int()
    inputs = _inputs(12000)
    held = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _attention()(
            *(tensor[:, None] for tensor in inputs), None, packed_seq_params=packed_sequence(starts, starts.device)
        )
    assert held
    assert sum(held) < 0.1 * 12000**2 * 4


@given(
    pieces=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    ranks=st.integers(1, 4),
)
@settings(max_examples=50)
def test_zigzag_shares_out_every_token_and_as_many_pairs(pieces: list[int], ranks: int) -> None:
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + piece * 2 * ranks)
    shares = [zigzag(starts, rank, ranks) for rank in range(ranks)]
    assert sorted(torch.cat(shares).tolist()) == list(range(starts[-1]))
    position = torch.cat([torch.arange(end - start) for start, end in itertools.pairwise(starts)])
    seen = [int((position[share] + 1).sum()) for share in shares]
    assert max(seen) == min(seen)


def test_sdpa_groups_heads_as_we_do() -> None:
    query, key, value = (x.transpose(0, 1)[None] for x in _inputs(300))
    grouped = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (key, value))
    assert torch.allclose(grouped, F.scaled_dot_product_attention(query, key, value), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learns", [True, False])
def test_rms_norm_is_torchs(dtype: torch.dtype, *, learns: bool) -> None:
    config = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=1, normalization="RMSNorm", params_dtype=dtype
    )
    norm, random = Norm(config, 16), torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.normal_(generator=random)
    norm.requires_grad_(learns)
    values, incoming = (torch.randn(5, 3, 16, generator=random).to(dtype) for _ in range(2))
    ours, expected = (values.clone().requires_grad_() for _ in range(2))
    weight = norm.weight.detach().clone().requires_grad_()
    out, theirs = norm(ours), F.rms_norm(expected, (16,), weight, norm.eps)
    torch.testing.assert_close(out, theirs)
    out.backward(incoming)
    theirs.backward(incoming)
    torch.testing.assert_close(ours.grad, expected.grad)
    if learns:
        torch.testing.assert_close(norm.weight.grad, weight.grad)

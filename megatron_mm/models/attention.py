"""Norm and core attention of the local backend, where Megatron-Core's own fall short.

Megatron-Core's WrappedTorchNorm refuses sequence parallelism, and its DotProductAttention holds S x S scores; torch's
scaled_dot_product_attention does not. Nor does it know packs or context parallelism.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_mm.models.packing import Pack, zigzag

# Tokens up to which the scores are held: torch's fused CPU kernel starts anew for each sample and head. In bf16 it
# takes 1.5 (256 tokens) to 4 times (64) as long as three matrix products, in fp32 1.2 times at 64 and no longer beyond.
SHORT_SEQUENCE = {torch.bfloat16: 256, torch.float32: 64}
# Rows of a mask that is held at once, where a context-parallel rank's queries stand in the middle of a sample.
MASKED_QUERIES = 1024


class Norm(torch.nn.Module):
    """RMSNorm or LayerNorm over the last dimension, as config.normalization says.

    Its parameters carry `sequence_parallel`: with sequence parallelism each rank sees a part of the tokens, and
    Megatron-Core sums the gradients of exactly the parameters so marked over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.eps = eps
        self.rms = config.normalization == "RMSNorm"
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = None if self.rms else torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010 (unknown to the type)

    def forward(self, x: Tensor) -> Tensor:
        if self.rms:
            return _RMSNorm.apply(x, self.weight, self.eps)  # pyright: ignore[reportReturnType]
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


class _RMSNorm(torch.autograd.Function):
    """RMSNorm (arXiv 1910.07467) in fp32; torch's is not fused on a CPU and keeps two copies of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        weight_grad, normed, grad = None, x.float() * scale, grad.float()
        product = grad * normed
        if ctx.needs_input_grad[1]:
            weight_grad = product.flatten(0, -2).sum(0).to(weight.dtype)
        # With y = x / rms(x): dL/dx = (g w - y mean(g w y)) / rms(x).
        mean = product.mul_(weight).mean(-1, keepdim=True)
        slope = torch.mul(grad, weight, out=product)
        return slope.addcmul_(normed, mean, value=-1).mul_(scale).to(x.dtype), weight_grad, None


class CoreAttention(MegatronModule):
    """Attention of one rank's heads, over padded samples or a pack, over the whole sequence or a part of it.

    Queries [S, B, heads, dim], keys and values [S, B, kv heads, dim] -> [S, B, heads * dim].

    Padded samples: they are padded on the right, so a causal mask is all that language needs, and none is all that the
    ViT needs.

    Packs: B is 1, and a token sees its own sample.

    With context parallelism, S is this rank's part in zigzag order (models/packing.py); keys and values are gathered.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ):
        del layer_number
        super().__init__(config=config)
        assert attention_type == "self"
        assert config.attention_dropout == 0.0
        assert config.kv_channels is not None
        self.causal = attn_mask_type is AttnMaskType.causal
        self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)
        self.context: Any = None
        if config.context_parallel_size > 1:
            assert pg_collection is not None
            assert self.causal
            self.context = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Pack | None = None,
    ) -> Tensor:
        assert attention_mask is None
        assert attention_bias is None
        assert attn_mask_type is None or (attn_mask_type is AttnMaskType.causal) == self.causal
        # [S, B, n, d] -> [S, B * n, d]: samples padded to one length are so many more heads.
        num_samples, ranks = query.shape[1], 1 if self.context is None else self.context.size()
        starts = [0, query.shape[0] * ranks] if packed_seq_params is None else packed_seq_params.starts
        out = self._over(query.flatten(1, 2), key.flatten(1, 2), value.flatten(1, 2), starts)
        return out.unflatten(1, (num_samples, -1)).flatten(2)

    def _over(self, query: Tensor, key: Tensor, value: Tensor, starts: Sequence[int]) -> Tensor:
        """[S, n, d], [S, k, d], [S, k, d] -> [S, n, d] of a row of samples, of which this rank may have a part."""
        if self.context is None:
            return self._per_sample(query, key, value, starts)
        return self._across_ranks(query, key, value, starts)

    def _per_sample(self, query: Tensor, key: Tensor, value: Tensor, starts: Sequence[int]) -> Tensor:
        """[S, n, d], [S, k, d], [S, k, d] -> [S, n, d], each sample by itself."""
        if len(starts) == 2:  # nothing to cut
            return self._attend(query, key, value)
        lengths = [end - start for start, end in itertools.pairwise(starts)]
        pieces = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
        return torch.cat([self._attend(*piece) for piece in pieces])

    def _across_ranks(self, query: Tensor, key: Tensor, value: Tensor, starts: Sequence[int]) -> Tensor:
        """The same where each rank has some pieces of each sample; the gradients of keys and values are summed."""
        rank, ranks = self.context.rank(), self.context.size()
        gathered = gather_from_sequence_parallel_region(torch.cat([key, value], 1), group=self.context)
        key, value = gathered[_natural_order(tuple(starts), ranks)].chunk(2, 1)
        out, done = [], 0
        for start, end in itertools.pairwise(starts):
            size = (end - start) // (2 * ranks)
            for piece in (rank, 2 * ranks - 1 - rank):
                seen = slice(start, start + (piece + 1) * size)
                out.append(self._attend(query[done : done + size], key[seen], value[seen]))
                done += size
        return torch.cat(out)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[Q, n, d], [K, k, d], [K, k, d] -> [Q, n, d]; under a causal mask the queries are the last Q of K tokens."""
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))  # [n, Q, d], [k, K, d]
        num_queries, num_keys = query.shape[1], key.shape[1]
        if max(num_queries, num_keys) <= SHORT_SEQUENCE[query.dtype]:
            out = _attention_with_scores(query, key, value, self.scale, causal=self.causal)
        elif num_queries == num_keys or not self.causal:
            out = _fused_attention(query, key, value, self.scale, causal=self.causal)
        else:
            blocks = query.split(MASKED_QUERIES, 1)
            ends = itertools.accumulate((block.shape[1] for block in blocks), initial=num_keys - num_queries)
            next(ends)
            out = torch.cat(
                [
                    _fused_attention(block, key[:, :end], value[:, :end], self.scale, mask=_mask(block.shape[1], end))
                    for block, end in zip(blocks, ends, strict=True)
                ],
                1,
            )
        return out.transpose(0, 1)


@functools.lru_cache(maxsize=16)
def _natural_order(starts: tuple[int, ...], ranks: int) -> Tensor:
    """int64 [S]: where each token of the sequence stands among the gathered parts; the same in every layer."""
    return torch.cat([zigzag(starts, rank, ranks) for rank in range(ranks)]).argsort()


def _mask(num_queries: int, num_keys: int) -> Tensor:
    """bool [Q, K]: the queries are the last of the keys' tokens and see themselves and what is before them."""
    return torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    """torch's attention over [n, Q, d] and [k, K, d], keys and values shared by their group of queries."""
    grouped = query.shape[0] != key.shape[0]
    return F.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )[0]


def _attention_with_scores(query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool) -> Tensor:
    """softmax(Q K^T * scale) V over [n, Q, d] and [k, K, d]."""
    num_heads, num_queries, _ = query.shape
    groups, num_keys, _ = key.shape
    # The queries that share a key stand below each other instead of the key being repeated.
    query = query.reshape(groups, -1, query.shape[-1])
    bias = (
        _causal_bias(num_heads // groups, num_queries, num_keys, query.dtype, query.device)
        if causal
        else query[:, :, :1]
    )
    scores = torch.baddbmm(bias, query, key.transpose(1, 2), beta=int(causal), alpha=scale)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).view(num_heads, num_queries, -1)


@functools.lru_cache(maxsize=256)
def _causal_bias(repeats: int, num_queries: int, num_keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[repeats * Q, K]: 0 where a query sees a key, minus infinity elsewhere."""
    bias = torch.full((num_queries, num_keys), -math.inf, dtype=dtype, device=device)
    return bias.triu(1 + num_keys - num_queries).repeat(repeats, 1)

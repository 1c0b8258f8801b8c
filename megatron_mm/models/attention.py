"""Norm and core attention of the local backend, where Megatron-Core's own fall short.

Megatron-Core's WrappedTorchNorm refuses sequence parallelism, and its DotProductAttention holds S x S scores; torch's
scaled_dot_product_attention does not.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

# Up to here the scores are held: torch's fused CPU kernel starts anew for each sample and head, and its forward and
# backward take 1.5 (S 256) to 6 times (S 88, batch 32) as long as three matrix products; beyond, it wins.
SHORT_SEQUENCE = 256


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
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


class CoreAttention(MegatronModule):
    """Attention over queries [S, B, heads, dim] and keys, values [S, B, kv heads, dim] -> [S, B, heads * dim].

    Samples are padded on the right, so a causal mask is all that language needs, and none is all that the ViT needs.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ):
        del layer_number
        super().__init__(config=config)
        assert attention_type == "self"
        assert config.attention_dropout == 0.0
        assert config.kv_channels is not None
        self.causal = attn_mask_type is AttnMaskType.causal
        self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        assert attention_mask is None
        assert attention_bias is None
        assert packed_seq_params is None
        assert attn_mask_type is None or (attn_mask_type is AttnMaskType.causal) == self.causal
        # [S, B, n, d] -> [B, n, S, d]
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if query.shape[2] <= SHORT_SEQUENCE:
            out = _attention_with_scores(query, key, value, self.scale, causal=self.causal)
        else:
            out = F.scaled_dot_product_attention(
                query, key, value, is_causal=self.causal, scale=self.scale, enable_gqa=query.shape[1] != key.shape[1]
            )
        return out.permute(2, 0, 1, 3).flatten(2)


def _attention_with_scores(query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool) -> Tensor:
    """softmax(Q K^T * scale) V over [B, n, S, d], keys and values repeated for their group of queries."""
    queries_per_key = query.shape[1] // key.shape[1]
    if queries_per_key > 1:
        key, value = (x.repeat_interleave(queries_per_key, 1) for x in (key, value))
    scores = (query * scale) @ key.transpose(-1, -2)
    if causal:
        scores = scores + torch.full_like(scores[0, 0], -math.inf).triu(1)
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value

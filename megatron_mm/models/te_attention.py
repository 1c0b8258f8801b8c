"""Transformer Engine's attention, for packs in the shape that Megatron-Core's layers give them (models/packing.py).

Importable only where Transformer Engine is installed.
"""

from dataclasses import replace
from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from torch import Tensor

from megatron_mm.models.packing import Pack


class PackedTEAttention(TEDotProductAttention):
    """Queries [S, B, heads, dim], keys and values [S, B, kv heads, dim] -> [S, B, heads * dim]; of packs B is 1."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        packed_seq_params: Pack | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if packed_seq_params is None:
            return super().forward(query, key, value, *args, **kwargs)
        query, key, value = (tensor.squeeze(1) for tensor in (query, key, value))
        pack = replace(packed_seq_params, qkv_format="thd")
        out = super().forward(query, key, value, *args, packed_seq_params=pack, **kwargs)
        return out.reshape(len(out), 1, -1)

"""What Transformer Engine's attention is given of packs and of padded samples.

Its kernels need a GPU, so its attention is replaced by a function that notes what it gets.
"""

import inspect
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_mm.models.megatron_config import language_config
from megatron_mm.models.packing import packed_sequence
from megatron_mm.models.specs import parts
from megatron_mm.parallel import state
from tests.gpu_contract.gpu_stand_in import TransformerEnginePlatform, seen_gpu
from tests.ranks import run_on_ranks
from tests.tiny import tiny_config

pytestmark = pytest.mark.gpu_contract

STARTS = (0, 3, 10)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Of one call with a pack, and one with two padded samples."""
    return run_on_ranks(_found, 1)[0]


def _found() -> dict[str, Any]:
    config, platform = tiny_config(precision="bf16"), TransformerEnginePlatform()
    with state.process_group(platform), state.model_parallel(config.parallel, seed=0) as groups, seen_gpu():
        transformer = language_config(config, platform)
        attention: Any = parts("te").core_attention(
            transformer, 1, AttnMaskType.causal, "self", pg_collection=groups, cp_comm_type=None
        )
        asked: list[dict[str, Any]] = []
        _replace_kernel(asked)
        language = config.model.language
        heads, kv_heads, dim = language.num_heads, language.num_kv_heads, language.head_dim
        torch.manual_seed(0)
        pack = packed_sequence(torch.tensor(STARTS, dtype=torch.int32), torch.device("cpu"))
        outs = []
        for length, samples, packing in ((STARTS[-1], 1, pack), (4, 2, None)):
            query = torch.randn(length, samples, heads, dim)
            key, value = torch.randn(2, length, samples, kv_heads, dim)
            out = attention(query, key, value, None, AttnMaskType.causal, packed_seq_params=packing)
            outs.append((tuple(out.shape), (length, samples, heads * dim)))
        return {"asked": asked, "shapes": outs, "heads": (heads, kv_heads, dim)}


def _replace_kernel(asked: list[dict[str, Any]]) -> None:
    """Have Transformer Engine's attention note what it is given, if its own signature takes it, and answer in shape."""
    # Here, since the other tests are collected where there is no Transformer Engine.
    from transformer_engine.pytorch import DotProductAttention  # pyright: ignore[reportMissingImports]

    signature = inspect.signature(DotProductAttention.forward)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        given = signature.bind(self, *args, **kwargs).arguments
        query = given["query_layer"]
        shapes = {name: tuple(given[f"{name}_layer"].shape) for name in ("query", "key", "value")}
        cu_seqlens = given.get("cu_seqlens_q")
        asked.append(
            {
                **shapes,
                "format": given.get("qkv_format"),
                "mask": given.get("attn_mask_type"),
                "cu_seqlens": None if cu_seqlens is None else (cu_seqlens.tolist(), str(cu_seqlens.dtype)),
                "longest": given.get("max_seqlen_q"),
            }
        )
        return query.flatten(-2)

    DotProductAttention.forward = forward


def test_a_pack_is_given_as_one(found: dict[str, Any]) -> None:
    (pack, _), (heads, kv_heads, dim) = found["asked"], found["heads"]
    assert pack == {
        "query": (STARTS[-1], heads, dim),
        "key": (STARTS[-1], kv_heads, dim),
        "value": (STARTS[-1], kv_heads, dim),
        "format": "thd",
        "mask": "padding_causal",
        "cu_seqlens": (list(STARTS), "torch.int32"),
        "longest": 7,
    }


def test_padded_samples_are_given_side_by_side(found: dict[str, Any]) -> None:
    (_, padded), (heads, kv_heads, dim) = found["asked"], found["heads"]
    assert (padded["query"], padded["key"]) == ((4, 2, heads, dim), (4, 2, kv_heads, dim))
    assert (padded["mask"], padded["cu_seqlens"]) == ("causal", None)


def test_layers_get_back_what_they_gave(found: dict[str, Any]) -> None:
    assert [out for out, _ in found["shapes"]] == [expected for _, expected in found["shapes"]]

"""Our config -> Megatron-Core's TransformerConfig. Nobody else builds one, and no two share one."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import init_method_normal

from megatron_mm.config.layout import pipeline_split
from megatron_mm.config.schema import RunConfig
from megatron_mm.parallel.platform import Platform

_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def language_config(config: RunConfig, platform: Platform) -> TransformerConfig:
    """Qwen3: RMSNorm, grouped queries with QK-norm, SwiGLU, no biases."""
    language, parallel = config.model.language, config.parallel
    return TransformerConfig(
        num_layers=language.num_layers,
        hidden_size=language.hidden_size,
        num_attention_heads=language.num_heads,
        num_query_groups=language.num_kv_heads,
        kv_channels=language.head_dim,
        ffn_hidden_size=language.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=language.norm_eps,
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        # Whosever module the layers name (models/specs.py): the local backend has its own.
        use_te_activation_func=platform.layer_backend == "local",
        add_bias_linear=False,
        **_initialisation(language.init_std),
        sequence_parallel=parallel.sequence,
        context_parallel_size=parallel.context,
        calculate_per_token_loss=True,
        **_experts(config),
        **_pipeline(config),
        **_shared(config, platform, parallel.tensor),
        **platform.language_settings(),
        **_fp8(config, "language"),
    )


def _experts(config: RunConfig) -> dict[str, Any]:
    experts = config.model.language.experts
    # The only dispatcher that goes with sequences of any length through a pipeline, dense models included.
    dispatcher = {"moe_token_dispatcher_type": "alltoall"}
    if experts is None:
        return dispatcher
    return {
        **dispatcher,
        "num_moe_experts": experts.num_experts,
        "moe_router_topk": experts.experts_per_token,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "expert_model_parallel_size": config.parallel.expert,
        "expert_tensor_parallel_size": 1,
        # Softmax over the chosen experts' logits: Qwen3-MoE's norm_topk_prob.
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": False,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": False,
    }


def _pipeline(config: RunConfig) -> dict[str, Any]:
    parallel = config.parallel
    if parallel.pipeline == 1:
        return {}
    layout = [["decoder"] * num_layers for num_layers in pipeline_split(config)]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return {
        "pipeline_model_parallel_size": parallel.pipeline,
        "pipeline_model_parallel_layout": layout,
        "pipeline_dtype": DTYPES[config.precision],
        # Micro-batches are as long as their samples, so stages tell each other the shape.
        "variable_seq_lengths": True,
        # Interleaved over two stages, the batched form pairs up the wrong sends and receives: no error, wrong losses.
        "overlap_p2p_comm": parallel.virtual_pipeline > 1,
        "batch_p2p_comm": parallel.virtual_pipeline == 1,
    }


def vision_config(config: RunConfig, platform: Platform) -> TransformerConfig:
    """SigLIP: LayerNorm, full attention, tanh-GELU, biases; whole on the first pipeline stage."""
    vision = config.model.vision
    return TransformerConfig(
        num_layers=vision.used_layers,
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_heads,
        ffn_hidden_size=vision.ffn_hidden_size,
        normalization="LayerNorm",
        layernorm_epsilon=vision.norm_eps,
        activation_func=partial(F.gelu, approximate="tanh"),
        bias_activation_fusion=False,  # Megatron-Core refuses a partial function
        add_bias_linear=True,
        **_initialisation(vision.init_std),
        **_shared(config, platform, config.parallel.tensor if vision.parallel == "tensor" else 1),
        **_fp8(config, "vision"),
    )


def projector_config(config: RunConfig, platform: Platform) -> TransformerConfig:
    """The two linears of the projector as a Megatron-Core MLP, with exact (erf) GELU."""
    language = config.model.language
    return TransformerConfig(
        num_layers=1,
        hidden_size=language.hidden_size,
        # There is no attention here; Megatron-Core only checks that the heads can be split.
        num_attention_heads=language.num_heads,
        ffn_hidden_size=language.hidden_size,
        normalization="LayerNorm",
        layernorm_epsilon=config.model.projector.norm_eps,
        activation_func=F.gelu,
        bias_activation_fusion=False,  # Megatron-Core's fused GELU is the tanh formula, whatever activation_func says
        add_bias_linear=True,
        **_initialisation(config.model.projector.init_std),
        **_shared(config, platform, config.parallel.tensor),
        **_fp8(config, "projector"),
    )


def _fp8(config: RunConfig, module: str) -> dict[str, Any]:
    fp8 = config.fp8
    if not fp8.used_in(module):
        return {}
    return {
        # Transformer Engine's own choice for each recipe: e5m2's range for gradients where one scale serves a tensor.
        "fp8": "hybrid" if fp8.recipe in ("delayed", "tensorwise") else "e4m3",
        "fp8_recipe": fp8.recipe,
        "fp8_amax_history_len": fp8.amax_history,
        "fp8_amax_compute_algo": "max",
        # Cached 8-bit weights are renewed in each step where the outer model's config asks for FP8, which is the
        # language model's; where it does not, they must not be cached, or the module would train on its first weights.
        "disable_parameter_transpose_cache": not fp8.used_in("language"),
    }


def _initialisation(std: float) -> dict[str, Any]:
    """One normal distribution for all matrices, as transformers' Qwen3; Megatron-Core would shrink half of them."""
    init = init_method_normal(std)
    return {"init_method_std": std, "init_method": init, "output_layer_init_method": init}


def _shared(config: RunConfig, platform: Platform, tensor_ranks: int) -> dict[str, Any]:
    dtype = DTYPES[config.precision]
    return {
        "tensor_model_parallel_size": tensor_ranks,
        "params_dtype": dtype,
        # Its CPU initialisation draws a whole matrix in memory, also of a model without memory (models/vlm.py).
        "perform_initialization": not torch.empty(0).is_meta,
        "bf16": dtype is torch.bfloat16,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        **_RECOMPUTE[config.train.recompute],
        **platform.transformer_settings(),
    }

"""Which layer implementation each backend uses: "local" (torch and Megatron-Core) or "te" (Transformer Engine)."""

from dataclasses import dataclass
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_mm.models.attention import CoreAttention, Norm
from megatron_mm.models.swiglu import SwiGLU


@dataclass(frozen=True, slots=True)
class Parts:
    """The building blocks of one backend."""

    norm: Any
    column_linear: Any
    row_linear: Any
    core_attention: Any
    # Of gated MLPs, where the config asks for a module (models/megatron_config.py).
    activation: Any

    @property
    def mlp(self) -> MLPSubmodules:
        """Column-parallel, then row-parallel linear."""
        return MLPSubmodules(linear_fc1=self.column_linear, linear_fc2=self.row_linear, activation_func=self.activation)


def parts(backend: str) -> Parts:
    """The building blocks of `backend`, "local" or "te"."""
    if backend == "local":
        return Parts(Norm, ColumnParallelLinear, RowParallelLinear, CoreAttention, SwiGLU)
    assert backend == "te"
    # Importable only where Transformer Engine is installed.
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm, TERowParallelLinear

    from megatron_mm.models.te_attention import PackedTEAttention

    return Parts(TENorm, TEColumnParallelLinear, TERowParallelLinear, PackedTEAttention, None)


def block_spec(
    config: TransformerConfig, backend: str, stage: int = 0, *, causal: bool, chunk: int | None = None
) -> TransformerBlockSubmodules:
    """A stack of pre-norm layers as one model chunk of a pipeline stage holds it.

    Args:
        config: its pipeline settings say how many layers the chunk gets.
        backend: "local" or "te".
        stage: rank in the pipeline.
        causal: language; otherwise every token sees every other.
        chunk: number of the chunk where the stage has several.
    """
    use = parts(backend)
    # Functions where Megatron-Core's types ask for modules.
    add_residual: Any = get_bias_dropout_add
    qk_norm = use.norm if config.qk_layernorm else IdentityOp
    mlp = ModuleSpec(module=MLP, submodules=use.mlp)
    if config.num_moe_experts is not None:
        mlp = get_moe_module_spec(backend == "te", config.num_moe_experts, moe_grouped_gemm=False)
        experts: Any = mlp.submodules
        experts.experts.submodules.activation_func = use.activation
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=use.norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=use.column_linear,
                    core_attention=use.core_attention,
                    linear_proj=use.row_linear,
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=add_residual,
            pre_mlp_layernorm=use.norm,
            mlp=mlp,
            mlp_bda=add_residual,
        ),
    )
    num_layers = get_num_layers_to_build(config, vp_stage=chunk, pp_rank=stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=use.norm)

"""LayerNorm -> Linear -> GELU (erf) -> Linear, as vLLM's RVLMultiModalProjector has it; LLaVA's has no LayerNorm."""

from megatron.core.fp8_utils import get_fp8_context
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_mm.models.specs import parts


class Projector(MegatronModule):
    """Features [..., H of the ViT] -> [..., H of the language model]."""

    def __init__(
        self,
        config: TransformerConfig,
        vision_hidden_size: int,
        backend: str,
        groups: ProcessGroupCollection,
        *,
        pre_norm: bool,
    ):
        super().__init__(config)
        use = parts(backend)
        norm = use.norm if pre_norm else IdentityOp
        self.pre_norm = norm(config=config, hidden_size=vision_hidden_size, eps=config.layernorm_epsilon)
        self.mlp = MLP(
            config,
            use.mlp,
            input_size=vision_hidden_size,
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=groups.tp,
        )

    def forward(self, features: Tensor) -> Tensor:
        # A TransformerBlock enters its FP8 context itself; a bare MLP does not.
        with get_fp8_context(self.config):
            out, bias = self.mlp(self.pre_norm(features))
        return out if bias is None else out + bias

"""R-4B's model for transformers: LLaVA-OneVision with a norm before the projector and none after the ViT.

transformers has no such model. `register()` makes its Auto classes pick this one for directories whose config.json
names the architecture, as exported directories and the released R-4B do; no code of the directory is run.
"""

from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
)
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionMultiModalProjector

PRE_NORM_EPS = 1e-6  # vLLM's RVLMultiModalProjector


class RProjector(LlavaOnevisionMultiModalProjector):
    """Features [..., H of the ViT] -> [..., H of the language model]; LayerNorm -> Linear -> GELU (erf) -> Linear."""

    def __init__(self, config: LlavaOnevisionConfig):
        super().__init__(config)
        self.pre_norm = nn.LayerNorm(config.vision_config.hidden_size, eps=PRE_NORM_EPS)  # pyright: ignore

    def forward(self, image_features: Tensor) -> Tensor:
        return super().forward(self.pre_norm(image_features))


class RForConditionalGeneration(LlavaOnevisionForConditionalGeneration):
    """The model that vLLM calls RForConditionalGeneration."""

    def __init__(self, config: LlavaOnevisionConfig):
        super().__init__(config)
        self.model.multi_modal_projector = RProjector(config)
        self.model.vision_tower.post_layernorm = nn.Identity()  # features are taken before it
        self.post_init()


def register() -> None:
    """Let AutoModelForImageTextToText choose by the architecture named in config.json."""
    # A tuple of classes is transformers' own way to offer several for one config.
    both = (LlavaOnevisionForConditionalGeneration, RForConditionalGeneration)
    AutoModelForImageTextToText.register(LlavaOnevisionConfig, both, exist_ok=True)  # pyright: ignore
    AutoModel.register(LlavaOnevisionConfig, (LlavaOnevisionModel, RForConditionalGeneration), exist_ok=True)  # pyright: ignore

"""Floating-point operations of a model, by what they grow with: tokens, their squares, tiles."""

from collections.abc import Collection
from dataclasses import dataclass

from megatron_mm.config.schema import LanguageConfig, ModelConfig, VisionConfig


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations of matrix products, a multiplication and an addition being two.

    Attributes:
        token: for each token of the language model, without the output layer, which sees trained tokens alone.
        squared_token: attention's, for the square of a sample's length; half of all pairs, the mask being causal.
        tile: ViT and projector.
    """

    token: float
    squared_token: float
    tile: float

    def of(self, tokens: float, squared_tokens: float, tiles: float) -> float:
        """In all."""
        return self.token * tokens + self.squared_token * squared_tokens + self.tile * tiles


def training_flops(model: ModelConfig, trained: Collection[str]) -> Flops:
    """Forward and backward of a step in which the modules `trained` learn, nothing recomputed.

    A matrix product costs its forward once more for the gradient of its weights, where they learn, and once more for
    that of its input, where something before it learns.
    """
    vision, language = model.vision, model.language
    vision_learns, projector_learns = "vision" in trained, "projector" in trained
    before_language = vision_learns or projector_learns or "embeddings" in trained
    language_passes = 1 + ("language" in trained) + before_language
    # Attention's products have no weights: both of their gradients are of inputs.
    attention_passes = 3 if "language" in trained or before_language else 1
    attention_width = language.num_heads * language.head_dim
    patches = vision.patches_per_tile
    vision_layer = 2 * patches * vision_layer_weights(vision) + 4 * patches**2 * vision.hidden_size
    projector = 2 * patches * projector_weights(model)
    return Flops(
        token=2.0 * language_passes * language.num_layers * language_layer_weights(language),
        squared_token=2.0 * attention_passes * language.num_layers * attention_width,
        tile=float(
            vision_layer * vision.used_layers * (3 if vision_learns else 1)
            + projector * (1 + projector_learns + vision_learns)
        ),
    )


def vision_layer_weights(vision: VisionConfig) -> int:
    """Entries of the matrices of one ViT layer."""
    return 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.ffn_hidden_size


def projector_weights(model: ModelConfig) -> int:
    """Entries of the projector's matrices."""
    return (model.vision.hidden_size + model.language.hidden_size) * model.language.hidden_size


def language_layer_weights(language: LanguageConfig) -> int:
    """Entries of the matrices that a token meets in one language layer; of experts, those that it takes."""
    attention = 2 * (language.num_heads + language.num_kv_heads) * language.head_dim
    mlp = 3 * language.ffn_hidden_size
    if language.experts is not None:
        experts = language.experts
        mlp = 3 * experts.ffn_hidden_size * experts.experts_per_token + experts.num_experts
    return language.hidden_size * (attention + mlp)

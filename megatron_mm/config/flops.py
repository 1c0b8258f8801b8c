"""Floating-point operations of a model, by what they grow with: tokens, their squares, tiles, trained tokens."""

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
        trained_token: the output layer's.
    """

    token: float
    squared_token: float
    tile: float
    trained_token: float

    def of(self, tokens: float, squared_tokens: float, tiles: float, trained_tokens: float) -> float:
        """In all."""
        language = self.token * tokens + self.squared_token * squared_tokens
        return language + self.tile * tiles + self.trained_token * trained_tokens


def training_flops(model: ModelConfig, trained: Collection[str]) -> Flops:
    """Forward and backward of a step in which the modules `trained` learn, nothing recomputed.

    A matrix product costs its forward once more for the gradient of its weights, where they learn, and once more for
    that of its input, where anything before it learns. In a module that learns this is so from its first product on: a
    norm with weights stands before it (or Megatron-Core computes it all the same: the projector's without `pre_norm`).
    """
    vision, language = model.vision, model.language
    vision_learns, projector_learns, language_learns, embeddings_learn = (
        module in trained for module in ("vision", "projector", "language", "embeddings")
    )
    before_language = vision_learns or projector_learns or embeddings_learn
    through_language = before_language or language_learns
    patches = vision.patches_per_tile
    # Patches are the first product of all: nothing before them learns.
    embedding = 2 * patches * 3 * vision.patch_size**2 * vision.hidden_size * (1 + vision_learns)
    projector = 2 * patches * projector_weights(model)
    return Flops(
        token=2.0 * (1 + language_learns + through_language) * language.num_layers * language_layer_weights(language),
        squared_token=_language_attention(language) * (3 if through_language else 1),
        tile=float(
            embedding
            + _vision_layers(vision) * (3 if vision_learns else 1)
            + projector * (1 + projector_learns + (vision_learns or projector_learns))
        ),
        trained_token=2.0 * (1 + embeddings_learn + through_language) * language.hidden_size * language.vocab_size,
    )


def recomputed_flops(model: ModelConfig, trained: Collection[str], recompute: str) -> Flops:
    """What a step does twice: activations are recomputed where gradients pass, as `train.recompute` says.

    "full" runs all of a layer again, "selective" its attention's two products, in ViT and language model alike;
    projector, embeddings and output layer are never recomputed.
    """
    vision, language = model.vision, model.language
    in_vision, in_language = "vision" in trained, bool(trained)
    if recompute == "none":
        return Flops(0.0, 0.0, 0.0, 0.0)
    if recompute == "full":
        token, tile = 2.0 * language.num_layers * language_layer_weights(language), _vision_layers(vision)
    else:
        token, tile = 0.0, _vision_attention(vision)
    return Flops(token * in_language, _language_attention(language) * in_language, float(tile * in_vision), 0.0)


def _language_attention(language: LanguageConfig) -> float:
    """Of one forward pass, for the square of a sample's length: scores and weighted values of all layers, halved."""
    # The products have no weights: a backward pass costs two more of them, both for gradients of inputs.
    return 2.0 * language.num_layers * language.num_heads * language.head_dim


def _vision_layers(vision: VisionConfig) -> int:
    """Of one tile's forward pass through the ViT's layers."""
    return 2 * vision.patches_per_tile * vision_layer_weights(vision) * vision.used_layers + _vision_attention(vision)


def _vision_attention(vision: VisionConfig) -> int:
    """Of one tile's forward pass: scores and weighted values of all layers, over all pairs of patches."""
    return 4 * vision.patches_per_tile**2 * vision.hidden_size * vision.used_layers


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

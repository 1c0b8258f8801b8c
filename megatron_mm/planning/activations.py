"""Bytes that a layer's forward pass keeps for its backward pass, and what the backward pass itself needs on top.

Written down from the modules as they are: models/attention.py and Megatron-Core's local layers, and the same with
Transformer Engine's norm, linears and attention. Held against what steps really allocate for the first
(benchmarks/plan_memory.py); for the second it is what their sources say that they save.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_mm.config.schema import LanguageConfig, RunConfig, VisionConfig

Backend = Literal["local", "te"]
FLOAT_BYTES = 4
# Tokens up to which models/attention.py holds the scores (its SHORT_SEQUENCE), by bytes of a number.
SHORT_SEQUENCE = {2: 256, 4: 64}


@dataclass(frozen=True, slots=True)
class Numbers:
    """What sizes are made of.

    Attributes:
        width_bytes: of a weight or activation.
        local: Megatron-Core's local layers (CPU), not Transformer Engine's.
        recompute: as train.recompute.
    """

    width_bytes: int
    local: bool
    recompute: str

    @classmethod
    def of_run(cls, config: RunConfig, backend: Backend) -> "Numbers":
        """From a config and the backend of its layers."""
        return cls(weight_bytes(config), backend == "local", config.train.recompute)


def weight_bytes(config: RunConfig) -> int:
    """Bytes of a weight and of an activation."""
    return 2 if config.precision == "bf16" else FLOAT_BYTES


def norm_bytes(numbers: Numbers, width: int) -> float:
    """RMSNorm of one token: its input, and a factor in fp32; its output is its user's."""
    return numbers.width_bytes * width + FLOAT_BYTES


@dataclass(frozen=True, slots=True)
class LanguageTokens:
    """Tokens of a micro-batch on a rank.

    Attributes:
        whole: of the part that the rank attends with.
        part: of those, what it has of the residual stream, less with sequence parallelism.
        positions: that the rotary embedding is made for.
        keys: tokens whose keys and values it holds, more with gathered context parallelism.
        in_pieces: several samples in a row, or parts of them with context parallelism, attended to one by one.
        masked: pairs of a query and a key that the CPU's context parallelism holds a mask for.
    """

    whole: float
    part: float
    positions: float
    keys: float
    in_pieces: bool
    masked: float


def language_layer(
    language: LanguageConfig, tokens: LanguageTokens, tensor: int, numbers: Numbers, *, learns: bool
) -> float:
    """Bytes that one layer keeps.

    Args:
        learns: its weights do; inputs of frozen matrices are not kept.
    """
    width = numbers.width_bytes
    if numbers.recompute == "full":
        return width * language.hidden_size * tokens.part
    return _attention(language, tokens, tensor, numbers, learns=learns) + _mlp(
        language, tokens, tensor, numbers, learns=learns
    )


def language_layer_working(
    language: LanguageConfig, tokens: LanguageTokens, tensor: int, numbers: Numbers, *, learns: bool
) -> float:
    """Bytes that the backward pass of one layer needs beyond what is kept: where most is held, in its MLP.

    Two gradients as wide as the MLP and that of the residual stream; a layer that is recomputed keeps all that it would
    have kept as well.
    """
    width = numbers.width_bytes
    gradients = width * (2 * _mlp_width(language, tensor) * tokens.whole + 2 * language.hidden_size * tokens.part)
    if numbers.recompute != "full":
        return gradients
    again = Numbers(width, numbers.local, "none")
    return gradients + language_layer(language, tokens, tensor, again, learns=learns)


def language_layer_forward(language: LanguageConfig, tokens: LanguageTokens, tensor: int, numbers: Numbers) -> float:
    """Return the most bytes that one layer holds at once in a forward pass of which nothing is kept.

    That is in its MLP: both halves of the first product and what the activation makes of them, next to the residual
    stream and its norm.
    """
    mlp = 3 * _mlp_width(language, tensor) * tokens.whole
    return numbers.width_bytes * (mlp + 2 * language.hidden_size * tokens.part)


def _attention(
    language: LanguageConfig, tokens: LanguageTokens, tensor: int, numbers: Numbers, *, learns: bool
) -> float:
    width, hidden, dim = numbers.width_bytes, language.hidden_size, language.head_dim
    heads, kv_heads = language.num_heads / tensor, language.num_kv_heads / tensor
    query, key = heads * dim, kv_heads * dim
    grouped = heads > kv_heads
    whole, part = tokens.whole, tokens.part
    kept = norm_bytes(numbers, hidden) * part + learns * width * hidden * part
    # The values are a view of the fused product, which stays whole for them.
    kept += width * (query + 2 * key) * whole
    for heads_of, wide, copied in ((heads, query, grouped), (kv_heads, key, False)):
        norm = norm_bytes(numbers, dim) * heads_of
        if numbers.local and not copied:
            norm -= width * wide  # its input is that view as well
        kept += norm * whole
    # Sine and cosine, for queries and for keys; on GPUs all layers share the angles.
    kept += 4 * width * dim * tokens.positions * numbers.local
    kept += width * query * whole + width * key * whole
    # Gathered keys and values stand in for the rank's own.
    kept += width * 2 * key * (tokens.keys - whole if tokens.keys > whole else 0)
    # torch writes the mask as numbers of the activations' type, for the backward pass as well.
    kept += width * tokens.masked
    if numbers.recompute == "selective":
        return kept + width * query * whole
    out = width * query * whole
    statistics = FLOAT_BYTES * heads * whole
    # The local kernel's outputs of the pieces are joined to a second copy, which the next matrix takes.
    joined = numbers.local and tokens.in_pieces
    return kept + out + statistics + (learns * out if joined else 0)


def _mlp(language: LanguageConfig, tokens: LanguageTokens, tensor: int, numbers: Numbers, *, learns: bool) -> float:
    """Norm, both halves of the first product, and what the activation makes of them where the second matrix learns."""
    width, hidden = numbers.width_bytes, language.hidden_size
    kept = norm_bytes(numbers, hidden) * tokens.part
    ffn = _mlp_width(language, tensor)
    if language.experts is None:
        return kept + learns * width * hidden * tokens.part + width * (2 + learns) * ffn * tokens.whole
    # Each expert's tokens are copied together, and back; the router works in fp32.
    copies = language.experts.experts_per_token * hidden * tokens.part
    router = FLOAT_BYTES * 3 * language.experts.num_experts * tokens.part
    return kept + width * (hidden * tokens.part + 2 * copies) + width * (2 + learns) * ffn * tokens.part + router


def _mlp_width(language: LanguageConfig, tensor: int) -> float:
    """Values between a token's two products; of experts, of all that it takes."""
    if language.experts is None:
        return language.ffn_hidden_size / tensor
    return language.experts.ffn_hidden_size * language.experts.experts_per_token


def vision_layer(vision: VisionConfig, tiles: float, tensor: int, numbers: Numbers) -> float:
    """Bytes that one ViT layer keeps of the tiles on a rank, where it learns."""
    width, hidden, patches = numbers.width_bytes, vision.hidden_size, vision.patches_per_tile * tiles
    if numbers.recompute == "full":
        return width * hidden * patches
    # Two norms' inputs and outputs; queries, keys, values; attention's output; the GELU's input and output.
    norms = 4 * hidden * patches + 2 * 2 * patches
    inner = (4 * hidden + 2 * vision.ffn_hidden_size) / tensor * patches
    return width * (norms + inner) + _vision_scores(vision, tiles, tensor, numbers)


def vision_layer_working(vision: VisionConfig, tiles: float, tensor: int, numbers: Numbers) -> float:
    """Bytes that the backward pass of one ViT layer needs beyond what is kept."""
    width, patches = numbers.width_bytes, vision.patches_per_tile * tiles
    gradients = width * (2 * vision.ffn_hidden_size / tensor + 2 * vision.hidden_size) * patches
    scores = _vision_scores(vision, tiles, tensor, Numbers(width, numbers.local, "none"))
    if numbers.recompute != "full":
        return max(gradients, scores)
    again = Numbers(width, numbers.local, "none")
    return max(gradients, scores) + vision_layer(vision, tiles, tensor, again)


def vision_layer_forward(vision: VisionConfig, tiles: float, tensor: int, numbers: Numbers) -> float:
    """Bytes at most at once of a layer of which nothing is kept: input, its norm, and the widest product twice."""
    width, patches = numbers.width_bytes, vision.patches_per_tile * tiles
    products = max(2 * vision.ffn_hidden_size, 4 * vision.hidden_size) / tensor
    scores = _vision_scores(vision, tiles, tensor, Numbers(width, numbers.local, "none"))
    return width * (2 * vision.hidden_size + products) * patches + scores


def _vision_scores(vision: VisionConfig, tiles: float, tensor: int, numbers: Numbers) -> float:
    """Softmax of all pairs of patches in fp32 and, cast, once more; the fused kernel keeps a statistic a row alone."""
    heads, patches = vision.num_heads / tensor, vision.patches_per_tile
    if numbers.recompute == "selective":
        return 0.0
    if numbers.local and patches <= SHORT_SEQUENCE[numbers.width_bytes]:
        cast = numbers.width_bytes if numbers.width_bytes != FLOAT_BYTES else 0
        return heads * patches**2 * tiles * (FLOAT_BYTES + cast)
    return FLOAT_BYTES * heads * patches * tiles

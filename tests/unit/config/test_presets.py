"""The presets of real models have the published numbers of parameters."""

from megatron_mm.config.load import load_config
from megatron_mm.config.schema import LanguageConfig, ModelConfig, VisionConfig

# What a base recipe leaves to the stage.
STAGE = ("run_dir=unused", "train={steps: 1, global_batch: 1, micro_batch: 1}", "optim={lr: 1}")


def _language_parameters(language: LanguageConfig) -> int:
    hidden = language.hidden_size
    queries, keys = language.num_heads * language.head_dim, language.num_kv_heads * language.head_dim
    attention = hidden * (2 * queries + 2 * keys) + 2 * language.head_dim
    layer = attention + 3 * hidden * language.ffn_hidden_size + 2 * hidden
    embeddings = (1 if language.tied_embeddings else 2) * language.vocab_size * hidden
    return language.num_layers * layer + embeddings + hidden


def _vision_parameters(vision: VisionConfig) -> int:
    hidden, ffn = vision.hidden_size, vision.ffn_hidden_size
    layer = 4 * hidden * (hidden + 1) + hidden * ffn + ffn + ffn * hidden + hidden + 4 * hidden
    patches = 3 * vision.patch_size**2 * hidden + hidden + vision.patches_per_tile * hidden
    return vision.num_layers * layer + patches


def _r4b() -> ModelConfig:
    return load_config("r4b/base", overrides=STAGE).model


def test_qwen3_4b() -> None:
    tied = load_config("r4b/base", overrides=[*STAGE, "model.language.tied_embeddings=true"]).model.language
    assert _language_parameters(tied) == 4_022_468_096


def test_siglip2_so400m_layers() -> None:
    vision = _r4b().vision
    one_less = vision.model_copy(update={"num_layers": vision.num_layers - 1})
    assert _vision_parameters(vision) - _vision_parameters(one_less) == 15_239_504
    assert vision.patches_per_tile == 729


def test_r4b_has_4_82_billion_parameters() -> None:
    model = _r4b()
    wide, narrow = model.language.hidden_size, model.vision.hidden_size
    projector = 2 * narrow + (narrow + 1) * wide + (wide + 1) * wide + wide
    total = _language_parameters(model.language) + _vision_parameters(model.vision) + projector
    assert round(total / 1e9, 4) == 4.8187

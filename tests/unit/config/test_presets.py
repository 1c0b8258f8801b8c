"""The presets of real models have the published numbers of parameters."""

import pytest
import yaml

from megatron_mm.config.load import PRESETS, load_config
from megatron_mm.config.schema import LanguageConfig, ModelConfig, VisionConfig

# What a base recipe leaves to the stage.
STAGE = ("run_dir=unused", "train={steps: 1, global_batch: 1, micro_batch: 1}", "optim={lr: 1}")


def _language_parameters(language: LanguageConfig) -> int:
    hidden = language.hidden_size
    queries, keys = language.num_heads * language.head_dim, language.num_kv_heads * language.head_dim
    attention = hidden * (2 * queries + 2 * keys) + 2 * language.head_dim
    mlp = 3 * hidden * language.ffn_hidden_size
    if language.experts is not None:
        mlp = language.experts.num_experts * (3 * hidden * language.experts.ffn_hidden_size + hidden)
    layer = attention + mlp + 2 * hidden
    embeddings = (1 if language.tied_embeddings else 2) * language.vocab_size * hidden
    return language.num_layers * layer + embeddings + hidden


def _vision_parameters(vision: VisionConfig) -> int:
    hidden, ffn = vision.hidden_size, vision.ffn_hidden_size
    layer = 4 * hidden * (hidden + 1) + hidden * ffn + ffn + ffn * hidden + hidden + 4 * hidden
    patches = 3 * vision.patch_size**2 * hidden + hidden + vision.patches_per_tile * hidden
    return vision.used_layers * layer + patches


def _model(*overrides: str) -> ModelConfig:
    return load_config("r4b/base", overrides=[*STAGE, *overrides]).model


# Parameters of the released safetensors files, as their model pages give them.
@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-1.7b", 1_720_574_976),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-14b", 14_768_307_200),
        ("qwen3-32b", 32_762_123_264),
        ("qwen3-30b-a3b", 30_532_122_624),
    ],
)
def test_qwen3(preset: str, parameters: int) -> None:
    tied = "true" if preset in ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b") else "false"
    language = load_config(
        "r4b/base", overrides=[*STAGE, f"model.language={{preset: {preset}, tied_embeddings: {tied}}}"]
    ).model.language
    assert _language_parameters(language) == parameters
    released = yaml.safe_load((PRESETS / "language" / f"{preset}.yaml").read_text(encoding="utf-8"))
    assert released["tied_embeddings"] == language.tied_embeddings


def test_every_vision_preset_is_a_siglip_of_its_name() -> None:
    sizes = {"base": (12, 768), "large": (24, 1024), "so400m": (27, 1152)}
    names = [path.stem for path in (PRESETS / "vision").glob("siglip2-*.yaml")]
    assert len(names) == 12
    for name in names:
        _, size, patch, side = name.split("-")
        vision = _model(f"model.vision.preset={name}", "model.vision.drop_last_layers=0").vision
        assert (vision.used_layers, vision.hidden_size) == sizes[size]
        assert (f"patch{vision.patch_size}", vision.image_size) == (patch, int(side))


def test_siglip2_so400m_layers() -> None:
    vision = _model().vision
    one_more = vision.model_copy(update={"drop_last_layers": 0})
    assert _vision_parameters(one_more) - _vision_parameters(vision) == 15_239_504
    # 384 = 27 * 14 + 6: the last six pixels are not seen.
    assert vision.patches_per_tile == 729


def test_r4b_has_4_82_billion_parameters() -> None:
    model = _model()
    wide, narrow = model.language.hidden_size, model.vision.hidden_size
    projector = 2 * narrow + (narrow + 1) * wide + (wide + 1) * wide + wide
    total = _language_parameters(model.language) + _vision_parameters(model.vision) + projector
    assert round(total / 1e9, 4) == 4.8187

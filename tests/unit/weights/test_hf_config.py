"""config.json of what people have, as transformers writes it, and every field that we do not follow."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    LlavaNextConfig,
    LlavaOnevisionConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SiglipConfig,
    SiglipVisionConfig,
)

from megatron_mm.config.errors import InputError
from megatron_mm.config.load import load_model
from megatron_mm.weights.hf_config import check_bridged, read_parts, read_whole
from tests.released import QWEN3_4B, SO400M

# As the Qwen team released it, with transformers 4.51's fields.
RELEASED_QWEN3_4B: dict[str, Any] = {
    **{key: value for key, value in QWEN3_4B.items() if key != "rope_parameters"},
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
}


def _saved(directory: Path, config: PreTrainedConfig, **changes: Any) -> Path:
    config.save_pretrained(directory)
    path = directory / "config.json"
    given = json.loads(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        section, _, field = key.rpartition("__")
        (given[section] if section else given)[field] = value
    path.write_text(json.dumps(given), encoding="utf-8")
    return directory


def _whole(kind: Any = LlavaOnevisionConfig, **more: Any) -> PreTrainedConfig:
    pinpoints = [[rows * 384, columns * 384] for rows in (1, 2, 3) for columns in (1, 2, 3)]
    values = {"image_grid_pinpoints": pinpoints, "vision_feature_select_strategy": "full", **more}
    vision, text = SiglipVisionConfig(**SO400M), Qwen3Config(**QWEN3_4B)
    return kind(vision_config=vision, text_config=text, tie_word_embeddings=True, **values)


def _parts(tmp_path: Path, language: PreTrainedConfig) -> tuple[Path, Path]:
    siglip = SiglipConfig(vision_config=SO400M)
    return _saved(tmp_path / "vision", siglip), _saved(tmp_path / "language", language)


def test_separate_directories_are_the_presets(tmp_path: Path) -> None:
    found = read_parts(*_parts(tmp_path, Qwen3Config(**QWEN3_4B))).model
    presets = ("model.vision.preset=siglip2-so400m-patch14-384", "model.language.preset=qwen3-4b")
    wanted = load_model({}, None, (), presets)[0]
    check_bridged(found, wanted, fresh_projector=True)
    check_bridged(found, load_model({}, "r4b/base", (), ())[0], fresh_projector=True)
    (tmp_path / "language" / "config.json").write_text(json.dumps(RELEASED_QWEN3_4B), encoding="utf-8")
    assert read_parts(tmp_path / "vision", tmp_path / "language").model == found


def test_a_mixture_of_experts(tmp_path: Path) -> None:
    language = Qwen3MoeConfig(
        **{**QWEN3_4B, "tie_word_embeddings": False},
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
    )
    experts = read_parts(*_parts(tmp_path, language)).model.language.experts
    assert experts is not None
    assert (experts.num_experts, experts.experts_per_token, experts.ffn_hidden_size) == (128, 8, 768)
    _saved(tmp_path / "language", language, norm_topk_prob=False)
    with pytest.raises(InputError, match="norm_topk_prob=False: only True is supported"):
        read_parts(tmp_path / "vision", tmp_path / "language")


def test_whole_models(tmp_path: Path) -> None:
    onevision = read_whole(_saved(tmp_path / "onevision", _whole(vision_feature_layer=-2)))
    assert onevision.model.vision.drop_last_layers == 1
    assert onevision.model.vision.used_layers == 26
    assert not onevision.model.projector.pre_norm
    assert onevision.model.multi_image == "square"
    assert onevision.model.tile_grids == tuple((rows, columns) for rows in (1, 2, 3) for columns in (1, 2, 3))
    assert onevision.model.language.tied_embeddings
    assert onevision.image_token == 151646
    r4b = _whole(vision_aspect_ratio="anyres_max_4", image_token_index=151669)
    r4b.architectures = ["RForConditionalGeneration"]
    # The released one names its own type and code; neither is followed.
    own = {"model_type": "own", "auto_map": {"AutoModel": "modeling.Model"}}
    found = read_whole(_saved(tmp_path / "r4b", r4b, **own))
    assert found.model.projector.pre_norm
    assert (found.model.multi_image, found.model.max_tiles, found.image_token) == ("anyres", 4, 151669)
    next_style = read_whole(_saved(tmp_path / "next", _whole(LlavaNextConfig, vision_feature_layer=26)))
    assert (next_style.model.multi_image, next_style.model.max_tiles) == ("anyres", 9)
    assert next_style.model.vision.used_layers == 26


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("text_config__hidden_act", "gelu", "text_config.hidden_act='gelu': only 'silu' is supported"),
        ("text_config__attention_bias", True, "text_config.attention_bias=True: only False is supported"),
        ("text_config__model_type", "qwen2", "text_config.model_type='qwen2': supported are qwen3, qwen3_moe"),
        ("text_config__rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6}, "only rope_type default"),
        ("text_config__layer_types", ["sliding_attention"], "only full_attention is supported"),
        ("vision_config__hidden_act", "gelu", "vision_config.hidden_act='gelu': only 'gelu_pytorch_tanh'"),
        ("vision_config__model_type", "clip_vision_model", "only 'siglip_vision_model' is supported"),
        ("vision_config__window_size", 7, "vision_config.window_size=7: unknown; where it does not change the model"),
        ("vision_feature_layer", [-2, -1], "vision_feature_layer=[-2, -1]: one layer of the ViT"),
        ("vision_feature_select_strategy", "default", "vision_feature_select_strategy='default': only 'full'"),
        ("vision_aspect_ratio", "pad", "vision_aspect_ratio='pad': only anyres_max_N"),
        ("projector_hidden_act", "relu", "projector_hidden_act='relu': only 'gelu' is supported"),
        ("multimodal_projector_bias", False, "multimodal_projector_bias=False: only True is supported"),
        ("image_grid_pinpoints", [[384, 400]], "heights and widths that vision_config.image_size=384 divides"),
    ],
)
def test_what_we_do_not_follow_is_refused(field: str, value: Any, message: str, tmp_path: Path) -> None:
    directory = _saved(tmp_path / "model", _whole(), **{field: value})
    with pytest.raises(InputError) as raised:
        read_whole(directory)
    assert f"{directory / 'config.json'} describes a model that is not supported:" in str(raised.value)
    assert message in str(raised.value)


def test_a_field_may_be_said_not_to_matter(tmp_path: Path) -> None:
    directory = _saved(tmp_path / "model", _whole(), vision_config__window_size=7)
    assert read_whole(directory, ["window_size"]).model.vision.num_layers == 27


def test_directories_that_hold_another_kind_of_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is of a 'qwen3' model; supported are RForConditionalGeneration"):
        read_whole(_saved(tmp_path / "qwen", Qwen3Config(**QWEN3_4B)))
    with pytest.raises(InputError, match=r"no model in .* \(config.json is missing\)"):
        read_whole(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="is not JSON"):
        read_whole(tmp_path)


def test_another_model_than_the_weights_is_refused(tmp_path: Path) -> None:
    found = read_parts(*_parts(tmp_path, Qwen3Config(**QWEN3_4B))).model
    tree = found.model_dump(mode="json")
    overrides = ("model.vision.norm_eps=1e-5", "model.language.rope_theta=10000", "model.language.num_heads=16")
    with pytest.raises(InputError) as raised:
        check_bridged(found, load_model(tree, None, (), overrides)[0], fresh_projector=True)
    assert str(raised.value).splitlines() == [
        "the weights are of another model than is asked for:",
        "  model.vision.norm_eps: 1e-05; the weights have 1e-06",
        "  model.language.num_heads: 16; the weights have 32",
        "  model.language.rope_theta: 10000.0; the weights have 1000000.0",
    ]

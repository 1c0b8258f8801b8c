"""transformers' LLaVA-OneVision of the same shape and weights as ours: the reference that is not our code."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
)
from transformers.feature_extraction_utils import BatchFeature

from megatron_mm.chat.images import NEWLINE, TileRules, pixel_values
from megatron_mm.chat.render import Conversation, Question, Rendering, Response, Sample, render_sample
from megatron_mm.chat.template import chat_template
from megatron_mm.chat.tokenizer import IMAGE, PAD, ChatTokenizer
from megatron_mm.config.schema import RunConfig
from megatron_mm.data import loader
from megatron_mm.data.loader import Form, collate
from megatron_mm.models import attention, vlm
from megatron_mm.models.packing import positions_in_samples
from megatron_mm.models.vlm import Pictures, build_model
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from megatron_mm.weights import mapping
from megatron_mm.weights.modeling_r4b import RForConditionalGeneration
from megatron_mm.weights.stream import from_hf
from megatron_mm.weights.tables import model_table
from tests.tiny import r4b_tensors, random_picture, reference_models, tiny_config

QUESTION = "Which digit is top left?"
Logits = tuple[list[torch.Tensor], list[torch.Tensor]]
# (width, height): square, wide, tall, smaller than a tile, larger than the largest grid, and odd sides.
PICTURE_SHAPES = (
    (30, 30),
    (32, 32),
    (33, 31),
    (64, 32),
    (30, 50),
    (100, 31),
    (31, 100),
    (64, 64),
    (97, 61),
    (140, 33),
    (200, 200),
    (333, 97),
    (480, 640),
    (900, 200),
)
# One picture of each shape, then samples with none, two and three.
PICTURE_SETS = (*((shape,) for shape in PICTURE_SHAPES), (), PICTURE_SHAPES[3:5], PICTURE_SHAPES[9:12], ())


def onevision_config(**overrides: object) -> RunConfig:
    """A model as LLaVA-OneVision's: no norm before the projector, grids large enough to be scaled down."""
    grids = [[rows, columns] for rows in range(1, 5) for columns in range(1, 5)]
    base = {
        "model__projector__pre_norm": "false",
        "model__multi_image": "square",
        "model__language__vocab_size": 384,
        "model__tile_grids": grids,
        # A grid of 3 x 4 tiles is more than 1.21 * 9 of them.
        "model__max_tiles": 9,
        "model__language__max_positions": 1024,
        "data__max_sequence_tokens": 1024,
        "train__trained": "[vision, projector, language, embeddings]",
    }
    return tiny_config(**{**base, **overrides})


def picture_sets(seed: int = 0) -> list[tuple[Any, ...]]:
    """Pictures of noise in the shapes of PICTURE_SETS."""
    random = np.random.default_rng(seed)
    return [tuple(random_picture(shape, random) for shape in shapes) for shapes in PICTURE_SETS]


def _pinpoints(config: RunConfig) -> list[list[int]]:
    """The grids as (height, width) in pixels."""
    tile = config.model.vision.image_size
    return [[rows * tile, columns * tile] for rows, columns in config.model.tile_grids]


def reference_model(config: RunConfig, image_token: int) -> LlavaOnevisionForConditionalGeneration:
    """The model of `r4b_tensors`, in fp32; with a norm before the projector, R-4B's."""
    siglip, qwen = reference_models(config)
    kind = RForConditionalGeneration if config.model.projector.pre_norm else LlavaOnevisionForConditionalGeneration
    model = kind(
        LlavaOnevisionConfig(
            vision_config=siglip.config,
            text_config=qwen.config,
            image_token_index=image_token,
            image_grid_pinpoints=_pinpoints(config),
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
            vision_aspect_ratio=f"anyres_max_{config.model.max_tiles}",
            tie_word_embeddings=config.model.language.tied_embeddings,
        )
    )
    ours = r4b_tensors(config, siglip, qwen)
    # transformers 5 has no `vision_model` level, a final norm that R-4B does not use, and a copy of tied embeddings.
    theirs = {name.replace("vision_tower.vision_model.", "vision_tower."): tensor for name, tensor in ours.items()}
    missing, unexpected = model.load_state_dict(theirs, strict=False)
    assert not unexpected, unexpected
    assert all("post_layernorm" in name or name == "lm_head.weight" for name in missing), missing
    model.tie_weights()
    return model.float().eval()


def reference_processor(config: RunConfig, tokenizer: ChatTokenizer) -> LlavaOnevisionProcessor:
    """The processor that belongs to `reference_model`."""
    tile = config.model.vision.image_size
    images = LlavaOnevisionImageProcessor(
        size={"height": tile, "width": tile},
        image_grid_pinpoints=_pinpoints(config),
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        resample=3,
    )
    return LlavaOnevisionProcessor(
        image_processor=images,
        tokenizer=tokenizer.hf,
        video_processor=LlavaOnevisionVideoProcessor(),
        num_image_tokens=config.model.vision.patches_per_tile,
        vision_feature_select_strategy="full",
        image_token=IMAGE,
        vision_aspect_ratio=f"anyres_max_{config.model.max_tiles}",
        chat_template=chat_template(tokenizer.tags),
    )


def by_transformers(config: RunConfig, tokenizer: ChatTokenizer, texts: list[str]) -> list[BatchFeature]:
    """What LlavaOnevisionProcessor makes of each picture set with its text."""
    processor: Any = reference_processor(config, tokenizer)
    return [
        processor(images=[list(pictures)] if pictures else None, text=[text], return_tensors="pt")
        for text, pictures in zip(texts, picture_sets(), strict=True)
    ]


def samples_of(config: RunConfig, tokenizer: ChatTokenizer, rotation: int = 0) -> list[Sample]:
    """One answer a picture set; `rotation` changes which."""
    rules, sets = TileRules.of_model(config.model), picture_sets()
    responses = [Response(str((number + rotation) % 7), "3+4=7" if number % 2 else None) for number in range(len(sets))]
    questions = [Question.about(QUESTION, pictures) for pictures in sets]
    contents = [Conversation.of(*pair) for pair in zip(questions, responses, strict=True)]
    return [render_sample(content, Rendering.PRETRAIN, tokenizer, rules) for content in contents]


def our_logits(config: RunConfig, tensors: dict[str, torch.Tensor], tokenizer_directory: Path, fault: str) -> Logits:
    """Logits [S, V] of each sample by itself, and of all of them in one pack. Runs on one rank."""
    tokenizer, platform = ChatTokenizer(tokenizer_directory), get_platform("cpu")
    patches = config.model.vision.patches_per_tile
    _plant(fault)
    with state.process_group(platform), state.model_parallel(config.parallel, 0) as groups, torch.no_grad():
        (model,) = chunks = build_model(config, platform, groups, tokenizer.control(IMAGE))
        from_hf(chunks, model_table(config.model), tensors)
        samples = [_broken(sample, fault, tokenizer.control(IMAGE)) for sample in samples_of(config, tokenizer)]
        forms = [*(([sample], Form()) for sample in samples), (samples, Form(packed=True))]
        found = []
        for part, form in forms:
            batch = collate(part, tokenizer.control(PAD), patches, form)
            pictures = (
                None if batch.tiles is None else Pictures(pixel_values(batch.tiles), batch.order, batch.downscales)
            )
            found.append(model(batch.ids, pictures, batch.starts)[0])
    return found[:-1], list(found[-1].split([len(sample.ids) - 1 for sample in samples]))


def _plant(fault: str) -> None:
    """A fault of our code; the process ends with the test."""
    if fault == "positions restart a token late":
        # Rotary positions are relative: what a sample starts from does not matter, only that it is one start for all
        # its tokens.
        vlm.positions_in_samples = lambda starts: positions_in_samples(
            [start + (0 < number < len(starts) - 1) for number, start in enumerate(starts)]
        )
    if fault == "attention leaks over a sample's border":
        attend = attention.CoreAttention._per_sample
        attention.CoreAttention._per_sample = lambda self, query, key, value, starts: attend(
            self, query, key, value, [*starts[:1], *starts[2:]] if len(starts) > 2 else starts
        )
    if fault == "queries and keys swapped, both ways":
        # Where they have the same shape, in the ViT: a round trip does not show it.
        fuse = mapping.FusedQkv.to_megatron

        def swapped(self: mapping.FusedQkv, parts: Sequence[torch.Tensor]) -> torch.Tensor:
            query, key, value = parts
            return fuse(self, (key, query, value) if key.shape == query.shape else parts)

        mapping.FusedQkv.to_megatron = swapped
    if fault == "gate and up swapped, both ways":
        mapping.GatedMlp.to_megatron = lambda self, parts: torch.cat([parts[1], parts[0]])  # noqa: ARG005
    if fault == "a missing newline":
        order = loader.feature_order
        loader.feature_order = lambda grid: np.where(order(grid) == NEWLINE, 0, order(grid))


def _broken(sample: Sample, fault: str, image: int) -> Sample:
    """A fault of the preprocessing."""
    if fault == "swapped tiles" and len(sample.tiles) > 2:
        return dataclasses.replace(sample, tiles=sample.tiles[[0, 2, 1, *range(3, len(sample.tiles))]])
    if fault == "a shifted placeholder" and sample.tilings:
        places = np.flatnonzero(sample.ids == image)
        ids = sample.ids.copy()
        ids[places[0]], ids[places[-1] + 1] = ids[places[-1] + 1], image
        return dataclasses.replace(sample, ids=ids)
    return sample


def largest_difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Largest absolute difference over all samples."""
    return max(float((mine - other).abs().max()) for mine, other in zip(ours, theirs, strict=True))


def their_logits(config: RunConfig, tokenizer: ChatTokenizer) -> list[torch.Tensor]:
    """transformers' logits [S, V] of each sample."""
    model = reference_model(config, tokenizer.control(IMAGE))
    samples = samples_of(config, tokenizer)
    with torch.no_grad():
        return [model(**inputs).logits[0] for inputs in model_inputs(config, tokenizer, samples)]


def model_inputs(config: RunConfig, tokenizer: ChatTokenizer, samples: list[Sample]) -> list[dict[str, torch.Tensor]]:
    """The samples, which are those of `picture_sets`, as transformers' model takes them."""
    texts = ["<image>" * len(pictures) for pictures in picture_sets()]
    found = []
    for inputs, sample in zip(by_transformers(config, tokenizer, texts), samples, strict=True):
        # The whole sample's ids in place of the bare pictures'.
        inputs = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
        found.append({**inputs, "input_ids": torch.from_numpy(sample.ids[:-1])[None]})
    return found

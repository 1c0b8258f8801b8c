"""What vLLM, transformers and our own forward say with one trained model, exported in either format."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from megatron_mm.chat.images import TileRules, pixel_values
from megatron_mm.chat.modes import Mode
from megatron_mm.chat.render import Prompt, Question, Sample, render_prompt
from megatron_mm.chat.tokenizer import IMAGE, PAD, ChatTokenizer
from megatron_mm.checkpoint.store import load_weights
from megatron_mm.config.schema import RunConfig
from megatron_mm.convert.exporting import export_run
from megatron_mm.data.loader import collate
from megatron_mm.generation.engine import Completion, Engine
from megatron_mm.models.vlm import Pictures, build_model
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from megatron_mm.train.loop import train
from megatron_mm.weights import modeling_r4b
from megatron_mm.weights.export import Format
from tests.answers import QUESTION, largest_differences
from tests.layouts import PP2, TP2, Overrides
from tests.onevision import picture_sets
from tests.ranks import run_alone, run_on_ranks
from tests.tiny import tiny_config

MAX_TOKENS = 12
FORMATS: dict[Format, Overrides] = {
    Format.R4B: {},
    Format.ONEVISION: {"model__projector__pre_norm": "false", "model__multi_image": "square"},
}


@dataclass(frozen=True)
class Said:
    """What one of the three says to a prompt.

    Attributes:
        ids: its greedy answer.
        logprobs: log-probabilities of vLLM's answer.
    """

    ids: list[int]
    logprobs: list[float]


def _questions(form: Format) -> list[Question]:
    """None to three pictures; of LLaVA-OneVision up to one, since vLLM does not cut several as transformers does."""
    sets = picture_sets()
    return [Question.about(QUESTION, pictures) for pictures in sets if form is Format.R4B or len(pictures) < 2]


def _prompts(directory: Path, form: Format) -> list[Prompt]:
    tokenizer, rules = ChatTokenizer(directory), TileRules.of_directory(directory)
    pairs = zip(_questions(form), cycle(Mode), strict=False)
    return [render_prompt(question, mode, tokenizer, rules) for question, mode in pairs]


def _by_vllm(directory: Path, form: Format) -> list[Completion]:
    engine = Engine(directory, "float32")
    pictures = [question.pictures for question in _questions(form)]
    return engine.generate(_prompts(directory, form), pictures, max_tokens=MAX_TOKENS)


def _said(logits: torch.Tensor, answer: Sequence[int], image_token: int) -> Said:
    """Of logits [S, V] over prompt and answer."""
    of_answer = logits[-len(answer) - 1 : -1].float()
    logprobs = of_answer.log_softmax(-1)[range(len(answer)), list(answer)]
    of_answer[:, image_token] = -torch.inf  # banned in vLLM
    # Each token is the likeliest after those before it: what greedy decoding finds.
    return Said(of_answer.argmax(-1).tolist(), logprobs.tolist())


def _by_transformers(directory: Path, form: Format, answers: list[list[int]]) -> list[Said]:
    modeling_r4b.register()
    loaded: Any = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    model = model.float().eval()
    processor = AutoProcessor.from_pretrained(directory)
    image = model.config.image_token_index
    found = []
    for question, prompt, answer in zip(_questions(form), _prompts(directory, form), answers, strict=True):
        pictures: list[Image.Image] = list(question.pictures)
        inputs: Any = processor(images=pictures or None, text="<image>" * len(pictures) or "x", return_tensors="pt")
        kept = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
        ids = torch.from_numpy(prompt.ids)[None]
        mask = torch.ones_like(ids)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            suppress_tokens=[image],
            **kept,
        )
        written = out[0, len(prompt.ids) :].tolist()
        whole = torch.cat([ids, torch.tensor([answer])], 1)
        with torch.no_grad():
            logits = model(input_ids=whole, attention_mask=torch.ones_like(whole), **kept).logits[0]
        said = _said(logits, answer, image)
        assert said.ids == written, "generate and forward of transformers differ"
        found.append(said)
    return found


def _by_ourselves(config: RunConfig, directory: Path, form: Format, answers: list[list[int]]) -> list[Said]:
    """From the checkpoint, not from the exported directory. Runs on one rank."""
    tokenizer, platform = ChatTokenizer(directory), get_platform("cpu")
    found = []
    with state.process_group(platform), state.model_parallel(config.parallel, 0) as groups, torch.no_grad():
        (model,) = chunks = build_model(config, platform, groups, tokenizer.control(IMAGE))
        load_weights(config.run_dir, chunks)
        for prompt, answer in zip(_prompts(directory, form), answers, strict=True):
            # One more, since the last token of a batch is a label only.
            ids = np.concatenate([prompt.ids, answer, [tokenizer.control(PAD)]])
            sample = Sample(ids, np.zeros(len(ids), bool), prompt.tiles, prompt.tilings)
            batch = collate([sample], tokenizer.control(PAD), config.model.vision.patches_per_tile)
            pictures = (
                None if batch.tiles is None else Pictures(pixel_values(batch.tiles), batch.order, batch.downscales)
            )
            found.append(_said(model(batch.ids, pictures)[0], answer, tokenizer.control(IMAGE)))
    return found


def say_everywhere(form: Format, digits: Path, folder: Path) -> tuple[list[Completion], list[Said], list[Said]]:
    """Train some steps at TP 2 x PP 2, export, and ask vLLM, transformers and ourselves, greedily."""
    overrides: Overrides = {
        **FORMATS[form],
        "data__path": digits,
        "data__blend": "{digits/easy/thinking: 1, digits/hard/non_thinking: 1}",
        "model__language__vocab_size": 390,
        "model__tile_grids": "[[1, 1], [1, 2], [2, 1], [2, 2], [3, 3]]",
        "train__trained": "[vision, projector, language, embeddings]",
        "train__steps": 8,
        "train__global_batch": 16,
        "train__micro_batch": 4,
        "run_dir": folder / "run",
    }
    run_on_ranks(train, 4, tiny_config(**overrides, **TP2, **PP2))
    directory = folder / "model"
    run_alone(export_run, folder / "run", directory, form)
    by_vllm: list[Completion] = run_alone(_by_vllm, directory, form)
    answers = [completion.ids for completion in by_vllm]
    by_transformers: list[Said] = run_alone(_by_transformers, directory, form, answers)
    (by_ourselves,) = run_on_ranks(_by_ourselves, 1, tiny_config(**overrides), directory, form, answers)
    return by_vllm, by_transformers, by_ourselves


def same_answers(completions: list[Completion], said: list[Said]) -> bool:
    """Whether every greedy answer is vLLM's, token by token."""
    return [completion.ids for completion in completions] == [each.ids for each in said]


def largest_difference(completions: list[Completion], said: list[Said]) -> float:
    """Of the log-probabilities of vLLM's answers, in nats."""
    return max(largest_differences(completions, [each.logprobs for each in said]))

"""Answers that vLLM samples from an exported directory, and their log-probabilities under our own model."""

from itertools import cycle
from pathlib import Path

import numpy as np
import torch

from megatron_mm.chat.images import TileRules, pixel_values
from megatron_mm.chat.modes import Mode
from megatron_mm.chat.render import Prompt, Question, Sample, render_prompt
from megatron_mm.chat.tokenizer import IMAGE, PAD, ChatTokenizer
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.loader import collate
from megatron_mm.generation.engine import Completion, Engine
from megatron_mm.models.vlm import Pictures, VisionLanguageModel, build_model
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from megatron_mm.weights.stream import from_hf
from megatron_mm.weights.tables import model_table
from tests.onevision import picture_sets

QUESTION = "Which digit is top left?"


def questions() -> list[Question]:
    """The question about each set of pictures of tests/onevision.py: none, one of each shape, two, three."""
    return [Question.about(QUESTION, pictures) for pictures in picture_sets()]


def rendered(directory: Path) -> list[Prompt]:
    """The prompts of `questions`, in changing modes."""
    tokenizer, rules = ChatTokenizer(directory), TileRules.of_directory(directory)
    pairs = zip(questions(), cycle(Mode), strict=False)
    return [render_prompt(question, mode, tokenizer, rules) for question, mode in pairs]


def sample_with_vllm(directory: Path) -> list[Completion]:
    """One answer to each prompt, see `sample_with`."""
    return sample_with(Engine(directory, "float32", seed=1), directory)


def sample_with(engine: Engine, directory: Path) -> list[Completion]:
    """One answer to each prompt, sampled at temperature 1.

    They have so many tokens that a random model practically always draws control tokens too; which ones depends on how
    vLLM batches the prompts.
    """
    pictures = [question.pictures for question in questions()]
    return engine.generate(rendered(directory), pictures, max_tokens=64, temperature=1.0)


def our_logprobs(
    config: RunConfig, directory: Path, weights: list[dict[str, torch.Tensor]], answers: list[list[int]]
) -> list[list[list[float]]]:
    """Log-probability of each answer token under our model, with each of the weights. Runs on every rank."""
    tokenizer = ChatTokenizer(directory)
    platform = get_platform("cpu")
    found = []
    with state.process_group(platform), state.model_parallel(config.parallel, 0) as groups, torch.no_grad():
        chunks = build_model(config, platform, groups, tokenizer.control(IMAGE))
        for tensors in weights:
            from_hf(chunks, model_table(config.model), tensors)
            pairs = zip(rendered(directory), answers, strict=True)
            found.append([_answer_logprobs(chunks[0], prompt, answer, tokenizer) for prompt, answer in pairs])
    return found


def _answer_logprobs(
    model: VisionLanguageModel, prompt: Prompt, answer: list[int], tokenizer: ChatTokenizer
) -> list[float]:
    ids = np.concatenate([prompt.ids, answer])
    sample = Sample(ids, np.zeros(len(ids), bool), prompt.tiles, prompt.tilings)
    batch = collate([sample], tokenizer.control(PAD), patches_per_tile=16)
    pictures = None if batch.tiles is None else Pictures(pixel_values(batch.tiles), batch.order, batch.downscales)
    # The loss of a token is minus its log-probability.
    return (-model(batch.ids, pictures, labels=batch.labels))[0, len(prompt.ids) - 1 :].tolist()


def largest_differences(completions: list[Completion], logprobs: list[list[float]]) -> list[float]:
    """Largest difference of each answer's log-probabilities, in nats."""
    pairs = zip(completions, logprobs, strict=True)
    return [float(np.abs(np.array(completion.logprobs) - np.array(ours)).max()) for completion, ours in pairs]

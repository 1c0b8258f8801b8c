"""What we export is what vLLM runs: same prompt ids, same log-probabilities of its own answers, with pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from megatron_mm.chat.images import TileRules
from megatron_mm.chat.modes import TEMPLATE_NAMES, Mode
from megatron_mm.chat.render import render_prompt
from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.shards import TOKENIZER
from megatron_mm.generation.engine import Completion
from megatron_mm.weights.export import write_directory
from tests.answers import QUESTION, largest_differences, our_logprobs, questions, sample_with_vllm
from tests.layouts import EXPERTS, Overrides
from tests.ranks import run_alone, run_on_ranks
from tests.tiny import in_order, r4b_tensors, reference_models, tiny_config

# fp32 on both sides, sums in another order; measured at 1e-5 on log-probabilities of about -5.
TOLERANCE = 1e-4

Exported = tuple[RunConfig, Path, dict[str, torch.Tensor]]


MODELS: dict[str, Overrides] = {"tied": {}, "untied": {"model__language__tied_embeddings": False}, "experts": EXPERTS}


@pytest.fixture(scope="module", params=MODELS)
def exported(request: pytest.FixtureRequest, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A random model and its exported directory."""
    config = tiny_config(model__language__vocab_size=384, **MODELS[request.param])
    tensors = r4b_tensors(config, *reference_models(config))
    directory = tmp_path_factory.mktemp("exported") / "model"
    tokenizer = ChatTokenizer(digits / TOKENIZER)
    write_directory(directory, config.model, tokenizer, in_order(config, tensors), torch.float32)
    return config, directory, tensors


@pytest.fixture(scope="module")
def completions(exported: Exported) -> list[Completion]:
    """What vLLM answers."""
    return run_alone(sample_with_vllm, exported[1])


def test_logprobs_of_vllms_own_answers_equal_ours(exported: Exported, completions: list[Completion]) -> None:
    config, directory, tensors = exported
    answers = [completion.ids for completion in completions]
    assert sum(map(len, answers)) > 60
    # The comparison must see the picture and its row ends: another newline vector fails it for every picture.
    moved = {**tensors, "model.image_newline": -tensors["model.image_newline"]}
    ((ours, others),) = run_on_ranks(our_logprobs, 1, config, directory, [tensors, moved], answers)
    assert max(largest_differences(completions, ours)) < TOLERANCE
    with_pictures = [bool(question.pictures) for question in questions()]
    assert [difference > 10 * TOLERANCE for difference in largest_differences(completions, others)] == with_pictures


def test_answers_show_their_control_tokens(exported: Exported, completions: list[Completion]) -> None:
    tokenizer, num_shown = ChatTokenizer(exported[1]).hf, 0
    for text, number in tokenizer.get_added_vocab().items():
        for completion in completions:
            # The end of turn ends an answer and is no part of it.
            ids = completion.ids[: -1 if completion.finished else None]
            assert completion.text.count(text) == ids.count(number), (text, completion)
            num_shown += ids.count(number)
    assert num_shown > 0


def test_the_directory_renders_what_we_render(exported: Exported) -> None:
    _, directory, _ = exported
    processor = AutoProcessor.from_pretrained(directory)
    tokenizer, rules = ChatTokenizer(directory), TileRules.of_directory(directory)
    for question in questions():
        content = [*({"type": "image"} for _ in question.pictures), {"type": "text", "text": QUESTION}]
        messages = [{"role": "user", "content": content}]
        for mode in Mode:
            text = processor.apply_chat_template(
                messages, add_generation_prompt=True, thinking_mode=TEMPLATE_NAMES[mode], tokenize=False
            )
            theirs = processor(images=list(question.pictures) or None, text=text, return_tensors="np")
            assert np.array_equal(theirs["input_ids"][0], render_prompt(question, mode, tokenizer, rules).ids)
    messages = [{"role": "user", "content": QUESTION}]
    default = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert default.endswith("<|im_start|>assistant\n<think>")

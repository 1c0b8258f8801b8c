"""Ids, tiles, features, logits, gradients and updates against transformers' LlavaOnevisionForConditionalGeneration."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_mm.chat.images import TileRules, pixel_values
from megatron_mm.chat.modes import Mode
from megatron_mm.chat.render import Question, render_prompt
from megatron_mm.chat.tokenizer import IMAGE, ChatTokenizer
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.shards import TOKENIZER
from tests.layouts import (
    LOSS_TOLERANCE,
    STEPS,
    assert_equal_gradients,
    assert_equal_weights,
    module_of,
    outcomes,
)
from tests.onevision import (
    QUESTION,
    by_transformers,
    largest_difference,
    model_inputs,
    onevision_config,
    our_logits,
    picture_sets,
    reference_model,
    reference_processor,
    samples_of,
    their_logits,
)
from tests.ranks import run_on_ranks
from tests.tiny import r4b_tensors, reference_models

# fp32 on both sides, sums in another order.
LOGITS_TOLERANCE = 1e-4


@pytest.fixture
def tokenizer_directory(digits: Path) -> Path:
    return digits / TOKENIZER


def test_ids_and_tiles(tokenizer: ChatTokenizer) -> None:
    config = onevision_config()
    processor, rules = reference_processor(config, tokenizer), TileRules.of_model(config.model)
    texts, prompts = [], []
    for pictures in picture_sets():
        content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": QUESTION}]
        messages = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        prompts.append(render_prompt(Question.about(QUESTION, pictures), Mode.AUTO, tokenizer, rules))
    assert any(grid.downscaled for prompt in prompts for grid in prompt.tilings)
    for theirs, prompt in zip(by_transformers(config, tokenizer, texts), prompts, strict=True):
        assert np.array_equal(theirs["input_ids"][0], prompt.ids)
        first = 0
        for picture, grid in zip(theirs.get("pixel_values", ()), prompt.tilings, strict=True):
            ours = pixel_values(torch.from_numpy(prompt.tiles[first : first + grid.num_tiles])).numpy()
            first += grid.num_tiles
            assert picture.shape == ours.shape
            # Both are multiples of 2 / 255, made by the same resize.
            assert np.abs(picture.numpy() - ours).max() < 1e-5
        assert first == len(prompt.tiles)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_alone_and_packed(tied: bool, tokenizer: ChatTokenizer, tokenizer_directory: Path) -> None:
    config = onevision_config(model__language__tied_embeddings=tied)
    tensors = r4b_tensors(config, *reference_models(config))
    theirs = their_logits(config, tokenizer)
    ((alone, packed),) = run_on_ranks(our_logits, 1, config, tensors, tokenizer_directory, "")
    assert largest_difference(alone, theirs) < LOGITS_TOLERANCE
    assert largest_difference(packed, theirs) < LOGITS_TOLERANCE


@pytest.mark.parametrize(
    ("fault", "alone_differs", "packed_differs"),
    [
        ("a shifted placeholder", True, True),
        ("swapped tiles", True, True),
        ("queries and keys swapped, both ways", True, True),
        ("gate and up swapped, both ways", True, True),
        ("a missing newline", True, True),
        ("positions restart a token late", False, True),
        ("attention leaks over a sample's border", False, True),
    ],
)
def test_planted_faults_are_caught(
    fault: str, alone_differs: bool, packed_differs: bool, tokenizer: ChatTokenizer, tokenizer_directory: Path
) -> None:
    config = onevision_config()
    tensors = r4b_tensors(config, *reference_models(config))
    theirs = their_logits(config, tokenizer)
    ((alone, packed),) = run_on_ranks(our_logits, 1, config, tensors, tokenizer_directory, fault)
    assert (largest_difference(alone, theirs) > 10 * LOGITS_TOLERANCE) == alone_differs
    assert (largest_difference(packed, theirs) > 10 * LOGITS_TOLERANCE) == packed_differs


def _their_steps(
    config: RunConfig, tokenizer: ChatTokenizer
) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses of some steps, gradients of the first, weights after the last, by transformers and torch's AdamW."""
    model, optim = reference_model(config, tokenizer.control(IMAGE)), config.optim
    named = {name: parameter for name, parameter in model.named_parameters() if "post_layernorm" not in name}
    groups = []
    for name, parameter in named.items():
        rate = optim.modules.get(module_of(name))  # pyright: ignore[reportArgumentType]
        lr, min_lr = (
            (optim.lr, optim.min_lr) if rate is None else (rate.lr, rate.lr if rate.min_lr is None else rate.min_lr)
        )
        decay = optim.weight_decay if parameter.ndim > 1 else 0.0
        groups.append({"params": [parameter], "weight_decay": decay, "max_lr": lr, "min_lr": min_lr})
    optimizer = torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2))
    losses, grads = [], {}
    for step in range(STEPS):
        for group in optimizer.param_groups:
            angle = math.pi * (step + 1) / config.train.steps
            group["lr"] = group["min_lr"] + (group["max_lr"] - group["min_lr"]) * (1 + math.cos(angle)) / 2
        samples = samples_of(config, tokenizer, step)
        num_tokens = sum(int(sample.trained[1:].sum()) for sample in samples)
        total = 0.0
        for inputs, sample in zip(model_inputs(config, tokenizer, samples), samples, strict=True):
            labels = torch.from_numpy(np.where(sample.trained[1:], sample.ids[1:], -100))
            loss = F.cross_entropy(model(**inputs).logits[0], labels, reduction="sum") / num_tokens
            loss.backward()
            total += loss.item()
        losses.append(total)
        if step == 0:
            grads = {name: parameter.grad.clone() for name, parameter in named.items() if parameter.grad is not None}
        torch.nn.utils.clip_grad_norm_(named.values(), optim.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
    rename = {name: name.replace("vision_tower.", "vision_tower.vision_model.") for name in named}
    return (
        losses,
        {rename[name]: grad for name, grad in grads.items()},
        {rename[name]: parameter.data for name, parameter in named.items()},
    )


def test_gradients_and_updates_equal_transformers_and_torchs_adamw(
    tokenizer: ChatTokenizer, tokenizer_directory: Path
) -> None:
    num_samples = len(picture_sets())
    config = onevision_config(
        data__packed="true",
        train__global_batch=num_samples,
        train__micro_batch=6,
        optim__weight_decay=0.1,
        optim__modules="{vision: {lr: 3.0e-4}, embeddings: {lr: 5.0e-4, min_lr: 2.0e-4}}",
    )
    tensors = r4b_tensors(config, *reference_models(config))
    ((ours,),) = run_on_ranks(outcomes, 1, "cpu", [config], tensors, tokenizer_directory, samples_of)
    their_losses, their_grads, their_weights = _their_steps(config, tokenizer)
    assert np.abs(np.array(ours.losses) - np.array(their_losses)).max() < LOSS_TOLERANCE
    assert_equal_gradients(ours.grads, their_grads)
    assert_equal_weights(ours.weights, their_weights)

"""Floating-point operations against PyTorch's own count, of the reference models and of real training steps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_mm.chat.images import TileRules
from megatron_mm.chat.render import Conversation, Question, Rendering, Response, render_sample
from megatron_mm.chat.tokenizer import IMAGE, PAD, ChatTokenizer
from megatron_mm.config.flops import recomputed_flops, training_flops
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.loader import collate
from megatron_mm.data.shards import TOKENIZER
from megatron_mm.models.vlm import build_model
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from megatron_mm.train.assemble import build_trainee
from megatron_mm.train.step import train_step
from tests.ranks import run_on_ranks
from tests.tiny import random_picture, reference_models, tiny_config

TOKENS = 24
EVERYTHING = ("vision", "projector", "language", "embeddings")
# What learns in the stages, and what shows each single rule.
TRAINED = (("projector",), ("vision", "projector"), ("language",), ("vision",), ("embeddings",), EVERYTHING)
RECOMPUTATIONS = ("selective", "full")


def _counted(run, *trained: torch.nn.Module) -> int:
    """Operations of a forward and backward pass in which the modules learn."""
    for module in trained:
        module.requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        run().float().sum().backward()
    return counter.get_total_flops()


def test_a_language_models_tokens_and_squares() -> None:
    config = tiny_config()
    _, qwen = reference_models(config)
    qwen.config._attn_implementation = "eager"
    flops = training_flops(config.model, ["language", "embeddings"])
    ids = torch.zeros((1, TOKENS), dtype=torch.long)
    counted = _counted(lambda: qwen.model(ids).last_hidden_state, qwen)
    # PyTorch counts all pairs of tokens, we those under the causal mask.
    assert flops.of(TOKENS, 2 * TOKENS**2, 0, 0) == pytest.approx(counted, rel=1e-3)


def test_a_vits_tile() -> None:
    config = tiny_config()
    siglip, _ = reference_models(config)
    siglip.config._attn_implementation = "eager"
    side = config.model.vision.image_size
    pixels = torch.zeros((1, 3, side, side))
    counted = _counted(lambda: siglip(pixel_values=pixels).last_hidden_state, siglip)
    vision = training_flops(config.model, ["vision"]).tile
    # The projector passes the gradient on: forward and the gradient of its input.
    projector = 2 * 2 * (64 + 128) * 128 * config.model.vision.patches_per_tile
    assert vision - projector == pytest.approx(counted, rel=1e-3)


def _steps(configs: list[RunConfig], tokenizer_directory: Path) -> list[tuple[int, int, int, int, int]]:
    """Operations that PyTorch counts in one training step of each, tokens, their squares, tiles, trained tokens."""
    platform, tokenizer = get_platform("cpu"), ChatTokenizer(tokenizer_directory)
    found = []
    with state.process_group(platform):
        for config in configs:
            random, rules = np.random.default_rng(0), TileRules.of_model(config.model)
            samples = []
            for shape in ((32, 32), (30, 20)):
                asked = Question.about("Say 12.", (random_picture(shape, random),))
                conversation = Conversation.of(asked, Response("12", None))
                samples.append(render_sample(conversation, Rendering.PRETRAIN, tokenizer, rules))
            patches = config.model.vision.patches_per_tile
            batches = [collate([sample], tokenizer.control(PAD), patches) for sample in samples]
            with state.model_parallel(config.parallel, config.seed) as groups:
                chunks = build_model(config, platform, groups, tokenizer.control(IMAGE))
                trainee = build_trainee(config, chunks, groups)
                with FlopCounterMode(display=False) as counter:
                    result = train_step(trainee, batches, platform.device())
            lengths = [batch.num_tokens for batch in batches]
            # Longer ones go to a kernel that PyTorch does not count.
            assert max(lengths) <= 64
            tiles = sum(len(batch.tiles) for batch in batches if batch.tiles is not None)
            squares = sum(length**2 for length in lengths)
            found.append((counter.get_total_flops(), sum(lengths), squares, tiles, result.trained_tokens))
    return found


def _config(trained: tuple[str, ...], recompute: str, **overrides: object) -> RunConfig:
    values = {"train__trained": f"[{', '.join(trained)}]", "train__recompute": recompute, **overrides}
    return tiny_config(model__language__vocab_size=384, **values)


NO_PRE_NORM = {"model__projector__pre_norm": "false"}
EXPERTS = {
    "model__language__experts": "{num_experts: 8, experts_per_token: 2, ffn_hidden_size: 64}",
    "model__language__tied_embeddings": "false",
}


def test_training_steps_of_every_stage_and_recomputation(digits: Path) -> None:
    recomputed = [(trained, how) for trained in (("projector",), ("language",), EVERYTHING) for how in RECOMPUTATIONS]
    configs = [_config(*pair) for pair in [*((trained, "none") for trained in TRAINED), *recomputed]]
    configs += [_config(EVERYTHING, "full", **EXPERTS), _config(("projector",), "none", **NO_PRE_NORM)]
    (steps,) = run_on_ranks(_steps, 1, configs, digits / TOKENIZER)
    for config, (counted, tokens, squares, tiles, trained_tokens) in zip(configs, steps, strict=True):
        trained, recompute = config.train.trained, config.train.recompute
        reckoned = sum(
            # All pairs, as the kernel for short sequences does.
            flops.of(tokens, 2 * squares, tiles, trained_tokens)
            for flops in (training_flops(config.model, trained), recomputed_flops(config.model, trained, recompute))
        )
        assert reckoned == pytest.approx(counted, rel=1e-6), f"{trained}, recompute {recompute}"

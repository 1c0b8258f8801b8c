"""Steps on text only: ViT and projector do not run if no collective waits for them, and training is the same."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mm.chat.images import TileRules
from megatron_mm.chat.render import Conversation, Question, Rendering, Response, Sample, render_sample
from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.shards import TOKENIZER
from megatron_mm.models.vision import VisionModel
from tests.layouts import PP2, SP, Outcome, Overrides, layout, outcomes
from tests.ranks import run_on_ranks
from tests.tiny import r4b_tensors, reference_models

TOLERANCE = 1e-6
OVERLAP: Overrides = {"optim__overlap": "true"}
ENCODERS: Overrides = {"train__trained": "[vision, projector]"}
LAYOUTS: dict[int, dict[str, Overrides]] = {
    1: {
        "everything learns": {},
        # Nothing that learns takes part in the loss.
        "vision and projector alone": ENCODERS,
        "vision and projector alone, recomputed": {**ENCODERS, "train__recompute": "full"},
        "language alone": {"train__trained": "[language]"},
        "language alone, recomputed": {"train__trained": "[language]", "train__recompute": "full"},
    },
    2: {
        "pipeline, vision and projector alone": {**ENCODERS, **PP2},
        "tiles shared out": {**SP, "model__vision__parallel": "data"},
        "data-parallel": {},
    },
}


def _of_text(config: RunConfig, tokenizer: ChatTokenizer, step: int) -> list[Sample]:
    rules = TileRules.of_model(config.model)
    asked = [Conversation.of(Question.about(f"Say {step}."), Response(str(number) * 9, None)) for number in range(8)]
    return [render_sample(conversation, Rendering.PRETRAIN, tokenizer, rules) for conversation in asked]


def _outcomes(
    configs: list[RunConfig], tensors: dict[str, torch.Tensor], tokenizer_directory: Path
) -> list[tuple[Outcome, int]]:
    """Of each config, and how often the ViT ran for it. Runs on every rank."""
    begun: list[RunConfig] = []
    calls = [0] * len(configs)
    forward = VisionModel.forward

    def samples_of(config: RunConfig, tokenizer: ChatTokenizer, step: int) -> list[Sample]:
        if config is not (begun or [None])[-1]:
            begun.append(config)
        return _of_text(config, tokenizer, step)

    def counted(self: VisionModel, tiles: torch.Tensor) -> torch.Tensor:
        calls[len(begun) - 1] += 1
        return forward(self, tiles)

    module: Any = VisionModel
    module.forward = counted  # in this process, which ends with the test
    return list(zip(outcomes("cpu", configs, tensors, tokenizer_directory, samples_of), calls, strict=True))


@pytest.mark.parametrize("num_ranks", LAYOUTS)
def test_training_is_that_of_blank_tiles(num_ranks: int, digits: Path) -> None:
    named, config = LAYOUTS[num_ranks], layout()
    configs = [layout(**{**own, **more}) for own in named.values() for more in ({}, OVERLAP)]
    tensors = r4b_tensors(config, *reference_models(config))
    results = run_on_ranks(_outcomes, num_ranks, configs, tensors, digits / TOKENIZER)
    for rank, of_rank in enumerate(results):
        for name, (plain, calls), (blank, blank_calls) in zip(named, of_rank[::2], of_rank[1::2], strict=True):
            has_vision = "pipeline" not in name or rank == 0
            assert calls == 0, name
            assert (blank_calls > 0) == has_vision, name
            assert plain.losses == pytest.approx(blank.losses, abs=TOLERANCE), name
            for ours, theirs in ((plain.grads, blank.grads), (plain.weights, blank.weights)):
                assert ours.keys() == theirs.keys()
                for tensor_name, tensor in ours.items():
                    torch.testing.assert_close(
                        tensor, theirs[tensor_name], rtol=0, atol=TOLERANCE, msg=f"{name}: {tensor_name}"
                    )
            assert rank > 0 or plain.weights

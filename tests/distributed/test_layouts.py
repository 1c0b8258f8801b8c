"""Every parallel layout against a single process: losses, every parameter's gradient, weights after three updates."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_mm.data.shards import TOKENIZER
from megatron_mm.models import attention, language, vision
from megatron_mm.models.language import LanguageModel
from tests.layouts import (
    EXPERT_LAYOUTS,
    EXPERTS,
    GRADIENT_TOLERANCE,
    LAYOUTS,
    LOSS_TOLERANCE,
    Outcome,
    assert_equal_gradients,
    assert_equal_weights,
    largest_relative,
    layout,
    module_of,
    outcomes,
)
from tests.ranks import run_on_ranks
from tests.tiny import r4b_tensors, reference_models

NO_LANGUAGE = {"train__trained": "[vision, projector]"}
LANGUAGE_ALONE = {"train__trained": "[language]"}


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """Weights of the model that all layouts start from."""
    config = layout()
    return r4b_tensors(config, *reference_models(config))


@pytest.fixture(scope="module")
def single(digits: Path, tensors: dict[str, torch.Tensor]) -> Outcome:
    """What one process does."""
    ((outcome,),) = run_on_ranks(outcomes, 1, "cpu", [layout()], tensors, digits / TOKENIZER)
    assert np.isfinite(outcome.losses).all()
    counts: Counter[str] = Counter()
    for name, tensor in tensors.items():
        counts[module_of(name)] += tensor.numel()
    assert outcome.num_trained == dict(counts)
    # Each part of the data has samples of its own kind of loss.
    of_parts = np.array(outcome.parts)
    assert np.allclose(of_parts[..., 0].sum(1) / of_parts[..., 1].sum(1), outcome.losses, atol=LOSS_TOLERANCE)
    assert (np.ptp(of_parts[..., 0] / of_parts[..., 1], axis=1) > 1e-3).all()
    # The updates must matter, or what is compared after them says nothing.
    assert outcome.losses[0] - outcome.losses[-1] > 0.1
    return outcome


def _assert_equal(outcome: Outcome, reference: Outcome) -> None:
    assert np.abs(np.array(outcome.losses) - np.array(reference.losses)).max() < LOSS_TOLERANCE
    assert outcome.num_trained == reference.num_trained
    sums, expected = np.array(outcome.parts), np.array(reference.parts)  # [steps, parts, 2]
    assert (sums[..., 1] == expected[..., 1]).all()
    assert np.abs(sums[..., 0] / sums[..., 1] - expected[..., 0] / expected[..., 1]).max() < LOSS_TOLERANCE
    if outcome.grads:  # rank 0
        assert_equal_gradients(outcome.grads, reference.grads)
        assert_equal_weights(outcome.weights, reference.weights)


def _compare(names: list[str], of_ranks: list[list[Outcome]], reference: Outcome) -> None:
    for results in of_ranks:
        for name, outcome in zip(names, results, strict=True):
            try:
                _assert_equal(outcome, reference)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_layout_equals_a_single_process(
    num_ranks: int, digits: Path, tensors: dict[str, torch.Tensor], single: Outcome
) -> None:
    names = [name for name, (ranks, _) in LAYOUTS.items() if ranks == num_ranks]
    configs = [layout(**LAYOUTS[name][1]) for name in names]
    _compare(names, run_on_ranks(outcomes, num_ranks, "cpu", configs, tensors, digits / TOKENIZER), single)


def test_models_with_experts(digits: Path) -> None:
    config = layout(**EXPERTS)
    arguments = (r4b_tensors(config, *reference_models(config)), digits / TOKENIZER)
    ((reference,),) = run_on_ranks(outcomes, 1, "cpu", [config], *arguments)
    for num_ranks in (1, 2, 4):
        names = [name for name, (ranks, _) in EXPERT_LAYOUTS.items() if ranks == num_ranks]
        configs = [layout(**EXPERT_LAYOUTS[name][1]) for name in names]
        _compare(names, run_on_ranks(outcomes, num_ranks, "cpu", configs, *arguments), reference)


@pytest.mark.parametrize(
    ("trained", "other"),
    [
        # A pipeline stage with nothing to train.
        (NO_LANGUAGE, {"parallel__pipeline": 2}),
        (NO_LANGUAGE, {"parallel__tensor": 2, "model__vision__parallel": "data"}),
        # Recomputed layers behind inputs that ask for no gradient.
        (LANGUAGE_ALONE, {"train__recompute": "full", "parallel__tensor": 2}),
    ],
)
def test_partly_frozen_models(
    trained: dict[str, object], other: dict[str, object], digits: Path, tensors: dict[str, torch.Tensor]
) -> None:
    arguments = (tensors, digits / TOKENIZER)
    ((reference,),) = run_on_ranks(outcomes, 1, "cpu", [layout(**trained)], *arguments)
    moved = {name for name, tensor in reference.weights.items() if not torch.equal(tensor, tensors[name])}
    assert moved == reference.grads.keys()
    for (outcome,) in run_on_ranks(outcomes, 2, "cpu", [layout(**trained, **other)], *arguments):
        _assert_equal(outcome, reference)


def _in_blocks(*arguments: object) -> list[Outcome]:
    """`outcomes` with losses in many blocks of the vocabulary. Runs on every rank, whose process ends after it."""
    language.vocab_block = lambda _, num_rows: max(num_rows // 5, 1)
    return outcomes(*arguments)  # pyright: ignore


def test_losses_in_blocks_of_the_vocabulary(digits: Path, tensors: dict[str, torch.Tensor], single: Outcome) -> None:
    names = ["TP 2", "TP 2 + SP, recompute full", "PP 2", "CP 2", "DP 2, unpacked"]
    configs = [layout(**LAYOUTS[name][1]) for name in names]
    _compare(names, run_on_ranks(_in_blocks, 2, "cpu", configs, tensors, digits / TOKENIZER), single)


@pytest.mark.parametrize(
    "model", [{"model__language__tied_embeddings": "false"}, NO_LANGUAGE], ids=["untied", "frozen output layer"]
)
def test_losses_in_blocks_of_other_output_layers(model: dict[str, object], digits: Path) -> None:
    config = layout(**model)
    arguments = (r4b_tensors(config, *reference_models(config)), digits / TOKENIZER)
    ((reference,),) = run_on_ranks(outcomes, 1, "cpu", [config], *arguments)
    for (outcome,) in run_on_ranks(_in_blocks, 2, "cpu", [layout(**model, **LAYOUTS["TP 2"][1])], *arguments):
        _assert_equal(outcome, reference)


def _with_fault(fault: str, *arguments: object) -> list[Outcome]:
    """`outcomes` with a gradient that is not summed over ranks. Runs on every rank, whose process ends after it."""
    if fault == "norms under sequence parallelism":
        attention.Norm.__init__ = _unmarked(attention.Norm.__init__)
    if fault == "tiles shared out":
        vision.SharedOutVisionModel.__init__ = _unmarked(vision.SharedOutVisionModel.__init__)
    if fault == "keys and values of other ranks":
        gather = attention.gather_from_sequence_parallel_region
        attention.gather_from_sequence_parallel_region = lambda x, group: gather(x, False, group)
    if fault == "hidden states of the output layer":
        make = LanguageModel.__init__

        def without(self: LanguageModel, *args: object, **kwargs: object) -> None:
            make(self, *args, **kwargs)  # pyright: ignore
            self.output_layer.allreduce_dgrad = False
            self.output_layer.disable_grad_reduce = True

        LanguageModel.__init__ = without  # pyright: ignore
    return outcomes(*arguments)  # pyright: ignore


def _unmarked(make):
    """A constructor whose parameters lose the mark by which Megatron-Core knows whose gradients to sum."""

    def without(self: torch.nn.Module, *args: object, **kwargs: object) -> None:
        make(self, *args, **kwargs)
        for parameter in self.parameters():
            for mark in ("sequence_parallel", "average_gradients_across_tp_domain"):
                if hasattr(parameter, mark):
                    delattr(parameter, mark)

    return without


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ("norms under sequence parallelism", "TP 2 + SP"),
        ("hidden states of the output layer", "TP 2 + SP"),
        ("tiles shared out", "TP 2, vision data-parallel"),
        ("keys and values of other ranks", "CP 2"),
    ],
)
def test_a_gradient_that_is_not_summed_is_caught(
    fault: str, name: str, digits: Path, tensors: dict[str, torch.Tensor], single: Outcome
) -> None:
    config = layout(**LAYOUTS[name][1])
    (outcome,), _ = run_on_ranks(_with_fault, 2, fault, "cpu", [config], tensors, digits / TOKENIZER)
    # The forward pass does not show it, nor would a look at the first loss.
    assert abs(outcome.losses[0] - single.losses[0]) < LOSS_TOLERANCE
    assert largest_relative(outcome.grads, single.grads)[0] > 10 * GRADIENT_TOLERANCE

"""Gradients summed over ranks during the backward pass: the same training, also through checkpoints and exports."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.checkpoint.paths import newest
from megatron_mm.checkpoint.store import content_of, resume, write
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.shards import TOKENIZER
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from megatron_mm.train import assemble
from megatron_mm.train.assemble import Trainee
from megatron_mm.train.step import CrossEntropy, train_step
from tests.layouts import (
    CP2,
    EXPERTS,
    NUM_PARTS,
    PLAIN,
    PP2,
    Outcome,
    Overrides,
    largest_relative,
    layout,
    micro_batches,
    outcomes,
    samples_of_step,
    trainees,
    weights,
)
from tests.ranks import run_on_ranks
from tests.tiny import r4b_tensors, reference_models

# Parameters that make up a bucket, so that the miniature model has several; Megatron-Core's own are of 40 million.
BUCKET_SIZE = 20_000
# Only the global norm, and so the clipping, is summed in another order.
TOLERANCE = 1e-6
OVERLAP: Overrides = {"optim__overlap": "true"}
LAYOUTS: dict[int, dict[str, Overrides]] = {
    2: {
        "distributed optimizer": {},
        "plain optimizer": PLAIN,
        "language alone": {"train__trained": "[language]", "train__recompute": "full"},
        # A rank's last micro-batch has no image.
        "vision and projector alone": {"train__trained": "[vision, projector]"},
        "CP 2": CP2,
    },
    4: {"interleaved pipeline": {**PP2, "parallel__virtual_pipeline": 2}},
}


def _with_small_buckets() -> None:
    """In this process, which ends with the test."""
    made: Any = assemble.DistributedDataParallelConfig
    assemble.DistributedDataParallelConfig = partial(made, bucket_size=BUCKET_SIZE)  # pyright: ignore


def _outcomes(*arguments: Any) -> list[Outcome]:
    """`outcomes` with several buckets. Runs on every rank."""
    _with_small_buckets()
    return outcomes(*arguments)


def _assert_same(overlapped: Outcome, plain: Outcome) -> None:
    assert np.abs(np.array(overlapped.losses) - np.array(plain.losses)).max() < TOLERANCE
    if plain.grads:  # rank 0
        assert largest_relative(overlapped.grads, plain.grads)[0] < TOLERANCE
        assert largest_relative(overlapped.weights, plain.weights)[0] < TOLERANCE


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_training_is_the_same(num_ranks: int, digits: Path) -> None:
    named, config = LAYOUTS[num_ranks], layout()
    configs = [layout(**{**own, **more}) for own in named.values() for more in ({}, OVERLAP)]
    tensors = r4b_tensors(config, *reference_models(config))
    for results in run_on_ranks(_outcomes, num_ranks, "cpu", configs, tensors, digits / TOKENIZER):
        for name, plain, overlapped in zip(named, results[::2], results[1::2], strict=True):
            try:
                _assert_same(overlapped, plain)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None


def test_experts(digits: Path) -> None:
    """Of which some get no token of a rank's last micro-batch."""
    configs = [layout(**EXPERTS), layout(**EXPERTS, **OVERLAP)]
    tensors = r4b_tensors(configs[0], *reference_models(configs[0]))
    for plain, overlapped in run_on_ranks(_outcomes, 2, "cpu", configs, tensors, digits / TOKENIZER):
        _assert_same(overlapped, plain)


def _begun_in_the_backward_pass(trainee: Trainee) -> list[bool]:
    """Of each bucket, whether its collective is under way when the backward pass has ended; filled by the next step."""
    begun: list[bool] = []

    def seen(group: Any, finish: Any, **keywords: Any) -> None:
        begun.append(group.grad_reduce_handle is not None)
        finish(**keywords)

    for chunk in trainee.ddp:
        groups: Any = chunk.bucket_groups
        for group in groups:
            group.finish_grad_sync = partial(seen, group, group.finish_grad_sync)
    return begun


Went = tuple[list[float], dict[str, torch.Tensor]]


def _through_a_checkpoint(
    configs: list[RunConfig], tensors: dict[str, torch.Tensor], tokenizer_directory: Path
) -> tuple[list[list[bool]], list[Went]]:
    """Two steps with each config, each from the other's checkpoint of the first. Runs on every rank.

    Returns:
        What `_begun_in_the_backward_pass` says of the second step, and that step's loss and weights.
    """
    _with_small_buckets()
    platform, tokenizer = get_platform("cpu"), ChatTokenizer(tokenizer_directory)
    begun, went = [], []

    def step(trainee: Trainee, config: RunConfig, number: int) -> float:
        batches = micro_batches(config, samples_of_step(config, tokenizer, number), tokenizer)
        return train_step(trainee, batches, platform.device(), CrossEntropy(NUM_PARTS)).loss

    with state.process_group(platform):
        for config, trainee in trainees(platform, configs, tokenizer, tensors):
            first = step(trainee, config, 0)
            write(config.run_dir, 1, content_of(1, trainee.chunks, trainee.optimizer, {}))
            begun.append(_begun_in_the_backward_pass(trainee))
            went.append(([first, step(trainee, config, 1)], weights(config, trainee)))
        for config, other in zip(configs, reversed(configs), strict=True):
            for _, trainee in trainees(platform, [config], tokenizer, tensors):
                checkpoint = newest(other.run_dir)
                assert checkpoint is not None
                resume(checkpoint, trainee.chunks, trainee.optimizer)
                trainee.set_step(1)
                went.append(([went[0][0][0], step(trainee, config, 1)], weights(config, trainee)))
    return begun, went


def test_a_checkpoint_of_either_resumes_in_the_other(digits: Path, tmp_path: Path) -> None:
    configs = [layout(run_dir=tmp_path / "plain"), layout(run_dir=tmp_path / "overlapped", **OVERLAP)]
    tensors = r4b_tensors(configs[0], *reference_models(configs[0]))
    for (plain, overlapped), went in run_on_ranks(_through_a_checkpoint, 2, configs, tensors, digits / TOKENIZER):
        assert len(overlapped) > 3
        assert all(overlapped)
        assert not any(plain)
        (losses, expected), *others = went
        for other_losses, others_weights in others:
            assert np.abs(np.array(other_losses) - np.array(losses)).max() < TOLERANCE
            if expected:  # rank 0
                assert largest_relative(others_weights, expected)[0] < TOLERANCE

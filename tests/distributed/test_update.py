"""An update of the policy is the same in every layout; its log-probabilities are those of the reference it is given."""

from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from megatron_mm.chat.images import TileRules
from megatron_mm.chat.modes import Mode
from megatron_mm.chat.render import Prompt, Question, render_prompt, trigger_ids
from megatron_mm.chat.tokenizer import PAD, ChatTokenizer
from megatron_mm.config.schema import ObjectiveConfig, RunConfig
from megatron_mm.data.shards import TOKENIZER
from megatron_mm.grading.rewards import Grade
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from megatron_mm.rl.experience import Rollout, RolloutBatch, Wording, micro_batches
from megatron_mm.rl.offload import HostCopy, Offload
from megatron_mm.rl.update import PolicyLoss, Reference, score, with_values
from megatron_mm.train.assemble import Trainee
from megatron_mm.train.step import forward_backward, train_step
from tests.layouts import CP2, PP2, SP, TP2, Overrides, assert_equal_gradients, gradients, layout, trainees
from tests.ranks import run_on_ranks
from tests.tiny import r4b_tensors, random_picture, reference_models

MAX_RESPONSE_TOKENS = 24
UNPACKED: Overrides = {"data__packed": "false"}
LAYOUTS: dict[int, dict[str, Overrides]] = {
    1: {"packed": {}, "unpacked": UNPACKED},
    2: {
        "TP 2": TP2,
        "TP 2 + SP, unpacked": {**SP, **UNPACKED},
        "PP 2": PP2,
        "PP 2, unpacked": {**PP2, **UNPACKED},
        "PP 2, interleaved": {**PP2, "parallel__virtual_pipeline": 2},
        "DP 2": {},
        "DP 2, unpacked": UNPACKED,
        "CP 2": CP2,
        "CP 2, unpacked": {**CP2, **UNPACKED},
    },
    4: {"TP 2 x CP 2": {**TP2, **CP2}, "PP 2 x DP 2": PP2},
}
OBJECTIVES = {
    "GRPO": ObjectiveConfig(kl_coef=0.1),
    "everything else": ObjectiveConfig(
        ratio="sequence", average="constant", kl_estimator="k1", mismatch="truncate", entropy_coef=0.05, clip_low=0.05
    ),
    "triggers masked": ObjectiveConfig(average="token", mask_trigger_tokens=True, mismatch="mask", kl="none"),
}
Outcome = dict[str, tuple[dict[str, torch.Tensor], list[list[float]]]]


def _rollouts(
    config: RunConfig, tokenizer: ChatTokenizer, number: int | None = None
) -> tuple[list[Rollout], list[Prompt], torch.Tensor]:
    """Responses of all lengths in all modes, with pictures and without; their prompts and advantages.

    Args:
        number: the first so many.
    """
    random, rules = np.random.default_rng(0), TileRules.of_model(config.model)
    rollouts, prompts = [], []
    shapes = [[(32, 32)], [], [(90, 40), (20, 20)], [(33, 70)]] * 3
    for row, (mode, sizes) in enumerate(zip([*Mode] * 4, shapes, strict=True)):
        question = Question.about(f"Number {row}?", [random_picture(size, random) for size in sizes])
        prompt = render_prompt(question, Mode.AUTO, tokenizer, rules)
        drawn = random.integers(10, 200, random.integers(1, MAX_RESPONSE_TOKENS))
        prompts.append(prompt)
        rollouts.append(
            Rollout(
                row=row,
                wording=Wording("", "", "", ""),
                prompt_tokens=len(prompt.ids),
                prompt_tiles=len(prompt.tiles),
                mode=mode,
                given=trigger_ids(mode, tokenizer),
                drawn=array("i", drawn.tolist()),
                logprobs=array("f", random.normal(-5, 1, len(drawn)).tolist()),
                text="",
                finished=True,
                grade=Grade(0.0),
            )
        )
    return rollouts[:number], prompts, torch.tensor(random.normal(size=len(rollouts))).float()


def _batches(
    config: RunConfig, objective: ObjectiveConfig, trainee: Trainee, tokenizer: ChatTokenizer, number: int | None = None
) -> list[RolloutBatch]:
    rollouts, prompts, advantages = _rollouts(config, tokenizer, number)
    batches = micro_batches(
        rollouts,
        prompts.__getitem__,
        config,
        objective,
        MAX_RESPONSE_TOKENS,
        tokenizer.control(PAD),
        state.data_rank(),
        state.data_ranks(),
        trainee.chunks[0].groups.cp,
    )
    return with_values(batches, advantages=[advantages[batch.tokens.responses] for batch in batches])


def _updates(
    configs: list[RunConfig], tensors: dict[str, torch.Tensor], tokenizer_directory: Path, number: int | None = None
) -> list[Outcome]:
    """Gradients and sums of one update with each objective, in each layout. Runs on every rank."""
    platform, tokenizer, found = get_platform("cpu"), ChatTokenizer(tokenizer_directory), []
    with state.process_group(platform):
        for config, trainee in trainees(platform, configs, tokenizer, tensors):
            found.append(
                {name: _update(config, objective, trainee, tokenizer, number) for name, objective in OBJECTIVES.items()}
            )
    return found


def _update(
    config: RunConfig, objective: ObjectiveConfig, trainee: Trainee, tokenizer: ChatTokenizer, number: int | None
) -> tuple[dict[str, torch.Tensor], list[list[float]]]:
    device = torch.device("cpu")
    batches = _batches(config, objective, trainee, tokenizer, number)
    trainee.chunks[-1].language.makes_entropies = objective.entropy_coef > 0
    now = score(trainee, batches, device)
    # Smooth functions of the token's own log-probability, so that they are the same in every layout.
    batches = with_values(batches, old=[one + 0.3 * torch.sin(3 * one) for one in now])
    if objective.kl == "loss":
        batches = with_values(batches, reference=[one + 0.2 * torch.cos(2 * one) for one in now])
    # Near the engine's too, or every weight would be cut off.
    batches = [
        replace(
            batch,
            tokens=replace(
                batch.tokens,
                sampled=torch.where(batch.tokens.sampled.isnan(), torch.nan, one + 0.9 * torch.cos(5 * one)),
            ),
        )
        for batch, one in zip(batches, now, strict=True)
    ]
    for ddp in trainee.ddp:
        ddp.zero_grad_buffer()
    rollouts, _, _ = _rollouts(config, tokenizer, number)
    loss = PolicyLoss(objective, sum(one.num_trained(objective) for one in rollouts))
    sums = forward_backward(trainee, batches, device, loss)
    return gradients(config, trainee), sums.tolist()


def test_every_layout_makes_the_same_update(digits: Path) -> None:
    small: Overrides = {"train__micro_batch": 2, "data__max_sequence_tokens": 256, "data__max_pack_tiles": 8}
    single = layout(**small, **UNPACKED)
    tensors = r4b_tensors(single, *reference_models(single))
    expected: Outcome = {}
    for num_ranks, named in LAYOUTS.items():
        configs = [layout(**{**small, **overrides}) for overrides in named.values()]
        outcomes = run_on_ranks(_updates, num_ranks, configs, tensors, digits / TOKENIZER)[0]
        expected = expected or outcomes[0]
        for name, outcome in zip(named, outcomes, strict=True):
            for objective, (grads, sums) in outcome.items():
                expected_grads, expected_sums = expected[objective]
                try:
                    assert_equal_gradients(grads, expected_grads)
                except AssertionError as error:
                    raise AssertionError(f"{name}, {objective}: {error}") from None
                assert np.allclose(sums, expected_sums, rtol=1e-4, atol=1e-4), (name, objective)
    for objective, (grads, sums) in expected.items():
        assert all(tensor.abs().max() > 0 for tensor in grads.values())
        (_, tokens), _, (clipped, _), *_ = sums
        assert 0 < clipped < tokens, objective
    assert expected["triggers masked"][1][0][1] < expected["GRPO"][1][0][1]


@pytest.mark.parametrize(("packed", "number"), [(False, 3), (True, 1)])
def test_too_few_responses_for_the_ranks_make_the_same_update(digits: Path, packed: bool, number: int) -> None:
    small: Overrides = {"train__micro_batch": 1, "data__max_sequence_tokens": 256, "data__max_pack_tiles": 8}
    config = layout(**small, **({} if packed else UNPACKED))
    tensors = r4b_tensors(config, *reference_models(config))
    one, two = (run_on_ranks(_updates, ranks, [config], tensors, digits / TOKENIZER, number)[0][0] for ranks in (1, 2))
    for objective, (grads, sums) in two.items():
        expected_grads, expected_sums = one[objective]
        assert_equal_gradients(grads, expected_grads)
        assert np.allclose(sums, expected_sums, rtol=1e-4, atol=1e-4), objective


def _with_room_made(
    config: RunConfig, tensors: dict[str, torch.Tensor], tokenizer_directory: Path
) -> list[list[torch.Tensor]]:
    """Weights after one update, and after two with nothing between them or room made for an engine."""
    platform, tokenizer, found = get_platform("cpu"), ChatTokenizer(tokenizer_directory), []
    device = get_platform("cpu")
    device.has_own_memory = True
    with state.process_group(platform):
        for updates, makes_room in ((1, False), (2, False), (2, True)):
            for _, trainee in trainees(platform, [config], tokenizer, tensors):
                room = Offload(trainee, device, is_on=True)
                for _ in range(updates):
                    batches = _batches(config, OBJECTIVES["GRPO"], trainee, tokenizer)
                    batches = with_values(batches, old=score(trainee, batches, platform.device()))
                    tokens = int(sum(batch.trained.sum() for batch in batches))
                    train_step(trainee, batches, platform.device(), PolicyLoss(OBJECTIVES["GRPO"], tokens))
                    if makes_room:
                        (ddp,) = cast(list[Any], trainee.ddp)
                        optimizers = trainee.optimizer.chained_optimizers
                        states = [value for one in optimizers for value in one.optimizer.state.values()]
                        assert states
                        with room.away():
                            assert [one.grad_data.untyped_storage().size() for one in ddp.buffers] == [0]
                            assert {one["exp_avg"].untyped_storage().size() for one in states} == {0}
                            masters = (p for one in optimizers for g in one.optimizer.param_groups for p in g["params"])
                            assert {parameter.untyped_storage().size() for parameter in masters} == {0}
                found.append([parameter.detach().clone() for parameter in trainee.chunks[0].parameters()])
    return found


def test_making_room_for_an_engine_changes_nothing(digits: Path) -> None:
    config = layout(precision="bf16", train__micro_batch=2, data__max_sequence_tokens=256, data__max_pack_tiles=8)
    tensors = {name: one.bfloat16() for name, one in r4b_tensors(config, *reference_models(config)).items()}
    ((first, second, with_room),) = run_on_ranks(_with_room_made, 1, config, tensors, digits / TOKENIZER)
    assert not all(map(torch.equal, first, second))
    assert all(map(torch.equal, second, with_room))


def _scored(config: RunConfig, tensors: dict[str, torch.Tensor], tokenizer_directory: Path) -> list[float]:
    """Differences of log-probabilities: the reference's after a change, the changed policy's. Runs on every rank."""
    platform, tokenizer, differences = get_platform("cpu"), ChatTokenizer(tokenizer_directory), []
    with state.process_group(platform):
        for _, trainee in trainees(platform, [config], tokenizer, tensors):
            references = Reference(trainee.chunks), Reference(trainee.chunks, HostCopy(platform))
            objective = OBJECTIVES["GRPO"]
            batches = _batches(config, objective, trainee, tokenizer)
            before = torch.cat(score(trainee, batches, platform.device()))
            with torch.no_grad():
                for parameter in trainee.chunks[0].parameters():
                    parameter.mul_(1.1)
            after = torch.cat(score(trainee, batches, platform.device()))
            of_references = []
            for reference in references:
                with reference.in_place():
                    of_references.append(torch.cat(score(trainee, batches, platform.device())))
            again = torch.cat(score(trainee, batches, platform.device()))
            pairs = *((one, before) for one in of_references), (after, before), (again, after)
            differences = [float((one - other).abs().max()) for one, other in pairs]
    return differences


def test_the_reference_stays_what_it_was(digits: Path) -> None:
    config = layout(**TP2)
    tensors = r4b_tensors(config, *reference_models(config))
    for of_reference, of_hosts, changed, again in run_on_ranks(_scored, 2, config, tensors, digits / TOKENIZER):
        assert of_reference == of_hosts == 0
        assert changed > 0.01
        assert again == 0


@pytest.mark.parametrize("masked", [False, True])
def test_given_tokens_are_trained_unless_they_are_masked(tokenizer: ChatTokenizer, masked: bool) -> None:
    config, objective = layout(**UNPACKED), ObjectiveConfig(mask_trigger_tokens=masked)
    rollouts, _, _ = _rollouts(config, tokenizer)
    for rollout in rollouts:
        given = {Mode.AUTO: 0, Mode.THINKING: 1, Mode.NON_THINKING: 2}[rollout.mode]
        assert len(rollout.given) == given
        assert rollout.num_trained(objective) == len(rollout.drawn) + (0 if masked else given)

"""What a step of reinforcement learning does: bring the engine up to date, draw, grade, credit, update."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_mm.config.schema import ReinforceConfig, RunConfig, StageConfig
from megatron_mm.generation.engine import Sampling
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import Platform
from megatron_mm.parallel.watchdog import Watchdog
from megatron_mm.rl.alarm import ModeAlarm
from megatron_mm.rl.algorithms import Algorithm, is_flat
from megatron_mm.rl.exchange import StaleWeightsError, WeightExchange
from megatron_mm.rl.experience import Rollout, RolloutBatch, micro_batches
from megatron_mm.rl.heldout import HeldOut
from megatron_mm.rl.objective import response_divergence
from megatron_mm.rl.offload import Offload
from megatron_mm.rl.questions import Questions
from megatron_mm.rl.report import Report, write_rollouts
from megatron_mm.rl.sampler import Sampler
from megatron_mm.rl.update import PolicyLoss, Reference, score, with_values
from megatron_mm.train.assemble import Trainee
from megatron_mm.train.guard import Guard
from megatron_mm.train.run import Place
from megatron_mm.train.step import StepResult, train_step


@dataclass(slots=True)
class Practice:
    """The steps of a run that learns from its own responses (train/run.py Work).

    Attributes:
        reference: the weights that the run began with; None where nothing is compared with them.
        held_out: None where train.validate_every is left out.
        pad: id that fills up.
        warn: takes what the user should know.
        num_exchanges: weight syncs since the run began or was rolled back.
        is_stale: whether the engine has other weights than the trainer, or none.
    """

    config: RunConfig
    rl: ReinforceConfig
    platform: Platform
    trainee: Trainee
    offload: Offload
    questions: Questions
    sampler: Sampler
    exchange: WeightExchange
    algorithm: Algorithm
    reference: Reference | None
    guard: Guard
    watchdog: Watchdog
    report: Report
    held_out: HeldOut | None
    alarm: ModeAlarm
    pad: int
    warn: Callable[[str], None]
    num_exchanges: int = 0
    is_stale: bool = True

    def begin(self, place: Place) -> None:
        """See Work."""
        del place
        self.num_exchanges, self.is_stale = 0, True
        self.report.restart()

    def take_step(self, place: Place, *, is_logged: bool) -> tuple[StepResult, int]:
        """See Work."""
        del is_logged
        stage = self.rl.stage(place.step)
        # The policy is what responses are drawn from.
        self.trainee.chunks[-1].language.temperature = stage.temperature
        groups, used = self._draw(place, stage)
        # Fewer updates where fewer questions are left than there are to be.
        parts = [groups[number :: self.rl.updates] for number in range(min(self.rl.updates, len(groups)))]
        with self._part(place.step, "batches"):
            batches = [self._batches([one for group in part for one in group], stage) for part in parts]
        with self._part(place.step, "score"):
            scored = [self._scored(one, stage) for one in batches]
        advantages = [self._advantages(part, batches) for part, batches in zip(parts, scored, strict=True)]
        with self._part(place.step, "update"):
            result = self._update(parts, scored, advantages, place.step)
        self.is_stale = True
        self._keep(place.step + 1, parts, advantages)
        self.report.take_in(parts, advantages)
        return result, used

    def metrics(self, place: Place, result: StepResult) -> dict[str, float]:
        """See Work."""
        held_out = {}
        if self.held_out is not None and self.config.train.is_validated(place.step):
            with self._drawing(place.step, "validation", keeps_weights=True):
                held_out = self.held_out.run(self.sampler, self.rl.stage(place.step - 1).max_response_tokens)
            self.alarm.look(place.step, held_out["heldout/think_rate"], "held-out questions")
        figures = self.report.metrics()
        if self.held_out is None and "think_rate" in figures:
            self.alarm.look(place.step, figures["think_rate"], "step's questions")
        rate = max(group["lr"] for group in self.trainee.optimizer.param_groups)
        learned = {"loss": result.loss, "grad_norm": result.grad_norm, "lr": rate}
        counted = {"skipped_updates": self.guard.num_skipped, "rollbacks": self.guard.num_rollbacks}
        return {**learned, "trained_tokens": result.trained_tokens, **figures, **held_out, **counted}

    def state(self) -> dict[str, Any]:
        """See Work."""
        return {"has_both_modes": self.alarm.has_both, "questions": self.sampler.state()}

    def load(self, state: dict[str, Any]) -> None:
        """See Work."""
        self.alarm.has_both = state["has_both_modes"]
        self.sampler.load(state["questions"])

    def _draw(self, place: Place, stage: StageConfig) -> tuple[list[list[Rollout]], int]:
        """Groups of responses, and how many steps of the plan they took: more where flat ones are passed over."""
        modes = self.algorithm.modes(stage.group_size)
        sampling = Sampling(stage.max_response_tokens, stage.temperature, stage.top_p)
        kept: list[list[Rollout]] = []
        groups: list[list[Rollout]] = []
        with self._drawing(place.step, "rollout"):
            for draw in range(self.rl.max_draws):
                self.watchdog.at(place.step, f"draw {draw + 1}")
                data_step = place.data_step + draw
                groups = self.sampler.draw(self.questions.rows(data_step), modes, sampling, data_step)
                flat = is_flat(_rewards(groups)).tolist()
                self.report.count_draw(flat)
                if self.rl.max_draws == 1:
                    return groups, 1
                kept += [group for group, no_signal in zip(groups, flat, strict=True) if not no_signal]
                if len(kept) >= len(groups):
                    return kept[: len(groups)], draw + 1
        # Nothing is better than what there is; a whole batch without a signal teaches nothing, and is still a step.
        return kept or groups, self.rl.max_draws

    def _batches(self, rollouts: Sequence[Rollout], stage: StageConfig) -> list[RolloutBatch]:
        """This rank's micro-batches."""
        return micro_batches(
            rollouts,
            self.questions.prompt,
            self.config,
            self.rl.objective,
            stage.max_response_tokens,
            self.pad,
            state.data_rank(),
            state.data_ranks(),
            self.trainee.chunks[0].groups.cp,
        )

    def _scored(self, batches: Sequence[RolloutBatch], stage: StageConfig) -> list[RolloutBatch]:
        """The same micro-batches with what policy and reference think of their tokens."""
        device = self.platform.device()
        scored = with_values(batches, old=score(self.trainee, batches, device))
        self._compare_with_engine(scored, stage)
        if self.reference is not None:
            with self.reference.in_place():
                scored = with_values(scored, reference=score(self.trainee, batches, device))
        return scored

    def _compare_with_engine(self, batches: Sequence[RolloutBatch], stage: StageConfig) -> None:
        """See that the engine drew the tokens with the probabilities that the trainer has."""
        tokens = [batch.tokens for batch in batches]
        differences = torch.cat([(one.old - one.sampled).abs()[one.sampled.isfinite()] for one in tokens]).double()
        device = self.platform.device()
        sums = torch.stack([differences.sum(), torch.tensor(float(len(differences))).double()]).to(device)
        total, number = state.sum_over_data(state.broadcast_from_last_stage(sums)).tolist()
        largest = differences.max() if len(differences) else torch.zeros((), dtype=torch.float64)
        worst = state.largest_over_data(state.broadcast_from_last_stage(largest.to(device)))
        mean = total / number
        self.report.note(**{"logprob_difference/mean": mean, "logprob_difference/max": float(worst)})
        # Tokens beyond top_p were not to be had, which makes the others so much more probable.
        if not mean <= self.rl.rollout.max_logprob_difference - math.log(stage.top_p):
            raise StaleWeightsError(
                f"log-probabilities of the engine's own tokens differ from the trainer's by {mean:.3g} on average (at "
                f"most {float(worst):.3g}), more than rl.rollout.max_logprob_difference="
                f"{self.rl.rollout.max_logprob_difference}, though its weights are the same to the bit: both compute "
                "something else of them"
            )

    def _advantages(self, groups: Sequence[Sequence[Rollout]], batches: Sequence[RolloutBatch]) -> Tensor:
        """Of the responses, group by group: float [R]."""
        rewards = _rewards(groups)
        objective = self.rl.objective
        if objective.kl == "reward":
            parts = [response_divergence(objective, batch.tokens, rewards.numel()) for batch in batches]
            charged = torch.stack(parts).sum(0).to(self.platform.device())
            charged = state.sum_over_data(state.broadcast_from_last_stage(charged)).cpu()
            rewards = rewards - objective.kl_coef * charged.view_as(rewards)
        return self.algorithm.advantages(rewards).flatten().float()

    def _update(
        self,
        parts: Sequence[Sequence[Sequence[Rollout]]],
        scored: Sequence[Sequence[RolloutBatch]],
        advantages: Sequence[Tensor],
        step: int,
    ) -> StepResult:
        results = []
        objective, stage = self.rl.objective, self.rl.stage(step)
        for number, (part, batches, credit) in enumerate(zip(parts, scored, advantages, strict=True)):
            self.watchdog.at(step, f"update {number + 1}")
            credited = with_values(batches, advantages=[credit[batch.tokens.responses] for batch in batches])
            num_tokens = sum(one.num_trained(objective) for group in part for one in group)
            result = train_step(
                self.trainee,
                credited,
                self.platform.device(),
                PolicyLoss(objective, num_tokens),
                self.guard.judge,
                advances=number == 0,
                rate=1.0 if stage.lr is None else stage.lr / self.config.optim.lr,
            )
            self.report.note_update(result)
            results.append(result)
        skipped = next((result.skipped for result in results if result.skipped is not None), None)
        return replace(
            results[-1],
            loss=sum(result.loss for result in results) / len(results),
            grad_norm=sum(result.grad_norm for result in results) / len(results),
            trained_tokens=sum(result.trained_tokens for result in results),
            skipped=skipped,
        )

    def _keep(self, step: int, parts: Sequence[Sequence[Sequence[Rollout]]], advantages: Sequence[Tensor]) -> None:
        try:
            write_rollouts(self.config.run_dir, step, parts, advantages)
        except OSError as error:
            self.warn(f"the responses of step {step} are not kept: {error}")

    @contextmanager
    def _drawing(self, step: int, name: str, *, keeps_weights: bool = False) -> Iterator[None]:
        """Within, the engine has the memory and the trainer's weights; afterwards the trainer has the memory.

        Weights are synced here and not after the update, so that the trainer makes room once for both, and is whole
        when a checkpoint is written.
        """
        with self.offload.away(lambda: self._part(step, "offload")):
            if self.is_stale:
                self._sync_weights(step)
            with self._part(step, name):
                yield
                self.sampler.rest(keeps_weights=keeps_weights)

    def _sync_weights(self, step: int) -> None:
        compare_all = self.num_exchanges % self.rl.rollout.compare_all_every == 0
        self.num_exchanges += 1
        with self._part(step, "exchange"):
            self.report.note_exchange(self.exchange(compare_all=compare_all))
        self.is_stale = False

    @contextmanager
    def _part(self, step: int, name: str) -> Iterator[None]:
        self.watchdog.at(step, name)
        with self.report.timed(name):
            yield


def _rewards(groups: Sequence[Sequence[Rollout]]) -> Tensor:
    """Float64 [P, K]."""
    return torch.tensor([[one.grade.reward for one in group] for group in groups], dtype=torch.float64)

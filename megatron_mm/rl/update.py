"""Updates of the policy from credited responses."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mm.config.schema import ObjectiveConfig
from megatron_mm.models.vlm import VisionLanguageModel
from megatron_mm.parallel.platform import to_device
from megatron_mm.rl.experience import RolloutBatch
from megatron_mm.rl.objective import chances, policy_terms
from megatron_mm.rl.offload import HostCopy
from megatron_mm.train.assemble import Trainee
from megatron_mm.train.step import forward_backward

# What is summed up over the tokens of an update besides the loss.
METRICS = ("kl", "clip_share", "ratio", "entropy", "mismatch")


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """The objective of an update (train/step.py Objective).

    Attributes:
        config: of it.
        num_tokens: trained tokens of the mini-batch over all ranks, by which Megatron-Core divides; those that weigh
            nothing are not counted.
    """

    config: ObjectiveConfig
    num_tokens: int

    @property
    def num_sums(self) -> int:
        """The loss, then METRICS."""
        return 1 + len(METRICS)

    def __call__(
        self, losses: Tensor, batch: RolloutBatch, context: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Objective."""
        losses, entropies = losses.unbind(-1) if self.config.entropy_coef else (losses, None)
        tokens = batch.tokens.map(lambda tensor: to_device(tensor, losses.device))
        terms = policy_terms(self.config, -losses, tokens, entropies, context if context.size() > 1 else None)
        loss = terms.loss.sum() * self.num_tokens
        # Without the bonus the entropy is estimated by what was drawn.
        entropy = losses * chances(-losses, tokens) if entropies is None else entropies
        values = (terms.kl, terms.clipped, terms.log_ratio.exp(), entropy, terms.mismatch)
        counted = tokens.weights > 0
        # Not values[counted], whose size the host would have to wait for.
        sums = [torch.where(counted, value.detach().double(), 0.0).sum() for value in values]
        sums = torch.stack([loss.detach().double(), *sums])
        number = counted.sum()
        return loss, number.int(), torch.stack([sums, number.expand_as(sums)], 1)


@dataclass(slots=True)
class _Scores:
    """An objective that minimises nothing and keeps the log-probabilities that it sees."""

    found: list[Tensor] = field(default_factory=list)
    num_sums: int = 1

    def __call__(self, losses: Tensor, batch: Any, context: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
        del batch, context
        self.found.append(-(losses[..., 0] if losses.dim() == 2 else losses).detach())
        nothing = losses.detach().sum() * 0
        return nothing, torch.ones((), dtype=torch.int, device=losses.device), nothing.double().expand(1, 2)


def score(trainee: Trainee, batches: Sequence[RolloutBatch], device: torch.device) -> list[Tensor]:
    """Log-probabilities [N] of each micro-batch's tokens on this rank; on other stages than the last zeros."""
    scores = _Scores()
    forward_backward(trainee, batches, device, scores, learns=False)
    if not scores.found:
        return [torch.zeros_like(batch.tokens.old) for batch in batches]
    return [found.cpu() for found in scores.found]


def with_values(batches: Sequence[RolloutBatch], **values: Sequence[Tensor]) -> list[RolloutBatch]:
    """The same micro-batches with other values of their tokens: old, reference, advantages."""
    made = list(batches)
    for name, of_batches in values.items():
        pairs = zip(made, of_batches, strict=True)
        made = [replace(batch, tokens=replace(batch.tokens, **{name: one})) for batch, one in pairs]
    return made


class Reference:
    """The weights that a run began with, to be put in place of the policy's for a while.

    Args:
        chunks: hold them now.
        host: keeps them as long as they are not in place; left out, they stay in the device's memory.
    """

    def __init__(self, chunks: Sequence[VisionLanguageModel], host: HostCopy | None = None):
        self._parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        self._host, self._weights = host, list[Tensor]()
        if host is None:
            self._weights = [parameter.detach().clone() for parameter in self._parameters]
        else:
            host.write([_flat_bytes(parameter.detach().contiguous()) for parameter in self._parameters])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the model computes with them; nothing may learn."""
        held = [parameter.data for parameter in self._parameters]
        weights = self._weights
        if self._host is not None:
            weights = [torch.empty_like(data, memory_format=torch.contiguous_format) for data in held]
            self._host.read([_flat_bytes(weight) for weight in weights])
        for parameter, weight in zip(self._parameters, weights, strict=True):
            parameter.data = weight
        try:
            yield
        finally:
            for parameter, data in zip(self._parameters, held, strict=True):
                parameter.data = data


def _flat_bytes(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor as flat uint8."""
    return tensor.view(-1).view(torch.uint8)

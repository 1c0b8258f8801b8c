"""One optimizer step over the micro-batches of a rank, on Megatron-Core's schedules."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_mm.chat.images import Downscale, pixel_values
from megatron_mm.config.errors import InputError
from megatron_mm.data.loader import Batch
from megatron_mm.models.packing import zigzag
from megatron_mm.models.vlm import Pictures
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import to_device
from megatron_mm.train.assemble import Trainee


class Objective(Protocol):
    """What an update minimises, of the losses that the model makes for a micro-batch's trained tokens.

    Attributes:
        num_sums: pairs of (sum, number) that are added up over the global batch; the first is of the loss.
    """

    @property
    def num_sums(self) -> int: ...

    def __call__(self, losses: Tensor, batch: Any, context: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
        """What a micro-batch adds; called on the last stage alone.

        Args:
            losses: [N] minus the log-probability of each trained token on this rank, as the model orders them.
            batch: of them.
            context: this rank's context-parallel group.

        Returns:
            What is minimised, with gradients, which Megatron-Core divides by the number that follows, summed over all
            ranks: int []; and the sums, float64 [num_sums, 2].
        """
        ...


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """The mean loss over the trained tokens of the global batch, and that of each part of the data.

    Attributes:
        num_parts: of the data.
    """

    num_parts: int = 1

    @property
    def num_sums(self) -> int:
        """The loss of all tokens, then of each part's."""
        return 1 + self.num_parts

    def __call__(self, losses: Tensor, batch: Batch, context: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
        """See Objective."""
        parts = to_device(_parts_of_tokens(batch)[trained_order(batch, context)], losses.device)
        # Filled on the device: torch.tensor would copy the number there, and wait for the copy.
        loss_sum, num_tokens = losses.sum(), torch.full((), losses.numel(), device=losses.device, dtype=torch.int)
        each = torch.stack([losses.detach().double(), torch.ones_like(losses, dtype=torch.float64)], 1)
        sums = torch.zeros(self.num_sums, 2, dtype=torch.float64, device=losses.device)
        sums.index_add_(0, parts + 1, each)
        sums[0, 0], sums[0, 1] = loss_sum.detach(), num_tokens
        return loss_sum, num_tokens, sums


# Why an update would do harm, from the loss and the gradient norm; None where it would not.
Judge = Callable[[float, float], str | None]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did.

    Attributes:
        loss: mean over the trained tokens of the global batch; of a cross-entropy, in nats.
        grad_norm: global gradient norm before clipping.
        lr: learning rate of the step.
        trained_tokens: of the global batch.
        sums: float64 [num_sums - 1, 2], what the objective adds up over the global batch besides the loss.
        skipped: why there was no update, None where there was one.
        module_norms: gradient norm of each module, where it was asked for.
    """

    loss: float
    grad_norm: float
    lr: float
    trained_tokens: int
    sums: Tensor
    skipped: str | None = None
    module_norms: dict[str, float] = field(default_factory=dict)


def train_step(
    trainee: Trainee,
    batches: Sequence[Batch],
    device: torch.device,
    objective: Objective = CrossEntropy(),  # noqa: B008
    judge: Judge | None = None,
    look: Callable[[Trainee], dict[str, float]] | None = None,
    *,
    advances: bool = True,
    rate: float = 1.0,
) -> StepResult:
    """Forward, backward, update.

    Args:
        trainee: what learns.
        batches: this rank's micro-batches of the step.
        device: of this rank.
        objective: what is minimised.
        judge: says whether the update is made; the same on every rank, since loss and norm are.
        look: at the gradients before they are clipped; what it finds is `module_norms`.
        advances: False for further updates of the same step, which learn at its rates.
        rate: learning rates are those of the schedule times this.
    """
    for chunk in trainee.ddp:
        chunk.zero_grad_buffer()
    trainee.optimizer.zero_grad()
    totals = forward_backward(trainee, batches, device, objective)
    if advances:
        trainee.scheduler.step(1)
        for group in trainee.optimizer.param_groups:
            group["lr"] *= rate
    trainee.optimizer.prepare_grads()
    grad_norm = float(trainee.optimizer.get_grad_norm() or 0.0)
    loss_sum, num_tokens = totals[0].tolist()
    loss = loss_sum / num_tokens
    norms = look(trainee) if look is not None else {}
    skipped = None if judge is None else judge(loss, grad_norm)
    if skipped is None:
        clip_gradients(trainee, grad_norm)
        trainee.optimizer.step_with_ready_grads()
    lr = max(group["lr"] for group in trainee.optimizer.param_groups)
    return StepResult(loss, grad_norm, lr, int(num_tokens), totals[1:], skipped, norms)


def clip_gradients(trainee: Trainee, grad_norm: float) -> None:
    """Scale gradients down to `optim.clip_grad` where their global norm is above it."""
    timers: Any = trainee.chunks[0].config.timers
    if timers is not None:
        timers("optimizer-clip-main-grad", log_level=1).start()
    for part in trainee.optimizer.chained_optimizers:
        parameters = cast(list[Tensor], part.get_parameters())
        if parameters:
            clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=grad_norm)
    if timers is not None:
        timers("optimizer-clip-main-grad", log_level=1).stop()


def forward_backward(
    trainee: Trainee,
    batches: Sequence[Batch],
    device: torch.device,
    objective: Objective = CrossEntropy(),  # noqa: B008
    *,
    learns: bool = True,
) -> Tensor:
    """Accumulate gradients of an objective over the global batch.

    Args:
        learns: False makes the sums only.

    Returns:
        float64 [num_sums, 2]: the objective's sums over the global batch, on every rank.

    Raises:
        InputError: the GPU's memory does not hold a micro-batch.
    """
    source = _Batches(batches)
    context: AbstractContextManager[Any] = nullcontext() if learns else torch.no_grad()
    try:
        with context:
            results = get_forward_backward_func()(
                forward_step_func=partial(_forward_step, device=device, objective=objective),
                # Every chunk sees every micro-batch.
                data_iterator=[source.again() for _ in trainee.ddp],
                model=list(trainee.ddp),
                num_microbatches=len(batches),
                # Only a shape for pipeline buffers, which variable_seq_lengths exchanges for the real one.
                seq_length=batches[0].ids.shape[1],
                micro_batch_size=batches[0].ids.shape[0],
                forward_only=not learns,
            )
    except torch.OutOfMemoryError as error:
        raise InputError(f"out of memory in {source.last_shapes()}: {str(error).splitlines()[0]}") from error
    totals = torch.stack(results).sum(0) if results else torch.zeros(objective.num_sums, 2, device=device).double()
    return state.sum_over_data(state.broadcast_from_last_stage(totals))


class _Batches:
    """The micro-batches of a step, and which of them was taken last."""

    def __init__(self, batches: Sequence[Batch]):
        self._batches = batches
        self._last = batches[0]

    def again(self) -> Iterator[Batch]:
        for self._last in self._batches:  # noqa: B020 (remembered on purpose)
            yield self._last

    def last_shapes(self) -> str:
        batch = self._last
        num_tiles = 0 if batch.tiles is None else len(batch.tiles)
        rows, tokens = batch.ids.shape
        return (
            f"a micro-batch of {rows} x {tokens:,} tokens ({batch.num_samples} samples, {num_tiles} tiles, "
            f"{int(batch.trained.sum()):,} trained tokens); lower train.micro_batch, data.max_sequence_tokens or "
            "data.max_pack_tiles, set train.recompute=full, or cut the model over more ranks"
        )


def _forward_step(batches: Iterator[Batch], model: torch.nn.Module, device: torch.device, objective: Objective):
    batch = next(batches)
    # Only the chunk with the ViT looks at them.
    pictures = _pictures(batch, device) if get_attr_wrapped_model(model, "pre_process") else None
    losses = model(
        batch.ids,
        pictures,
        batch.starts,
        batch.labels,
        batch.trained,
    )
    groups: Any = get_attr_wrapped_model(model, "groups")
    return losses, lambda losses: objective(losses, batch, groups.cp)


def _pictures(batch: Batch, device: torch.device) -> Pictures | None:
    if batch.tiles is None:
        return None
    downscales = tuple(Downscale(to_device(downscale.plane, device), downscale.size) for downscale in batch.downscales)
    return Pictures(pixel_values(to_device(batch.tiles, device)), to_device(batch.order, device), downscales)


def trained_order(batch: Batch, context: dist.ProcessGroup) -> Tensor:
    """Numbers of a micro-batch's trained tokens, counted sample by sample, that this rank has as the model orders them.

    Returns:
        int64 [N].
    """
    numbers, trained = batch.trained.flatten().cumsum(0).view_as(batch.trained) - 1, batch.trained
    if context.size() > 1:
        bounds = [0, batch.ids.shape[1]] if batch.starts is None else batch.starts.tolist()
        positions = zigzag(bounds, context.rank(), context.size())
        numbers, trained = numbers[:, positions], trained[:, positions]
    return numbers[trained]


def _parts_of_tokens(batch: Batch) -> Tensor:
    """The part of the data that each trained token belongs to, counted sample by sample: int64."""
    if batch.starts is None:
        parts = batch.parts[:, None].expand_as(batch.trained)
    else:
        parts = batch.parts.repeat_interleave(batch.starts.diff().long())[None]
    return parts[batch.trained]

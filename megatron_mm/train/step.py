"""One optimizer step over the micro-batches of a rank, on Megatron-Core's schedules."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_mm.chat.images import Downscale, pixel_values
from megatron_mm.data.loader import Batch
from megatron_mm.models.vlm import Pictures
from megatron_mm.parallel import state
from megatron_mm.train.assemble import Trainee


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did.

    Attributes:
        loss: mean cross-entropy over the trained tokens of the global batch, in nats.
        grad_norm: global gradient norm before clipping.
        lr: learning rate of the step.
        trained_tokens: of the global batch.
    """

    loss: float
    grad_norm: float
    lr: float
    trained_tokens: int


def train_step(trainee: Trainee, batches: list[Batch], device: torch.device) -> StepResult:
    """Forward, backward, update.

    Args:
        trainee: what learns.
        batches: this rank's micro-batches of the step.
        device: of this rank.
    """
    for chunk in trainee.ddp:
        chunk.zero_grad_buffer()
    trainee.optimizer.zero_grad()
    totals = forward_backward(trainee, batches, device)
    trainee.scheduler.step(1)
    update: Any = trainee.optimizer.step()
    _, grad_norm, _ = update
    loss_sum, num_tokens = totals.tolist()
    lr = max(group["lr"] for group in trainee.optimizer.param_groups)
    return StepResult(loss_sum / num_tokens, float(grad_norm or 0.0), lr, int(num_tokens))


def forward_backward(trainee: Trainee, batches: list[Batch], device: torch.device) -> Tensor:
    """Accumulate gradients of the mean loss over the global batch's trained tokens.

    Returns:
        [2]: sum of the loss and number of trained tokens over the global batch, on every rank.
    """
    results = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, device=device),
        # Every chunk sees every micro-batch.
        data_iterator=[iter(batches) for _ in trainee.ddp],
        model=list(trainee.ddp),
        num_microbatches=len(batches),
        # Only a shape for pipeline buffers, which variable_seq_lengths exchanges for the real one.
        seq_length=batches[0].ids.shape[1],
        micro_batch_size=batches[0].ids.shape[0],
    )
    totals = torch.stack(results).sum(0) if results else torch.zeros(2, device=device)
    return state.sum_over_data(state.broadcast_from_last_stage(totals))


def _forward_step(batches: Iterator[Batch], model: torch.nn.Module, device: torch.device):
    batch = next(batches)
    # Only the chunk with the ViT looks at them.
    pictures = _pictures(batch, device) if get_attr_wrapped_model(model, "pre_process") else None
    losses = model(
        batch.ids.to(device),
        pictures,
        batch.starts,
        batch.labels.to(device),
        batch.trained.to(device),
    )
    return losses, _sum


def _pictures(batch: Batch, device: torch.device) -> Pictures | None:
    if batch.tiles is None:
        return None
    downscales = tuple(Downscale(downscale.plane.to(device), downscale.size) for downscale in batch.downscales)
    return Pictures(pixel_values(batch.tiles.to(device)), batch.order.to(device), downscales)


def _sum(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over the trained tokens' losses [N]; Megatron-Core divides the gradients by their number over all ranks."""
    loss_sum, num_tokens = losses.sum(), torch.tensor(losses.numel(), device=losses.device, dtype=torch.int)
    return loss_sum, num_tokens, torch.stack([loss_sum.detach(), num_tokens.float()])

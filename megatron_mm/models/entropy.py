"""The entropy of distributions over a vocabulary that is cut over tensor-parallel ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _VocabParallelEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: dist.ProcessGroup) -> Tensor:
        largest = logits.max(-1, keepdim=True).values
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        probabilities = (logits - largest).exp()
        total = probabilities.sum(-1, keepdim=True)
        dist.all_reduce(total, group=group)
        probabilities /= total
        # The padding of the vocabulary has minus infinity and probability 0.
        weighted = torch.where(probabilities > 0, probabilities * logits, 0.0)
        mean = weighted.sum(-1, keepdim=True)
        dist.all_reduce(mean, group=group)
        # With H = log(sum(exp(l))) - sum(p l), dH / dl_j = -p_j (l_j - sum(p l)).
        ctx.save_for_backward(probabilities * mean - weighted)
        return (largest + total.log() - mean)[..., 0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (slope,) = ctx.saved_tensors
        return grad[..., None] * slope, None


def vocab_parallel_entropy(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Entropy in nats of the distribution of each token: float [...].

    Args:
        logits: float32 [..., V / ranks], minus infinity where there is no token.
        group: ranks that the vocabulary is cut over.
    """
    return _VocabParallelEntropy.apply(logits, group)  # pyright: ignore[reportReturnType]

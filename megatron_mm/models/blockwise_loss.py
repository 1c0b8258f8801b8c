"""Cross-entropy and entropy from hidden states, in blocks of the vocabulary, so that logits are never held whole.

The softmax of a token is made block by block with a running maximum and sum (Milakov & Gimelshein, arXiv 1805.02867);
the backward pass makes each block's logits again (Wijmans et al., Cut Cross-Entropy, arXiv 2411.09009), which costs one
more product of the output layer. Blocks are cut from the vocabulary and not from the tokens because each block then has
rows of the weight's gradient to itself: that gradient is written once, rounded once and held once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabShard:
    """This rank's rows of the output layer, and the distribution over the whole vocabulary that is wanted.

    Attributes:
        group: ranks that the vocabulary is cut over.
        first: token that this rank's first row stands for.
        num_rows: rows that stand for tokens; those after them pad the vocabulary.
        block: rows whose logits are made at once.
        temperature: that logits are divided by.
        never_drawn: a row that the distribution leaves out; None or out of range where it is not here.
        sums_hidden_grad: whether the gradient of the hidden states is summed over the group here.
    """

    group: dist.ProcessGroup
    first: int
    num_rows: int
    block: int
    temperature: float
    never_drawn: int | None
    sums_hidden_grad: bool

    def blocks(self) -> Iterator[slice]:
        """Rows of each block."""
        for start in range(0, self.num_rows, self.block):
            yield slice(start, min(start + self.block, self.num_rows))

    def logits(self, hidden: Tensor, weight: Tensor, rows: slice) -> Tensor:
        """Logits of a block of rows, to be overwritten: float32 [N, rows]."""
        logits = (hidden @ weight[rows].t()).float()
        if self.temperature != 1:
            logits /= self.temperature
        if self._left_out(rows):
            logits[:, self._left_out(rows)] = -torch.inf
        return logits

    def shifted(self, logits: Tensor, largest: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Logits less each token's maximum, and their exponentials; where there is no token, both are 0."""
        shifted = logits.sub_(largest[:, None])
        exponentials = shifted.exp()
        if self._left_out(rows):
            shifted[:, self._left_out(rows)] = 0.0
        return shifted, exponentials

    def place(self, labels: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Columns [N, 1] of the labels in a block, any where they are not in it, and whether they are [N]."""
        columns = labels - (self.first + rows.start)
        size = rows.stop - rows.start
        return columns.clamp(0, size - 1)[:, None], (columns >= 0) & (columns < size)

    def _left_out(self, rows: slice) -> list[int]:
        if self.never_drawn is None or not rows.start <= self.never_drawn < rows.stop:
            return []
        return [self.never_drawn - rows.start]


@dataclass(slots=True)
class _Sums:
    """What is known of each token's distribution after some blocks, all float32 [N].

    Attributes:
        largest: of the logits l.
        total: sum(exp(l - largest)).
        weighted: sum(exp(l - largest) (l - largest)); 0 where entropies are not asked for.
        of_label: the label's logit, 0 as long as it was in no block.
    """

    largest: Tensor
    total: Tensor
    weighted: Tensor
    of_label: Tensor

    @classmethod
    def start(cls, hidden: Tensor) -> "_Sums":
        # Not minus infinity: the first step from it would be infinity less infinity in a block without tokens.
        lowest = torch.finfo(torch.float32).min
        largest = torch.full((len(hidden),), lowest, dtype=torch.float32, device=hidden.device)
        return cls(largest, *(torch.zeros_like(largest) for _ in range(3)))

    def raise_to(self, largest: Tensor) -> None:
        """Express the sums by another maximum."""
        shrinks = (self.largest - largest).exp()
        self.weighted = (self.weighted + (self.largest - largest) * self.total) * shrinks
        self.total, self.largest = self.total * shrinks, largest

    def add(self, logits: Tensor, labels: Tensor, shard: VocabShard, rows: slice, *, with_entropies: bool) -> None:
        """Take in a block of logits, which is overwritten."""
        columns, here = shard.place(labels, rows)
        self.of_label = torch.where(here, logits.gather(1, columns)[:, 0], self.of_label)
        self.raise_to(torch.maximum(self.largest, logits.amax(-1)))
        if not with_entropies:
            self.total += logits.sub_(self.largest[:, None]).exp_().sum(-1)
            return
        shifted, exponentials = shard.shifted(logits, self.largest, rows)
        self.total += exponentials.sum(-1)
        self.weighted += exponentials.mul_(shifted).sum(-1)

    def over_ranks(self, group: dist.ProcessGroup) -> None:
        """Join what the ranks know of their rows."""
        largest = self.largest.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        self.raise_to(largest)
        sums = torch.stack([self.total, self.weighted, self.of_label])
        dist.all_reduce(sums, group=group)
        self.total, self.weighted, self.of_label = sums.unbind()


class _BlockwiseLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, shard: VocabShard, with_entropies: bool
    ) -> Tensor:
        sums = _Sums.start(hidden)
        for rows in shard.blocks():
            # No name holds a block while the next is made.
            sums.add(shard.logits(hidden, weight, rows), labels, shard, rows, with_entropies=with_entropies)
        sums.over_ranks(shard.group)
        mean = sums.weighted / sums.total
        ctx.shard, ctx.with_entropies = shard, with_entropies
        ctx.save_for_backward(hidden, weight, labels, sums.largest, sums.total, mean)
        losses = sums.total.log() - (sums.of_label - sums.largest)
        return torch.stack([losses, sums.total.log() - mean], -1) if with_entropies else losses

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, labels, *of_tokens = ctx.saved_tensors
        shard: VocabShard = ctx.shard
        grad = grad / shard.temperature
        if not ctx.with_entropies:
            grad = grad[:, None]
        hidden_grad = torch.zeros_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        weight_grad = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for rows in shard.blocks():
            slope = _slope(shard.logits(hidden, weight, rows), labels, of_tokens, grad, shard, rows).to(hidden.dtype)
            if hidden_grad is not None:
                hidden_grad += slope @ weight[rows]
            if weight_grad is not None:
                weight_grad[rows] = slope.t() @ hidden
            del slope
        if hidden_grad is not None:
            hidden_grad = hidden_grad.to(hidden.dtype)
            if shard.sums_hidden_grad:
                dist.all_reduce(hidden_grad, group=shard.group)
        if weight_grad is not None:
            weight_grad[shard.num_rows :] = 0.0
            _ask_for_accumulation(weight)
        return hidden_grad, weight_grad, None, None, None


def _slope(
    logits: Tensor, labels: Tensor, of_tokens: list[Tensor], grad: Tensor, shard: VocabShard, rows: slice
) -> Tensor:
    """The gradient of a block of logits, which is overwritten: float32 [N, rows].

    Args:
        of_tokens: the largest logit of each token, its sum of exponentials, its mean logit less the largest.
        grad: of the losses [N, 1], or of losses and entropies [N, 2].
    """
    largest, total, mean = of_tokens
    if grad.shape[1] == 1:
        # d loss / d logit_j = p_j - [j is the label]
        slope = logits.sub_(largest[:, None]).exp_().mul_(grad / total[:, None])
    else:
        # d entropy / d logit_j = -p_j (logit_j - sum(p logit))
        shifted, exponentials = shard.shifted(logits, largest, rows)
        factor = shifted.mul_(-grad[:, 1:]).add_(grad[:, :1] + grad[:, 1:] * mean[:, None])
        slope = factor.mul_(exponentials.div_(total[:, None]))
    columns, here = shard.place(labels, rows)
    return slope.scatter_add_(1, columns, torch.where(here[:, None], -grad[:, :1], 0.0))


def _ask_for_accumulation(weight: Any) -> None:
    """Have Megatron-Core's DDP add the gradient that follows.

    It does not where a fused kernel has summed an earlier micro-batch, which was small enough for whole logits, into
    `main_grad` by itself.
    """
    if hasattr(weight, "grad_added_to_main_grad"):
        weight.grad_added_to_main_grad = False


def blockwise_losses(
    hidden: Tensor, weight: Tensor, labels: Tensor, shard: VocabShard, *, with_entropies: bool
) -> Tensor:
    """Minus the log-probability of each label: float32 [N], or with the distribution's entropy in nats [N, 2].

    Nothing of the size of the logits is kept for the backward pass.

    Args:
        hidden: [N, H], the same on all ranks of the group.
        weight: [V / ranks, H], of the output layer.
        labels: int64 [N].
    """
    return _BlockwiseLosses.apply(hidden, weight, labels, shard, with_entropies)  # pyright: ignore[reportReturnType]

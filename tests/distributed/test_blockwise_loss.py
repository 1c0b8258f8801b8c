"""Losses in blocks of a vocabulary that is cut over ranks, against torch's own differentiation of the whole."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mm.config import loss_blocks
from megatron_mm.config.loss_blocks import vocab_block
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.shards import TOKENIZER
from megatron_mm.models import language
from megatron_mm.models.blockwise_loss import VocabShard, blockwise_losses
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from tests.layouts import (
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    WEIGHT_TOLERANCE,
    Outcome,
    largest_relative,
    layout,
    outcomes,
)
from tests.ranks import run_on_ranks
from tests.tiny import r4b_tensors, reference_models

# The last block of the first rank is short; the second has rows that pad the vocabulary.
TOKENS, WIDTH, VOCABULARY, PADDED, BLOCK = 20, 16, 120, 128, 24
# Name -> (temperature, a token that is never drawn, entropies).
CASES: dict[str, tuple[float, int | None, bool]] = {
    "plain": (1.0, None, False),
    "temperature": (0.7, None, False),
    "entropies": (1.0, None, True),
    # All that reinforcement learning asks for; the token is the second rank's.
    "everything": (1.3, 70, True),
}
# In bf16 logits and their gradients are rounded, as the output layer's are when they are whole.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
Found = dict[tuple[str, torch.dtype], tuple[Tensor, Tensor, Tensor]]


def _inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, labels, and an incoming gradient of its own for each loss and entropy."""
    random = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(TOKENS, WIDTH, generator=random), torch.randn(PADDED, WIDTH, generator=random)
    labels = torch.randint(0, 60, (TOKENS,), generator=random)
    labels[::2] += 60
    labels[labels == 70] = 71
    return hidden, weight, labels, torch.randn(TOKENS, 2, generator=random)


def _expected(
    dtype: torch.dtype, temperature: float, never_drawn: int | None, entropies: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and gradients of hidden states and weight, all float64, of inputs that a dtype has rounded."""
    hidden, weight, labels, incoming = _inputs()
    hidden, weight = (tensor.to(dtype).double().requires_grad_() for tensor in (hidden, weight))
    logits = hidden @ weight[:VOCABULARY].t() / temperature
    drawn = [token for token in range(VOCABULARY) if token != never_drawn]
    losses = torch.logsumexp(logits[:, drawn], -1) - logits.gather(1, labels[:, None])[:, 0]
    if entropies:
        losses = torch.stack([losses, torch.distributions.Categorical(logits=logits[:, drawn]).entropy()], -1)
    (losses * (incoming if entropies else incoming[:, 0])).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return losses.detach(), hidden.grad, weight.grad


def _found() -> Found:
    """The same of each case and dtype on this rank, whose weight has a part of the rows. Runs on every rank."""
    found = {}
    with state.process_group(get_platform("cpu")):
        group = dist.group.WORLD
        assert group is not None
        size = PADDED // group.size()
        first = group.rank() * size
        for name, dtype in itertools.product(CASES, TOLERANCES):
            temperature, never_drawn, entropies = CASES[name]
            hidden, weight, labels, incoming = _inputs()
            hidden = hidden.to(dtype).requires_grad_()
            weight = weight[first : first + size].to(dtype).requires_grad_()
            # As Megatron-Core's fused kernel leaves a weight, whose gradient DDP would then not take.
            setattr(weight, "grad_added_to_main_grad", True)  # noqa: B010 (unknown to the type)
            shard = VocabShard(
                group=group,
                first=first,
                num_rows=min(VOCABULARY - first, size),
                block=BLOCK,
                temperature=temperature,
                never_drawn=None if never_drawn is None else never_drawn - first,
                sums_hidden_grad=group.size() > 1,
            )
            losses = blockwise_losses(hidden, weight, labels, shard, with_entropies=entropies)
            (losses * (incoming if entropies else incoming[:, 0])).sum().backward()
            assert hidden.grad is not None
            assert weight.grad is not None
            assert not getattr(weight, "grad_added_to_main_grad")  # noqa: B009
            found[name, dtype] = (losses.detach(), hidden.grad, weight.grad)
    return found


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_losses_and_gradients_are_those_of_the_whole_vocabulary(num_ranks: int) -> None:
    of_ranks = run_on_ranks(_found, num_ranks)
    for (name, case), (dtype, tolerance) in itertools.product(CASES.items(), TOLERANCES.items()):
        losses, hidden_grad, weight_grad = _expected(dtype, *case)
        for of_rank in of_ranks:
            assert of_rank[name, dtype][0].dtype == torch.float32
            assert _relative(of_rank[name, dtype][0], losses) < tolerance, (name, dtype)
            assert _relative(of_rank[name, dtype][1], hidden_grad) < tolerance, (name, dtype)
        of_weight = torch.cat([of_rank[name, dtype][2] for of_rank in of_ranks])
        assert _relative(of_weight, weight_grad) < tolerance, (name, dtype)
        assert not of_weight[VOCABULARY:].any(), (name, dtype)


def _trained(
    configs: list[RunConfig], tensors: dict[str, Tensor], tokenizer_directory: Path, logits_bytes: int
) -> tuple[list[Outcome], set[bool]]:
    """What training comes to where so many bytes of logits are held at most; whether a micro-batch's were, of each."""
    were_whole: set[bool] = set()

    def block(num_tokens: float, num_rows: int) -> int:
        rows = vocab_block(num_tokens, num_rows)
        were_whole.add(rows == num_rows)
        return rows

    # In this process, which ends with the test.
    loss_blocks.LOGITS_BYTES = logits_bytes
    language.vocab_block = block
    return outcomes("cpu", configs, tensors, tokenizer_directory), were_whole


def test_a_step_whose_micro_batches_do_both(digits: Path) -> None:
    """Gradients of the table, in blocks and whole, add up in Megatron-Core's buffers."""
    configs = [layout(), layout(optim__overlap="true")]
    tensors = r4b_tensors(configs[0], *reference_models(configs[0]))
    whole, mixed = (
        run_on_ranks(_trained, 2, configs, tensors, digits / TOKENIZER, num_bytes)
        for num_bytes in (loss_blocks.LOGITS_BYTES, 384 * 4 * 60)
    )
    assert set.union(*(found for _, found in whole)) == {True}
    assert set.union(*(found for _, found in mixed)) == {True, False}
    for ours, theirs in zip(mixed[0][0], whole[0][0], strict=True):
        assert ours.losses == pytest.approx(theirs.losses, abs=LOSS_TOLERANCE)
        assert largest_relative(ours.grads, theirs.grads)[0] < GRADIENT_TOLERANCE
        assert largest_relative(ours.weights, theirs.weights)[0] < WEIGHT_TOLERANCE

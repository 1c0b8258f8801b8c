"""Entropies over a vocabulary that is cut over ranks, against torch's own differentiation of the whole."""

import torch
import torch.distributed as dist

from megatron_mm.models.entropy import vocab_parallel_entropy
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from tests.ranks import run_on_ranks

TOKENS, VOCABULARY, PADDED = 5, 7, 8


def _differences() -> tuple[float, float, float]:
    """Of values and gradients, and the gradient's size. Runs on every rank."""
    with state.process_group(get_platform("cpu")):
        whole = 3 * torch.randn(TOKENS, PADDED, generator=torch.Generator().manual_seed(0))
        whole[:, VOCABULARY:] = -torch.inf
        known = whole[:, :VOCABULARY].clone().requires_grad_()
        expected = torch.distributions.Categorical(logits=known).entropy()
        weights = torch.arange(1.0, TOKENS + 1)
        (expected * weights).sum().backward()
        assert known.grad is not None
        size = PADDED // dist.get_world_size()
        place = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
        mine = whole[:, place].clone().requires_grad_()
        group = dist.group.WORLD
        assert group is not None
        entropies = vocab_parallel_entropy(mine, group)
        (entropies * weights).sum().backward()
        assert mine.grad is not None
        gradient = torch.nn.functional.pad(known.grad, (0, PADDED - VOCABULARY))[:, place]
        of_values, of_gradients = (entropies - expected).abs().max(), (mine.grad - gradient).abs().max()
        return float(of_values), float(of_gradients), float(gradient.abs().max())


def test_entropy_and_gradient_are_those_of_the_whole_vocabulary() -> None:
    for of_values, of_gradients, size in run_on_ranks(_differences, 2):
        assert of_values < 1e-6
        assert of_gradients < 1e-6
        assert size > 0.1

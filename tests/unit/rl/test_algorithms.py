"""What is sampled and how it is credited, against sums done by hand."""

import math

import torch

from megatron_mm.chat.modes import Mode
from megatron_mm.rl.algorithms import Bpo, Grpo, is_flat


def test_bpo_samples_both_modes_and_credits_their_union() -> None:
    assert Bpo().modes(2) == (Mode.THINKING, Mode.THINKING, Mode.NON_THINKING, Mode.NON_THINKING)
    # Thinking is right both times, not thinking once: mean 3/4, sum of squares 3 * (1/4)^2 + (3/4)^2 = 3/4.
    advantages = Bpo().advantages(torch.tensor([[1.0, 1.0, 1.0, 0.0]]))
    deviation = math.sqrt(0.75 / 3)
    expected = torch.tensor([[0.25, 0.25, 0.25, -0.75]]) / deviation
    torch.testing.assert_close(advantages, expected, atol=1e-5, rtol=0)
    # Where thinking alone is right, not thinking is worth as little as thinking is worth much: groups of their own
    # would be flat, and the decision would never be taught.
    both = Bpo().advantages(torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    torch.testing.assert_close(both, torch.tensor([[1.0, 1.0, -1.0, -1.0]]) * math.sqrt(3) / 2, atol=1e-5, rtol=0)
    apart = [Grpo().advantages(torch.tensor([half])) for half in ([1.0, 1.0], [0.0, 0.0])]
    assert not torch.cat(apart).any()


def test_every_prompt_is_a_group_of_its_own() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    advantages = Grpo().advantages(rewards)
    torch.testing.assert_close(advantages[0], torch.tensor([0.75, -0.25, -0.25, -0.25]) / 0.5, atol=1e-5, rtol=0)
    torch.testing.assert_close(advantages[1], -advantages[0])
    assert not advantages[2].any()
    assert is_flat(rewards).tolist() == [False, False, True]
    assert Grpo().modes(3) == (Mode.AUTO,) * 3


def test_without_the_deviation_only_the_mean_is_taken_away() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    for algorithm in (Grpo(by_deviation=False), Bpo(by_deviation=False)):
        assert algorithm.advantages(rewards).tolist() == [[0.75, -0.25, -0.25, -0.25]]

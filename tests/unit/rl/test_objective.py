"""The objective and its gradient, against the papers' formulas written out response by response in float64."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_mm.config.schema import ObjectiveConfig
from megatron_mm.rl.objective import Tokens, policy_terms, response_divergence, token_weights

LENGTHS = [1, 5, 3, 8]
MAX_RESPONSE_TOKENS = 10
VOCABULARY = 7


def _case(seed: int = 0) -> dict[str, list[Tensor]]:
    """Random responses: logits of each token's distribution, and what is fixed of it."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    case: dict[str, list[Tensor]] = {
        "logits": [draw(length, VOCABULARY) for length in LENGTHS],
        "ids": [torch.randint(VOCABULARY, (length,), generator=generator) for length in LENGTHS],
        "advantages": [draw(1)[0] for _ in LENGTHS],
    }
    now = [
        logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
        for logits, ids in zip(case["logits"], case["ids"], strict=True)
    ]
    # Far enough away that both bounds are met.
    case["old"] = [one + draw(len(one), scale=0.4) for one in now]
    case["sampled"] = [one + draw(len(one), scale=0.5) for one in case["old"]]
    case["reference"] = [one + draw(len(one), scale=0.5) for one in now]
    case["sampled"][0][0] = math.nan  # a response of which nothing was drawn: it is the given token alone
    case["sampled"][1][0] = math.nan  # a token that was given
    return case


def _by_the_papers(config: ObjectiveConfig, case: dict[str, list[Tensor]], logits: list[Tensor]) -> Tensor:
    """The loss, one token after the other."""
    total = torch.zeros((), dtype=torch.float64)
    all_tokens = sum(LENGTHS)
    for number, length in enumerate(LENGTHS):
        advantage, of_response = case["advantages"][number], torch.zeros((), dtype=torch.float64)
        probabilities = torch.stack(
            [logits[number][t].exp()[case["ids"][number][t]] / logits[number][t].exp().sum() for t in range(length)]
        )
        old = case["old"][number].exp()
        # GSPO, eq. 7: the geometric mean of the tokens' ratios.
        of_sequence = torch.prod(probabilities / old) ** (1 / length)
        corrections = [
            float((one - other).exp())
            for one, other in zip(case["old"][number], case["sampled"][number], strict=True)
            if not math.isnan(other)
        ]
        for t in range(length):
            ratio = of_sequence if config.ratio == "sequence" else probabilities[t] / old[t]
            low, high = 1 - config.clip_low, 1 + config.clip_high
            bounded = low if ratio < low else high if ratio > high else ratio
            gain = min(ratio * advantage, bounded * advantage)
            sampled = case["sampled"][number][t].exp()
            correction = 1.0 if math.isnan(sampled) else float(old[t] / sampled)
            if config.ratio == "sequence":
                correction = math.prod(corrections) ** (1 / max(len(corrections), 1))
            if config.mismatch == "truncate":
                gain = gain * min(correction, config.mismatch_cap)
            elif config.mismatch == "mask" and not 1 / config.mismatch_cap <= correction <= config.mismatch_cap:
                gain = torch.zeros((), dtype=torch.float64)
            if config.kl == "loss":
                quotient = case["reference"][number][t].exp() / probabilities[t]
                kl = quotient - torch.log(quotient) - 1 if config.kl_estimator == "k3" else -torch.log(quotient)
                # The share of the policy's draws that have this token.
                kl = kl * (probabilities[t].item() if math.isnan(sampled) else 1.0)
                gain = gain - config.kl_coef * kl
            distribution = logits[number][t].softmax(-1)
            gain = gain - config.entropy_coef * (distribution * distribution.log()).sum()
            of_response = of_response - gain
        if config.average == "sequence":
            total = total + of_response / length / len(LENGTHS)
        elif config.average == "token":
            total = total + of_response / all_tokens
        else:
            total = total + of_response / MAX_RESPONSE_TOKENS / len(LENGTHS)
    return total


def _by_us(config: ObjectiveConfig, case: dict[str, list[Tensor]], logits: list[Tensor]) -> Tensor:
    lengths = torch.tensor(LENGTHS)
    responses = torch.arange(len(LENGTHS)).repeat_interleave(lengths)
    weights = token_weights(config, lengths, MAX_RESPONSE_TOKENS)
    tokens = Tokens(
        old=torch.cat(case["old"]),
        sampled=torch.cat(case["sampled"]),
        reference=torch.cat(case["reference"]) if config.kl != "none" else None,
        advantages=torch.stack(case["advantages"])[responses],
        weights=weights[responses],
        responses=responses,
    )
    distributions = torch.cat(logits).log_softmax(-1)
    logprobs = distributions.gather(1, torch.cat(case["ids"])[:, None])[:, 0]
    entropies = -(distributions.exp() * distributions).sum(-1)
    # In another order than the responses', as packs hold them.
    order = torch.randperm(len(logprobs), generator=torch.Generator().manual_seed(1))
    tokens = tokens.map(lambda tensor: tensor[order])
    return policy_terms(config, logprobs[order], tokens, entropies[order]).loss.sum()


SWITCHES: dict[str, list[Any]] = {
    "ratio": ["token", "sequence"],
    "average": ["sequence", "token", "constant"],
    "kl": ["none", "loss", "reward"],
    "kl_estimator": ["k1", "k3"],
    "mismatch": ["none", "truncate", "mask"],
    "entropy_coef": [0.0, 0.3],
}


@pytest.mark.parametrize(
    "values", list(itertools.product(*SWITCHES.values())), ids=lambda values: "-".join(map(str, values))
)
def test_loss_and_gradient_are_the_papers(values: tuple[Any, ...]) -> None:
    config = ObjectiveConfig(clip_low=0.1, clip_high=0.25, kl_coef=0.5, **dict(zip(SWITCHES, values, strict=True)))
    case = _case()
    found = []
    for loss_of in (_by_the_papers, _by_us):
        logits = [one.clone().requires_grad_() for one in case["logits"]]
        loss = loss_of(config, case, logits)
        loss.backward()
        found.append((loss.detach(), torch.cat([one.grad for one in logits if one.grad is not None])))
    (loss, gradient), (our_loss, our_gradient) = found
    torch.testing.assert_close(our_loss, loss, atol=1e-9, rtol=1e-9)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(our_gradient, gradient, atol=1e-9, rtol=1e-9)


def test_the_cases_meet_every_bound() -> None:
    """Or equality above would say nothing about clipping, masking and cutting off."""
    config = ObjectiveConfig(clip_low=0.1, clip_high=0.25, mismatch="mask")
    case = _case()
    lengths = torch.tensor(LENGTHS)
    responses = torch.arange(len(LENGTHS)).repeat_interleave(lengths)
    logprobs = torch.cat(
        [
            one.log_softmax(-1).gather(1, ids[:, None])[:, 0]
            for one, ids in zip(case["logits"], case["ids"], strict=True)
        ]
    )
    advantages = torch.stack(case["advantages"])[responses]
    tokens = Tokens(
        torch.cat(case["old"]), torch.cat(case["sampled"]), None, advantages, torch.ones(len(responses)), responses
    )
    for ratio in ("token", "sequence"):
        terms = policy_terms(config.model_copy(update={"ratio": ratio}), logprobs, tokens)
        if ratio == "token":
            assert (terms.clipped & (advantages > 0)).any()
            assert (terms.clipped & (advantages < 0)).any()
        assert not terms.clipped.all()
    mismatch = policy_terms(config, logprobs, tokens).mismatch
    assert (mismatch > 2).any()
    assert (mismatch < 0.5).any()
    assert mismatch[LENGTHS[0]] == 1  # the token that was given


def test_weights_of_tokens_add_up() -> None:
    lengths = torch.tensor(LENGTHS)
    for config, total in (
        (ObjectiveConfig(average="sequence"), 1.0),
        (ObjectiveConfig(average="token"), 1.0),
        (ObjectiveConfig(average="constant"), sum(LENGTHS) / 40),
    ):
        weights = token_weights(config, lengths, MAX_RESPONSE_TOKENS)
        assert float((weights * lengths).sum()) == pytest.approx(total)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_rewards_are_charged_for_all_trained_tokens_of_a_response(estimator: str) -> None:
    case = _case()
    responses = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    weights = torch.ones(len(responses), dtype=torch.float64)
    weights[1] = 0  # a token that forces a mode, and is not trained
    old, reference = torch.cat(case["old"]), torch.cat(case["reference"])
    tokens = Tokens(old, torch.cat(case["sampled"]), reference, torch.zeros_like(old), weights, responses)
    config = ObjectiveConfig(kl="reward", kl_estimator=estimator)  # pyright: ignore[reportArgumentType]
    expected = [0.0] * (len(LENGTHS) + 1)
    for number, (response, now, then) in enumerate(zip(responses.tolist(), old, reference, strict=True)):
        quotient = math.exp(then - now)
        kl = quotient - math.log(quotient) - 1 if estimator == "k3" else -math.log(quotient)
        was_given = math.isnan(tokens.sampled[number])
        expected[response] += kl * weights[number] * (math.exp(now) if was_given else 1.0)
    found = response_divergence(config, tokens, len(expected))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("rare", [0.3, 1e-3, 1e-6])
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_triggers_of_both_modes_make_up_the_divergence_of_the_decision(estimator: str, rare: float) -> None:
    """As drawn ones do on average: value KL(pi || ref); gradient in a loss 0 for k1, and KL(ref || pi)'s for k3."""
    config = ObjectiveConfig(kl_coef=1.0, kl_estimator=estimator)  # pyright: ignore[reportArgumentType]
    reference = torch.tensor([0.4, 0.6], dtype=torch.float64)
    logits = torch.tensor([rare, 1 - rare], dtype=torch.float64).log().requires_grad_()
    logprobs = logits.log_softmax(-1)
    nothing, given = torch.zeros(2, dtype=torch.float64), torch.full((2,), math.nan, dtype=torch.float64)
    tokens = Tokens(logprobs.detach(), given, reference.log(), nothing, nothing + 1, torch.arange(2))
    policy_terms(config, logprobs, tokens).loss.sum().backward()
    policy = logprobs.detach().exp()
    torch.testing.assert_close(logits.grad, nothing if estimator == "k1" else policy - reference)
    expected = (policy * (policy / reference).log()).sum()
    torch.testing.assert_close(response_divergence(config, tokens, 2).sum(), expected)

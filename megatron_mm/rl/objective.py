"""What an update maximises: GRPO's clipped objective and its published variants, one term a token.

Legend: N tokens of responses on this rank, R responses of the mini-batch over all ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mm.config.schema import ObjectiveConfig


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of responses, and what does not change while the policy learns from them.

    Attributes:
        old: float [N], log-probability under the policy that the updates of this step began with, in nats.
        sampled: float [N], under the engine that drew the token; NaN where it was not drawn but given (mode triggers).
        reference: float [N] under the reference policy, or None without a KL term.
        advantages: float [N], of the token's response.
        weights: float [N], what the token's term counts; those of a mini-batch add up as `token_weights` says.
        responses: int64 [N], number of the token's response in the mini-batch.
    """

    old: Tensor
    sampled: Tensor
    reference: Tensor | None
    advantages: Tensor
    weights: Tensor
    responses: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "Tokens":
        """All of it changed: moved, or put into another order."""
        reference = None if self.reference is None else change(self.reference)
        old, sampled, advantages = change(self.old), change(self.sampled), change(self.advantages)
        return Tokens(old, sampled, reference, advantages, change(self.weights), change(self.responses))


@dataclass(frozen=True, slots=True)
class Terms:
    """The objective's value and what metrics are made of, all [N] and without gradients but for `loss`.

    Attributes:
        loss: of each token, weights included; their sum over the mini-batch is minimised.
        log_ratio: log-probability now minus `old`; with sequence ratios, its mean over the response.
        clipped: whether the clipped term was the smaller one, so that the token teaches nothing.
        kl: estimate of the divergence from the reference, 0 without one.
        mismatch: probability before the updates over the engine's, 1 for tokens that were not drawn; with sequence
            ratios, the geometric mean over the response's drawn tokens.
    """

    loss: Tensor
    log_ratio: Tensor
    clipped: Tensor
    kl: Tensor
    mismatch: Tensor


def policy_terms(
    config: ObjectiveConfig,
    logprobs: Tensor,
    tokens: Tokens,
    entropies: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Terms:
    """The terms of some responses' tokens.

    - Clipped surrogate: GRPO (arXiv 2402.03300, eq. 3), whose two bounds may differ (DAPO, 2503.14476, eq. 8). BPO's
      objective (2508.21113, eq. 1) is the same over the union of both modes' responses.
    - `ratio: sequence`: GSPO (2507.18071, eq. 5 to 7), in the form of its eq. 14, whose value and gradient are the same
      where all tokens of a response have one advantage.
    - KL: k1 = log pi - log ref, or k3 = ref / pi - log(ref / pi) - 1 (2402.03300, eq. 4; Vision-R1, 2503.06749, eq. 2).
      Both are estimates from tokens of the policy; for those that were given see `chances`.
    - Mismatch: the objective is an expectation under the policy, but an engine with other kernels drew the tokens.
      Weights of pi_old / pi_engine correct that, cut off at `mismatch_cap` (truncated importance sampling, as verl and
      slime have it), or tokens beyond the cap on either side are left out (IcePop, 2510.18855).

    Args:
        config: which of these.
        logprobs: float [N] with gradients, of the policy that learns.
        tokens: the tokens.
        entropies: float [N] with gradients, of the distributions that they were drawn from; needed with entropy_coef.
        group: ranks that hold parts of the same responses (context parallelism), for sequence ratios.
    """
    drawn = tokens.sampled.isfinite()
    log_ratio = logprobs - tokens.old
    log_mismatch = torch.where(drawn, tokens.old - tokens.sampled, 0.0)
    if config.ratio == "sequence":
        everywhere = torch.ones_like(drawn)
        means = _means(log_ratio.detach(), everywhere, tokens.responses, group)
        log_ratio = means + (logprobs - logprobs.detach())
        log_mismatch = _means(log_mismatch, drawn, tokens.responses, group)
    mismatch = log_mismatch.exp()
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    free, held = ratio * tokens.advantages, bounded * tokens.advantages
    gain = torch.minimum(free, held)
    if config.mismatch == "truncate":
        gain = gain * mismatch.clamp(max=config.mismatch_cap)
    elif config.mismatch == "mask":
        gain = gain * ((mismatch <= config.mismatch_cap) & (mismatch >= 1 / config.mismatch_cap))
    loss, kl = -gain, torch.zeros_like(log_ratio)
    if tokens.reference is not None:
        kl = divergence(config.kl_estimator, logprobs, tokens.reference) * chances(logprobs, tokens)
        if config.kl == "loss":
            loss = loss + config.kl_coef * kl
    if config.entropy_coef:
        assert entropies is not None
        loss = loss - config.entropy_coef * entropies
    return Terms(loss * tokens.weights, log_ratio.detach(), (held < free).detach(), kl.detach(), mismatch)


def response_divergence(config: ObjectiveConfig, tokens: Tokens, num_responses: int) -> Tensor:
    """What the tokens add to the divergence of each response under the policy that drew them: float64 [R].

    It is charged to rewards as in InstructGPT (arXiv 2203.02155, eq. 2). Tokens without weight are not counted.

    Args:
        config: says by which estimator.
        tokens: the tokens.
        num_responses: R.
    """
    assert tokens.reference is not None
    each = divergence(config.kl_estimator, tokens.old, tokens.reference) * chances(tokens.old, tokens)
    each = each.double() * (tokens.weights > 0)
    return each.new_zeros(num_responses).index_add_(0, tokens.responses, each)


def chances(logprobs: Tensor, tokens: Tokens) -> Tensor:
    """What each token counts in a mean over the policy's draws: [N], 1 if it was drawn, else its probability.

    BPO gives the triggers of both modes as often, however improbable one is. Counted like a draw, a trigger of
    probability p adds ref / p to k3: the rarer the mode that was right, the more its responses would be charged.

    Args:
        logprobs: of the tokens under the policy.
        tokens: the tokens.
    """
    return torch.where(tokens.sampled.isfinite(), 1.0, logprobs.detach().exp())


def divergence(estimator: str, logprobs: Tensor, reference: Tensor) -> Tensor:
    """An estimate [N] of KL(policy || reference) from tokens of the policy: k1 or k3 (http://joschu.net/blog/kl-approx)."""
    difference = reference - logprobs
    return -difference if estimator == "k1" else difference.exp() - difference - 1


def token_weights(config: ObjectiveConfig, lengths: Tensor, max_response_tokens: int) -> Tensor:
    """What a token of each response counts, so that the terms of a mini-batch add up to its loss: float [R].

    - `sequence`: the mean of each response, then of all (GRPO, 2402.03300, eq. 3; 1 / 2g in BPO's eq. 1).
    - `token`: the mean over all tokens (DAPO, 2503.14476, eq. 8).
    - `constant`: the sum, over responses and the longest that is allowed (Dr. GRPO, 2503.20783, section 3.2).

    Args:
        config: which of these.
        lengths: int [R], trained tokens of every response of the mini-batch, over all ranks.
        max_response_tokens: longest response.
    """
    lengths = lengths.double()
    if config.average == "token":
        return torch.full_like(lengths, 1 / float(lengths.sum()))
    each = lengths if config.average == "sequence" else torch.full_like(lengths, max_response_tokens)
    return 1 / (each * len(lengths))


def _means(values: Tensor, counted: Tensor, responses: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The mean of the counted `values` of each token's response, 0 where none is counted: [N]."""
    size = responses.max() if len(responses) else responses.new_zeros(())
    if group is not None:
        dist.all_reduce(size, op=dist.ReduceOp.MAX, group=group)
    sums = values.new_zeros(2, int(size) + 1)
    sums.index_add_(1, responses, torch.stack([values * counted, counted.to(values.dtype)]))
    if group is not None:
        dist.all_reduce(sums, group=group)
    return (sums[0] / sums[1].clamp(min=1))[responses]

"""Divergences between teacher p and student q per token: the readable dense reference (docs/method.md, section 6).

Every function takes (student_logits_NV, teacher_logits_NV, temperature_N=None, **settings) and returns (N,) nats
for p = softmax(teacher / T), q = softmax(student / T), summed over the vocabulary, **without** the factor s(T). It
computes in fp64 where an input is fp64, else in fp32. Gradients flow to the student's logits only.

Terms of probability 0 count as 0, so a teacher with logits -inf is fine, except where the definition holds KL(q‖p):
there `reverse_kl`, `todi` and `adaptive_kl` are infinite, as they should be.

Shapes: N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import Tensor

DIVERGENCES: dict[str, Callable[..., Tensor]] = {}
"""Every divergence by its name in the settings."""

_Function = TypeVar("_Function", bound=Callable[..., Tensor])


def _divergence(function: _Function) -> _Function:
    """Enter a function into `DIVERGENCES` by its name."""
    DIVERGENCES[function.__name__] = function
    return function


def _log_probabilities(student_NV: Tensor, teacher_NV: Tensor, temperature_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """log q and log p at the token temperatures, in fp32 or fp64."""
    dtype = torch.promote_types(torch.promote_types(student_NV.dtype, teacher_NV.dtype), torch.float32)
    student_NV, teacher_NV = student_NV.to(dtype), teacher_NV.detach().to(dtype)
    if temperature_N is not None:
        temperature_N1 = temperature_N.detach().to(dtype).unsqueeze(-1)
        student_NV, teacher_NV = student_NV / temperature_N1, teacher_NV / temperature_N1
    return torch.log_softmax(student_NV, dim=-1), torch.log_softmax(teacher_NV, dim=-1)


def _expectation(probability_NV: Tensor, value_NV: Tensor) -> Tensor:
    """Σ_v probability · value, where probability 0 beats any value, infinite or NaN, in value and gradient."""
    return (probability_NV * value_NV.masked_fill(probability_NV == 0, 0.0)).sum(-1)


def log_mixture(first_NV: Tensor, second_NV: Tensor, share: float) -> Tensor:
    """log(share·first + (1-share)·second); finite where both are 0, so that its gradient there is 0 and not 0/0."""
    mixture_NV = share * first_NV + (1 - share) * second_NV
    return mixture_NV.clamp_min(torch.finfo(mixture_NV.dtype).tiny).log()


@_divergence
def forward_kl(student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature_N: Tensor | None = None) -> Tensor:
    """KL(p‖q) = Σ p log(p/q) (Hinton 2015, arXiv 1503.02531; Kim & Rush 2016, arXiv 1606.07947)."""
    log_q, log_p = _log_probabilities(student_logits_NV, teacher_logits_NV, temperature_N)
    return _expectation(log_p.exp(), log_p - log_q)


@_divergence
def reverse_kl(student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature_N: Tensor | None = None) -> Tensor:
    """KL(q‖p) = Σ q log(q/p), the token-level form of MiniLLM (arXiv 2306.08543)."""
    log_q, log_p = _log_probabilities(student_logits_NV, teacher_logits_NV, temperature_N)
    return _expectation(log_q.exp(), log_q - log_p)


@_divergence
def jsd(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature_N: Tensor | None = None, *, beta: float = 0.5
) -> Tensor:
    """β KL(p‖M) + (1-β) KL(q‖M), M = βp + (1-β)q (GKD, arXiv 2306.13649).

    The formula is 0 at both ends; β = 0 and β = 1 stand for the forward and the reverse KL, the limits of its
    quotients by β and 1-β, as GKD has it.
    """
    if beta == 0:
        return forward_kl(student_logits_NV, teacher_logits_NV, temperature_N)
    if beta == 1:
        return reverse_kl(student_logits_NV, teacher_logits_NV, temperature_N)
    log_q, log_p = _log_probabilities(student_logits_NV, teacher_logits_NV, temperature_N)
    p, q = log_p.exp(), log_q.exp()
    log_m = log_mixture(p, q, beta)
    return beta * _expectation(p, log_p - log_m) + (1 - beta) * _expectation(q, log_q - log_m)


@_divergence
def skew_kl(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature_N: Tensor | None = None, *, alpha: float = 0.1
) -> Tensor:
    """KL(p ‖ αp + (1-α)q) (DistiLLM, arXiv 2402.03898)."""
    if alpha == 0:  # without a share of p the mixture can underflow where log q does not
        return forward_kl(student_logits_NV, teacher_logits_NV, temperature_N)
    log_q, log_p = _log_probabilities(student_logits_NV, teacher_logits_NV, temperature_N)
    p = log_p.exp()
    return _expectation(p, log_p - log_mixture(p, log_q.exp(), alpha))


@_divergence
def skew_reverse_kl(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature_N: Tensor | None = None, *, alpha: float = 0.1
) -> Tensor:
    """KL(q ‖ (1-α)p + αq) (DistiLLM, arXiv 2402.03898)."""
    if alpha == 0:
        return reverse_kl(student_logits_NV, teacher_logits_NV, temperature_N)
    log_q, log_p = _log_probabilities(student_logits_NV, teacher_logits_NV, temperature_N)
    q = log_q.exp()
    return _expectation(q, log_q - log_mixture(q, log_p.exp(), alpha))


@_divergence
def adaptive_kl(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    temperature_N: Tensor | None = None,
    *,
    mu: float = 0.5,
    variant: Literal["authors", "cover"] = "authors",
) -> Tensor:
    """g_h/(g_h+g_t) KL(p‖q) + g_t/(g_h+g_t) KL(q‖p) (AKL, arXiv 2404.02657).

    g_h and g_t are Σ|p-q| over the head and the tail of p sorted in descending order. Head ``authors``, as the
    released code forms it: the entries with cumulative mass at most μ, and always the first. Head ``cover``, as the
    paper words it: the shortest prefix with mass at least μ. The weights are detached; both are ½ where p = q. Entries
    of exactly equal p are taken in vocabulary order.
    """
    log_q, log_p = _log_probabilities(student_logits_NV, teacher_logits_NV, temperature_N)
    p, q = log_p.exp(), log_q.exp()
    forward_share = adaptive_shares(p, q, mu, variant)
    forward, reverse = _expectation(p, log_p - log_q), _expectation(q, log_q - log_p)
    return forward_share * forward + (1 - forward_share) * reverse


@torch.no_grad()
def adaptive_shares(p_NV: Tensor, q_NV: Tensor, mu: float, variant: str) -> Tensor:
    """(N,) g_h/(g_h+g_t), the share of the forward KL in `adaptive_kl`; without gradient."""
    sorted_p, order = p_NV.sort(dim=-1, descending=True, stable=True)
    mass = sorted_p.cumsum(-1)
    if variant == "authors":
        head = mass <= mu
        head[..., 0] = True
    else:
        head = mass - sorted_p < mu
    gap = (p_NV - q_NV).abs().gather(-1, order)
    head_gap = gap.masked_fill(~head, 0.0).sum(-1)
    total_gap = gap.sum(-1)
    return torch.where(total_gap > 0, head_gap / total_gap.clamp_min(torch.finfo(p_NV.dtype).tiny), 0.5)


@_divergence
def alpha_beta(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    temperature_N: Tensor | None = None,
    *,
    alpha: float = 0.2,
    beta: float = 0.7,
) -> Tensor:
    """-1/(αβ) Σ [p^α q^β - α/(α+β) p^(α+β) - β/(α+β) q^(α+β)], α, β > 0 (ABKD, arXiv 2505.04560).

    Tends to KL(p‖q) for α = 1, β → 0 and to KL(q‖p) for α → 0, β = 1.
    """
    log_q, log_p = _log_probabilities(student_logits_NV, teacher_logits_NV, temperature_N)
    total = alpha + beta
    cross = (alpha * log_p + beta * log_q).exp()
    terms = cross - alpha / total * (total * log_p).exp() - beta / total * (total * log_q).exp()
    return -terms.sum(-1) / (alpha * beta)


@_divergence
def todi(student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature_N: Tensor | None = None) -> Tensor:
    """Σ_v [w p log(p/q) + (1-w) q log(q/p)], w = σ(log p - log q) per entry, detached (ToDi, arXiv 2505.16297).

    Its value is that of (p-q) log(p/q) summed, forward plus reverse KL; only the gradient tells them apart.
    """
    log_q, log_p = _log_probabilities(student_logits_NV, teacher_logits_NV, temperature_N)
    p, q = log_p.exp(), log_q.exp()
    log_ratio = log_p - log_q
    w = torch.sigmoid(log_ratio).detach()
    return _expectation(w * p, log_ratio) - _expectation((1 - w) * q, log_ratio)


@_divergence
def tvd(student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature_N: Tensor | None = None) -> Tensor:
    """½ Σ|p - q|, the total variation distance, in [0, 1]."""
    log_q, log_p = _log_probabilities(student_logits_NV, teacher_logits_NV, temperature_N)
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)

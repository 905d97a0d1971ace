"""Value and gradient of every divergence in closed form, for a few rows of logits.

A divergence is D = Σ_v f(p_v, q_v) with q = softmax(z/T). By the chain rule through the softmax

    dD/dz_v = (a_v - q_v Σ_u a_u) / T,   a_v = q_v ∂f/∂q_v

so f and a say all about it (`TERMS`); a may be off by a multiple of q, which the bracket takes out. The readable
definitions are in ``entkd.divergences``; tests hold both together.

Shapes: R rows, V vocabulary. "1" is a dimension of length 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from entkd import native
from entkd.divergences import DIVERGENCES, adaptive_shares, log_mixture
from entkd.methods import APPROACHES
from entkd.softmax import exp, in_full, log_softmax, write_scaled

Terms = Callable[..., tuple[Tensor, Tensor]]
"""(p, q, log p, log q, **settings), each (R, V) → f and a. All four are finite: log 0 is the lowest number."""


def _forward_kl(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    return p * (log_p - log_q), -p


def _reverse_kl(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    a = q * (log_q - log_p)
    return a, a


def _jsd(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, *, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    if beta == 0:
        return _forward_kl(p, q, log_p, log_q)
    if beta == 1:
        return _reverse_kl(p, q, log_p, log_q)
    log_m = log_mixture(p, q, beta)
    a = (1 - beta) * q * (log_q - log_m)
    return beta * p * (log_p - log_m) + a, a


def _skew_kl(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, *, alpha: float = 0.1) -> tuple[Tensor, Tensor]:
    if alpha == 0:
        return _forward_kl(p, q, log_p, log_q)
    log_m = log_mixture(p, q, alpha)
    return p * (log_p - log_m), (alpha - 1) * p * (log_q - log_m).exp()


def _skew_reverse_kl(
    p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, *, alpha: float = 0.1
) -> tuple[Tensor, Tensor]:
    if alpha == 0:
        return _reverse_kl(p, q, log_p, log_q)
    log_m = log_mixture(q, p, alpha)
    f = q * (log_q - log_m)
    return f, f - alpha * q * (log_q - log_m).exp()


def _adaptive_kl(
    p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, *, mu: float = 0.5, variant: str = "authors"
) -> tuple[Tensor, Tensor]:
    share = adaptive_shares(p, q, mu, variant).unsqueeze(-1)
    forward, reverse = p * (log_p - log_q), q * (log_q - log_p)
    return share * forward + (1 - share) * reverse, (1 - share) * reverse - share * p


def _alpha_beta(
    p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, *, alpha: float = 0.2, beta: float = 0.7
) -> tuple[Tensor, Tensor]:
    total = alpha + beta
    cross, own = (alpha * log_p + beta * log_q).exp(), (total * log_q).exp()
    f = (alpha / total * (total * log_p).exp() + beta / total * own - cross) / (alpha * beta)
    return f, (own - cross) / alpha


def _todi(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    log_ratio = log_p - log_q
    w = torch.sigmoid(log_ratio)
    reverse = (1 - w) * q * log_ratio
    return w * p * log_ratio - reverse, (1 - w) * q - reverse - w * p


def _tvd(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    difference = p - q
    return 0.5 * difference.abs(), -0.5 * q * difference.sign()


TERMS: dict[str, Terms] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "adaptive_kl": _adaptive_kl,
    "alpha_beta": _alpha_beta,
    "todi": _todi,
    "tvd": _tvd,
    **{name: approach.own_terms for name, approach in APPROACHES.items() if approach.own_terms is not None},
}
"""f and a of every divergence, and of the approaches that are one."""


def value_and_gradient(
    student_RV: Tensor,
    teacher_RV: Tensor,
    temperature_R1: Tensor | None,
    name: str,
    settings: dict[str, Any],
    *,
    scale_R1: Tensor | None = None,
    gradient_RV: Tensor | None = None,
) -> Tensor:
    """A divergence of each row, (R, 1) in nats, and its gradient by the student's logits, if ``gradient_RV`` is given.

    By its closed form, or, where it has none here, by autograd of its definition. Both inputs may be overwritten, those
    in half precision excepted, and ``gradient_RV`` may be the student's tensor.

    Parameters
    ----------
    student_RV, teacher_RV
        (R, V) logits.
    temperature_R1
        (R, 1) temperatures of both; None is 1.
    name, settings
        Of the divergence.
    scale_R1
        (R, 1) factors of the gradient alone; None is 1. A row of factor 0 has value and gradient 0, whatever is in it.
    gradient_RV
        (R, V) of any type; is overwritten by the gradient.
    """
    is_kl, on_cpu = name in ("forward_kl", "reverse_kl"), student_RV.device.type == "cpu"
    if is_kl and on_cpu:
        found_R1 = native.kl(student_RV, teacher_RV, temperature_R1, scale_R1, name == "reverse_kl", gradient_RV)
        if found_R1 is not None:
            return found_R1
    student_RV, teacher_RV = in_full(student_RV, "piece of logits"), in_full(teacher_RV, "piece of targets")
    if name not in TERMS:
        value_R1, slope_RV = _by_autograd(student_RV, teacher_RV, temperature_R1, name, settings)
    elif is_kl and on_cpu:
        value_R1, slope_RV = _kl_in_place(student_RV, teacher_RV, temperature_R1, name == "reverse_kl")
    else:
        function = _compiled() if student_RV.device.type == "cuda" else _out_of_place
        value_R1, slope_RV = function(student_RV, teacher_RV, temperature_R1, TERMS[name], settings)
    return write_scaled(value_R1, slope_RV, scale_R1, gradient_RV)


def _out_of_place(
    student_RV: Tensor, teacher_RV: Tensor, temperature_R1: Tensor | None, terms: Terms, settings: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """By `TERMS`, in plain operations that a compiler can fuse."""
    if temperature_R1 is not None:
        student_RV, teacher_RV = student_RV / temperature_R1, teacher_RV / temperature_R1
    lowest = torch.finfo(student_RV.dtype).min
    log_q_RV = torch.log_softmax(student_RV, -1).clamp_min(lowest)
    log_p_RV = torch.log_softmax(teacher_RV, -1).clamp_min(lowest)
    q_RV = log_q_RV.exp()
    f_RV, a_RV = terms(log_p_RV.exp(), q_RV, log_p_RV, log_q_RV, **settings)
    grad_RV = a_RV - q_RV * a_RV.sum(-1, keepdim=True)
    return f_RV.sum(-1, keepdim=True), grad_RV if temperature_R1 is None else grad_RV / temperature_R1


def _by_autograd(
    student_RV: Tensor, teacher_RV: Tensor, temperature_R1: Tensor | None, name: str, settings: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    temperature_R = None if temperature_R1 is None else temperature_R1.squeeze(-1)
    with torch.enable_grad():
        student_RV = student_RV.detach().requires_grad_()
        value_R = DIVERGENCES[name](student_RV, teacher_RV, temperature_R, **settings)
        (grad_RV,) = torch.autograd.grad(value_R.sum(), student_RV)
    return value_R.detach().unsqueeze(-1), grad_RV


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    """One kernel for each pass over memory. Not on a CPU: compiling takes half a minute there, and the two KLs in
    place are as fast. Made when it is needed: the compiler takes longer to import than a student to load."""
    return torch.compile(_out_of_place, dynamic=True)


def _kl_in_place(
    student_RV: Tensor, teacher_RV: Tensor, temperature_R1: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The two KLs without temporary tensors: in caches of a CPU, half the time of `_out_of_place`.

    dD/dz is (q - p)/T for KL(p‖q) and q (log q - log p - D)/T for D = KL(q‖p).
    """
    if temperature_R1 is not None:
        student_RV, teacher_RV = student_RV.div_(temperature_R1), teacher_RV.div_(temperature_R1)
    log_q_RV, log_ratio_RV = log_softmax(student_RV, "log q"), log_softmax(teacher_RV, "log p")
    q_RV, p_RV = exp(log_q_RV, out=student_RV), exp(log_ratio_RV, out=teacher_RV)
    log_ratio_RV.sub_(log_q_RV)
    if reverse:
        value_R1 = -log_q_RV.copy_(q_RV).mul_(log_ratio_RV).sum(-1, keepdim=True)
        grad_RV = log_ratio_RV.add_(value_R1).mul_(q_RV).neg_()
    else:
        value_R1 = log_ratio_RV.mul_(p_RV).sum(-1, keepdim=True)
        grad_RV = q_RV.sub_(p_RV)
    return value_R1, grad_RV if temperature_R1 is None else grad_RV.div_(temperature_R1)


def temperature_derivative(
    student_RV: Tensor, teacher_RV: Tensor, temperature_R1: Tensor, name: str, t2: str
) -> Tensor:
    """(R, 1) d[s(T) D]/dT of the two KLs, where T divides both logits; leaves its inputs as they are.

    With a = log q and b = log p at T, which differ from the scaled logits by constants that cancel:

        dD/dT = -(1/T) Σ_v [∂D/∂a_v a_v + ∂D/∂b_v b_v]

    and for KL(p‖q) ∂D/∂a = q - p, ∂D/∂b = p (log p - log q - D); for KL(q‖p) p and q change places.

    Raises
    ------
    ValueError
        For any other divergence.
    """
    if name not in ("forward_kl", "reverse_kl"):
        raise ValueError(f"the derivative by the temperature is known of forward_kl and reverse_kl, not of {name}")
    lowest = torch.finfo(student_RV.dtype).min
    a_RV = torch.log_softmax(student_RV / temperature_R1, -1).clamp_min(lowest)
    b_RV = torch.log_softmax(teacher_RV / temperature_R1, -1).clamp_min(lowest)
    if name == "reverse_kl":
        a_RV, b_RV = b_RV, a_RV
    p_RV, q_RV = b_RV.exp(), a_RV.exp()
    value_R1 = (p_RV * (b_RV - a_RV)).sum(-1, keepdim=True)
    # Probabilities first in each product: two lowest numbers multiplied are infinite, and 0 times that is NaN.
    slope_R1 = ((q_RV - p_RV) * a_RV + p_RV * (b_RV - a_RV - value_R1) * b_RV).sum(-1, keepdim=True)
    slope_R1 = -slope_R1 / temperature_R1
    if t2 == "off":
        return slope_R1
    if t2 == "linear":
        return value_R1 + temperature_R1 * slope_R1
    return 2 * temperature_R1 * value_R1 + temperature_R1.square() * slope_R1

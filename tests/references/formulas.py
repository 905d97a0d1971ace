"""Divergences, entropy, difficulty, weights and losses, one token at a time, by the definition.

Logits are lists or arrays of floats; probabilities come from softmax(z / T); everything is fp64 nats.
"""

from __future__ import annotations

import math

import numpy as np

SETTINGS = {
    "forward_kl": {},
    "reverse_kl": {},
    "jsd": {"beta": 0.5},
    "skew_kl": {"alpha": 0.1},
    "skew_reverse_kl": {"alpha": 0.1},
    "adaptive_kl": {"mu": 0.5, "variant": "authors"},
    "alpha_beta": {"alpha": 0.2, "beta": 0.7},
    "todi": {},
    "tvd": {},
}


def softmax(logits, temperature=1.0):
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


def entropy(logits):
    return -sum(p * math.log(p) for p in softmax(logits) if p > 0)


def kl(p, q):
    return sum(a * math.log(a / b) if b > 0 else math.inf for a, b in zip(p, q, strict=True) if a > 0)


def adaptive_share(p, q, mu, variant):
    """Weight of the forward KL in adaptive KL."""
    order = sorted(range(len(p)), key=lambda v: -p[v])
    head, mass = [], 0.0
    for rank, v in enumerate(order):
        if variant == "authors":
            mass += p[v]
            if mass <= mu or rank == 0:
                head.append(v)
        else:
            if mass < mu:
                head.append(v)
            mass += p[v]
    gap_head = sum(abs(p[v] - q[v]) for v in head)
    gap = sum(abs(a - b) for a, b in zip(p, q, strict=True))
    return 0.5 if gap == 0 else gap_head / gap


def divergence(name, student, teacher, temperature=1.0, frozen=None, **settings):
    """One token's divergence. ``frozen``: student logits at which weights that carry no gradient are taken."""
    settings = SETTINGS[name] | settings
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    q0 = q if frozen is None else softmax(frozen, temperature)
    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    if name == "jsd":
        beta = settings["beta"]
        if beta in (0, 1):
            return kl(q, p) if beta else kl(p, q)
        m = beta * p + (1 - beta) * q
        return beta * kl(p, m) + (1 - beta) * kl(q, m)
    if name == "skew_kl":
        return kl(p, settings["alpha"] * p + (1 - settings["alpha"]) * q)
    if name == "skew_reverse_kl":
        return kl(q, (1 - settings["alpha"]) * p + settings["alpha"] * q)
    if name == "adaptive_kl":
        share = adaptive_share(p, q0, settings["mu"], settings["variant"])
        return share * kl(p, q) + (1 - share) * kl(q, p)
    if name == "alpha_beta":
        a, b = settings["alpha"], settings["beta"]
        terms = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
        return -terms.sum() / (a * b)
    if name == "todi":
        w = p / (p + q0)  # = σ(log p - log q)
        return float((w * p * np.log(p / q) + (1 - w) * q * np.log(q / p)).sum())
    if name == "tvd":
        return 0.5 * float(np.abs(p - q).sum())
    raise KeyError(name)


def gradient(name, student, teacher, temperature=1.0, step=1e-5, **settings):
    """d divergence / d student logits by central differences, detached weights held fixed."""
    student = np.asarray(student, dtype=np.float64)
    result = np.zeros_like(student)
    for v in range(len(student)):
        up, down = student.copy(), student.copy()
        up[v] += step
        down[v] -= step
        result[v] = (
            divergence(name, up, teacher, temperature, frozen=student, **settings)
            - divergence(name, down, teacher, temperature, frozen=student, **settings)
        ) / (2 * step)
    return result


def slope(name, student, teacher, **settings):
    """``gradient`` of two divergences at T = 1 in closed form, for vocabularies too large for differences.

    With m the mixture, dD/dq is (1 - beta) log(q/m) for ``jsd`` and -(1 - alpha) p/m for ``skew_kl``; the softmax takes
    q (g - Σ q g) of it.
    """
    settings = SETTINGS[name] | settings
    p, q = softmax(teacher), softmax(student)
    if name == "jsd":
        beta = settings["beta"]
        by_q = (1 - beta) * np.log(q / (beta * p + (1 - beta) * q))
    elif name == "skew_kl":
        alpha = settings["alpha"]
        by_q = -(1 - alpha) * p / (alpha * p + (1 - alpha) * q)
    else:
        raise KeyError(name)
    return q * (by_q - q @ by_q)


def mid_rank(entropy_value, calibration):
    """Mid-rank empirical CDF."""
    below = sum(c < entropy_value for c in calibration)
    equal = sum(c == entropy_value for c in calibration)
    return (below + equal / 2) / len(calibration)


def soft_weight(d, u, kappa):
    return 1 + kappa * (2 * u - 1) * (2 * d - 1)


def feature_terms(projected, teacher, loss):
    """Feature loss per token of one layer pair."""
    rows = []
    for a, b in zip(np.asarray(projected, dtype=np.float64), np.asarray(teacher, dtype=np.float64), strict=True):
        if loss == "cosine":
            rows.append(1 - a @ b / (math.sqrt(a @ a) * math.sqrt(b @ b)))
        else:
            rows.append(float(((a - b) ** 2).mean()))
    return np.array(rows)

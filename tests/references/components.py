"""Losses of a batch of tokens with curriculum, temperature and features, and their gradients, by docs/method.md.

A token is a row of logits, fp64 nats as in ``references.formulas``. Weights and temperatures follow the teacher alone,
so that a gradient is formed token by token; those of cosine and cross-entropy are in closed form.
"""

from __future__ import annotations

import numpy as np

from references.formulas import SETTINGS, divergence, entropy, feature_terms, gradient, mid_rank, soft_weight, softmax


def difficulties(teachers):
    """Mid-rank of each token's teacher entropy among those of all tokens given (section 1)."""
    entropies = [entropy(z) for z in teachers]
    return [mid_rank(h, entropies) for h in entropies]


def curriculum(d, u, kappa=0.8):
    """Soft weights over their mean (section 2)."""
    raw = np.array([soft_weight(x, u, kappa) for x in d])
    return raw / raw.mean()


def temperatures(d, base=1.0, c=0.5):
    """T_0 exp(c (2 d - 1)) (section 3)."""
    return base * np.exp(c * (2 * np.array(d) - 1))


def distillation(name, students, teachers, weights=None, softness=None):
    """Mean of w T² D, and its gradient by the students' logits; None is 1 throughout."""
    n = len(students)
    w = np.ones(n) if weights is None else weights
    t = np.ones(n) if softness is None else softness
    factor = w * t**2 / n
    value = sum(factor[i] * divergence(name, students[i], teachers[i], t[i]) for i in range(n))
    return value, np.array([factor[i] * gradient(name, students[i], teachers[i], t[i]) for i in range(n)])


def cross_entropy(students, labels):
    """Mean of -log q(label), and its gradient by the students' logits, (q - one-hot) / n."""
    n = len(students)
    q = np.array([softmax(z) for z in students])
    slope = q.copy()
    slope[np.arange(n), labels] -= 1
    return float(-np.log(q[np.arange(n), labels]).mean()), slope / n


def features(states, targets, projectors, d, threshold=0.8):
    """Mean of 1 - cos over the hard tokens and the layer pairs (section 4).

    Returns the value and, for each pair, the gradients by the student's states and by the projector W, from
    d(-cos(a, b))/da = (cos(a, b) a/|a| - b/|b|) / |a| with a = W x.
    """
    hard = [i for i, x in enumerate(d) if x > threshold]
    count, value, by_state, by_projector = max(1, len(hard)) * len(states), 0.0, [], []
    for pair in zip(states, targets, projectors, strict=True):
        x, b, w = (np.asarray(each, dtype=np.float64) for each in pair)
        projected, dx, dw = x @ w.T, np.zeros_like(x), np.zeros_like(w)
        value += feature_terms(projected[hard], b[hard], "cosine").sum() / count
        for i in hard:
            a, unit = projected[i] / np.linalg.norm(projected[i]), b[i] / np.linalg.norm(b[i])
            slope = (a @ unit * a - unit) / np.linalg.norm(projected[i]) / count
            dx[i] = w.T @ slope
            dw += np.outer(slope, x[i])
        by_state.append(dx)
        by_projector.append(dw)
    return value, by_state, by_projector


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

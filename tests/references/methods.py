"""Losses of published distillation methods, one token, sequence or batch at a time, by their formulas.

A token is a list of logits, a sequence a list of tokens, a batch a list of sequences. Functions that take ``students``
and ``teachers`` take lists of valid tokens unless they say "sequences". Everything is fp64 nats. Where a paper and its
released code differ, an option says which is meant. What changes over a run (kept shares, interpolation, ramps,
thresholds) is in ``references.schedules``.

Legend: p teacher, q student, z logits, s distance, T temperature, tau temperature of one token, n tokens.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from references.formulas import divergence, entropy, kl, softmax


def _mean(values):
    values = list(values)
    return math.fsum(values) / len(values)


def _top(scores, count):
    """Positions of the ``count`` largest scores in ascending order; of equal scores the earlier one."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def _token(name, student, teacher, temperature=1.0, held=None, **settings):
    """T² * D; ``held``: the token's logits at which weights inside D that carry no gradient are taken."""
    return temperature**2 * divergence(name, student, teacher, temperature, held, **settings)


def difference(function, tokens, step=1e-5):
    """d function / d logits of each token by central differences."""
    tokens = np.array(tokens, dtype=np.float64)
    result = np.zeros_like(tokens)
    for place in np.ndindex(tokens.shape):
        up, down = tokens.copy(), tokens.copy()
        up[place] += step
        down[place] -= step
        result[place] = (function(up) - function(down)) / (2 * step)
    return result


# AdaKD, arXiv 2510.11615 -------------------------------------------------------------------------------------------


def hellinger(student, teacher):
    """Difficulty of a token in [0, 1] (AdaKD eq. 3)."""
    p, q = softmax(teacher), softmax(student)
    return math.sqrt(sum((math.sqrt(a) - math.sqrt(b)) ** 2 for a, b in zip(p, q, strict=True)) / 2)


def adakd_kept(distances, share):
    """Positions of the kept tokens: the largest distances, rounded down, at least one (AdaKD eq. 4-5, and its release).

    The release forms ``int(n * share)`` over the valid tokens of a micro-batch; here over all distances given.
    """
    return _top(distances, max(1, int(len(distances) * share)))


def adakd_temperatures(distances, c=0.5, base=1.0, median="lower"):
    """Temperatures of tokens, base * exp(-c * tanh(log(s / median s))) (AdaKD eq. 9-10).

    ``distances``: those of the kept tokens, over which the release takes the median. ``median``: of an even number, the
    ``lower`` of the two in the middle (release) or their ``mean``. Limits: s = 0 gives base * e^c; with a median of 0,
    tokens of distance 0 get the base and all others base * e^-c.
    """
    ordered = sorted(distances)
    count = len(ordered)
    middle = ordered[(count - 1) // 2]
    if median == "mean":
        middle = (middle + ordered[count // 2]) / 2
    temperatures = []
    for s in distances:
        # tanh(log x) = (x² - 1) / (x² + 1) with x = s / median, free of both divisions by zero.
        state = (s**2 - middle**2) / (s**2 + middle**2) if s or middle else 0.0
        temperatures.append(base * math.exp(-c * state))
    return temperatures


def adakd_loss(students, teachers, share, name="reverse_kl", c=0.5, median="lower", frozen=None, **settings):
    """Mean over the kept tokens of tau² * D(p(tau), q(tau)) (AdaKD eq. 2, 4, 10 and Alg. 1).

    ``frozen``: student logits at which the kept set and the temperatures are taken; the paper's detached temperatures
    are ``frozen = students``, held while ``students`` moves. None: they follow ``students``, as in the release.
    """
    source = students if frozen is None else frozen
    distances = [hellinger(a, b) for a, b in zip(source, teachers, strict=True)]
    kept = adakd_kept(distances, share)
    temperatures = adakd_temperatures([distances[i] for i in kept], c, median=median)
    return _mean(
        _token(name, students[i], teachers[i], tau, source[i], **settings)
        for i, tau in zip(kept, temperatures, strict=True)
    )


# SE-KD, arXiv 2602.01395 -------------------------------------------------------------------------------------------


def sekd_count(length, share=0.2):
    """Selected positions of a sequence: share * length rounded up, at least one of a sequence with any (SE-KD eq. 6).

    The share counts as the decimal it is written as: 0.07 of 100 are 7.
    """
    return min(length, max(1, math.ceil(Fraction(str(share)) * length)))


def sekd_selected(entropies, share=0.2):
    """Selected positions of one sequence, given the entropies of its valid positions (SE-KD eq. 6)."""
    return _top(entropies, sekd_count(len(entropies), share))


def sekd_loss(students, teachers, share=0.2, by="student", name="forward_kl", temperature=1.0, average="positions"):
    """T² * D over the selected positions of a batch of sequences.

    ``by``: the entropies of the ``student`` (SE-KD) or of the ``teacher``, at T = 1. ``average``: one mean over all
    selected ``positions`` (release), or per sequence and then over ``sequences`` (SE-KD eq. 4-5).
    """
    rows = []
    for student, teacher in zip(students, teachers, strict=True):
        entropies = [entropy(token) for token in (student if by == "student" else teacher)]
        losses = [_token(name, student[i], teacher[i], temperature) for i in sekd_selected(entropies, share)]
        if losses:
            rows.append(losses)
    if average == "sequences":
        return _mean(_mean(losses) for losses in rows)
    return _mean(loss for losses in rows for loss in losses)


# EA-KD, arXiv 2311.13621 -------------------------------------------------------------------------------------------


def eakd_weight(student, teacher, temperature=2.0):
    """Half of H_T * (1 + H_S / log V), both entropies at the temperature T' (EA-KD, ``get_w`` of its release)."""
    teacher_entropy = entropy(np.asarray(teacher, dtype=np.float64) / temperature)
    student_entropy = entropy(np.asarray(student, dtype=np.float64) / temperature)
    return teacher_entropy * (1 + student_entropy / math.log(len(teacher))) / 2


def eakd_loss(
    students, teachers, entropy_temperature=2.0, temperature=1.0, normalise=False, name="forward_kl", frozen=None
):
    """Mean of w * T² * D(p(T), q(T)) (EA-KD); the release divides by no mean weight, ``normalise`` does.

    ``frozen``: student logits at which the weights, which carry no gradient, are taken.
    """
    source = students if frozen is None else frozen
    weights = [eakd_weight(a, b, entropy_temperature) for a, b in zip(source, teachers, strict=True)]
    scale = (_mean(weights) if normalise else 1.0) or 1.0  # all weights 0: the loss is 0
    return _mean(
        w / scale * _token(name, a, b, temperature, held)
        for w, held, a, b in zip(weights, source, students, teachers, strict=True)
    )


# BD-KD, arXiv 2212.12965, as ported to language models -------------------------------------------------------------


def bdkd_token(student, teacher, weight=3.0, divide=False, ties="reverse", forward="kl"):
    """w_F * KL(p, q) + w_R * KL(q, p) of one token, the forward term heavier where H_T > H_S.

    ``ties``: at equal entropies the ``reverse`` term gets the weight, or ``neither`` does (ports). ``forward``: ``kl``,
    or ``cross_entropy`` (ports: the same gradient, a value larger by w_F * H_T). ``divide``: by weight + 1, that is 4.
    """
    p, q = softmax(teacher), softmax(student)
    gap = entropy(teacher) - entropy(student)
    forward_weight = weight if gap > 0 else 1.0
    reverse_weight = weight if gap < 0 or (gap == 0 and ties == "reverse") else 1.0
    first = kl(p, q) + (entropy(teacher) if forward == "cross_entropy" else 0.0)
    return (forward_weight * first + reverse_weight * kl(q, p)) / (weight + 1 if divide else 1)


def bdkd_loss(students, teachers, **options):
    """Mean of ``bdkd_token``."""
    return _mean(bdkd_token(a, b, **options) for a, b in zip(students, teachers, strict=True))


# TAID, arXiv 2501.16937 --------------------------------------------------------------------------------------------


def taid_target(student, teacher, t):
    """Logits (1 - t) * z_q + t * z_p of the interpolated teacher (TAID, definition of p_t)."""
    return (1 - t) * np.asarray(student, dtype=np.float64) + t * np.asarray(teacher, dtype=np.float64)


def taid_loss(students, teachers, t, name="forward_kl", variant="paper", frozen=None, **settings):
    """Mean of D(p_t, q); ``variant: authors`` adds the entropy of p_t to KL(p_t, q), the cross-entropy of the release.

    ``frozen``: student logits in p_t, which carry no gradient.
    """
    source = students if frozen is None else frozen
    losses = []
    for held, student, teacher in zip(source, students, teachers, strict=True):
        target = taid_target(held, teacher, t)
        losses.append(_token(name, student, target, 1.0, held, **settings))
        if variant == "authors":
            losses[-1] += entropy(target)
    return _mean(losses)


# CTKD, arXiv 2211.16231 --------------------------------------------------------------------------------------------

SCALES = {"per_token": lambda T: T**2, "linear": lambda T: T, "off": lambda T: 1.0}
SCALE_SLOPES = {"per_token": lambda T: 2 * T, "linear": lambda T: 1.0, "off": lambda T: 0.0}


def ctkd_loss(students, teachers, temperature, name="forward_kl", scale="per_token"):
    """Mean of s(T) * D(p(T), q(T)); s is T² in the release."""
    return SCALES[scale](temperature) * _mean(
        divergence(name, a, b, temperature) for a, b in zip(students, teachers, strict=True)
    )


def _slope(student, teacher, temperature, name):
    """dD/dT of one token in closed form, from d log softmax(z / T) / dT = -(z - E z) / T².

    KL(p, q): -Cov_p(a, a - b) / T³ + (E_p b - E_q b) / T², with a the logits of p and b those of q.
    """
    first, second = (teacher, student) if name == "forward_kl" else (student, teacher)
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    p, q = softmax(a, temperature), softmax(b, temperature)
    covariance = (p * (a - p @ a) * (a - b)).sum()
    return float(-covariance / temperature**3 + (p @ b - q @ b) / temperature**2)


def ctkd_slope(students, teachers, temperature, name="forward_kl", scale="per_token"):
    """d ``ctkd_loss`` / dT for forward and reverse KL, the derivative of s(T) included as in the release."""
    losses = _mean(divergence(name, a, b, temperature) for a, b in zip(students, teachers, strict=True))
    slopes = _mean(_slope(a, b, temperature, name) for a, b in zip(students, teachers, strict=True))
    return SCALE_SLOPES[scale](temperature) * losses + SCALES[scale](temperature) * slopes


def ctkd_temperature(theta, start=1.0, width=20.0):
    """T = start + width * sigmoid(theta), between 1 and 21 in the release, whose theta starts at 1."""
    return start + width / (1 + math.exp(-theta))


def ctkd_gradient(students, teachers, theta, strength, start=1.0, width=20.0, **options):
    """Gradient of theta as the optimiser sees it: -strength * dL/dtheta, so that descent raises the loss.

    ``strength``: the lambda of the ramp, ``references.schedules.ctkd_strength``.
    """
    temperature = ctkd_temperature(theta, start, width)
    inner = (temperature - start) / width
    return -strength * ctkd_slope(students, teachers, temperature, **options) * width * inner * (1 - inner)

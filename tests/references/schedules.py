"""What published distillation methods change over a run, step by step from the losses alone.

Steps count from 0. A list of settings for n losses has n + 1 entries: entry i is in force when loss i is measured, the
last one is for the step that would follow.
"""

from __future__ import annotations

import math


def adakd_shares(losses, warmup=0, beta=0.99, epsilon=0.1, delta=0.1, floor=0.1, reset="trigger"):
    """Share of tokens that LATF keeps (AdaKD, arXiv 2510.11615, eq. 6-7 and Alg. 1).

    The moving average starts at the first loss. After loss number ``warmup`` it becomes the reference; from the next
    loss on, an average below reference * (1 - epsilon) multiplies the share by 1 - delta, one above
    reference * (1 + epsilon) by 1 + delta, up to 1. ``floor``: 0.1 in the release, 0 in the paper. ``reset``: the
    reference follows the average at every ``trigger`` (release) or only at a ``change`` of the share (paper). Epsilon
    and delta are the release's defaults; its scripts have 0.05 for both.
    """
    share, average, reference = 1.0, None, None
    shares = [share]
    for step, loss in enumerate(losses):
        average = loss if average is None else beta * average + (1 - beta) * loss
        if reference is None:
            if step >= warmup:
                reference = average
        else:
            before = share
            stable, unstable = average < reference * (1 - epsilon), average > reference * (1 + epsilon)
            if stable:
                share = max(share * (1 - delta), floor)
            elif unstable:
                share = min(share * (1 + delta), 1.0)
            if (stable or unstable) if reset == "trigger" else share != before:
                reference = average
        shares.append(share)
    return shares


def taid_step(t, momentum, previous, loss, linear, t_end=1.0, alpha=5e-4, beta=0.99):
    """One adaptive update of the interpolation (TAID, arXiv 2501.16937, Alg. 1): the new t and the new momentum.

    ``linear``: the t of the linear schedule, below which the adaptive one never falls.
    """
    momentum = beta * momentum + (1 - beta) * (previous - loss) / (previous + 1e-15)
    raised = t + alpha / (1 + math.exp(-momentum)) * (1 - t)
    return min(t_end, max(linear, raised)), momentum


def taid_times(losses, total, adaptive=True, t_start=0.4, t_end=1.0, alpha=5e-4, beta=0.99):
    """Interpolation t over a run of ``total`` steps, in the order of the release.

    The first loss is only remembered. After loss i > 0 the linear schedule is at i / total, so that step i + 1 uses it
    and no step of the run reaches t_end. ``adaptive: False``: the linear schedule alone.
    """
    t, momentum, previous = t_start, 0.0, None
    times = [t]
    for step, loss in enumerate(losses):
        if previous is not None:
            linear = t_start + (t_end - t_start) * step / total
            if adaptive:
                t, momentum = taid_step(t, momentum, previous, loss, linear, t_end, alpha, beta)
            else:
                t = linear
        previous = loss
        times.append(t)
    return times


def ctkd_strength(progress, length):
    """Strength of the reversed gradient, a cosine from 0 to 1 over ``length`` (CTKD, arXiv 2211.16231).

    Epochs in the release, of which the first is 1 and ``length`` is 10 of 240. Any unit of progress will do.
    """
    return (1 - math.cos(math.pi * min(max(progress, 0), length) / length)) / 2


def distillm_thresholds(losses, epsilon=0.1, increase=0.1, initial=0.0, variant="authors"):
    """Share of student generations after each validation (DistiLLM, arXiv 2402.03898, Alg. 1).

    ``losses``: cross-entropies on the validation data, the first of them before training. ``variant: authors``: the
    share rises where a loss is at least ``epsilon`` above that of the last rise (or the first one); ``paper``: where it
    is more than ``epsilon`` above the one before.
    """
    threshold, reference = initial, losses[0]
    thresholds = [threshold]
    for loss in losses[1:]:
        rises = loss >= reference + epsilon if variant == "authors" else loss > reference + epsilon
        if rises:
            threshold = min(threshold + increase, 1.0)
        if rises or variant == "paper":
            reference = loss
        thresholds.append(threshold)
    return thresholds


def distillm_fresh(threshold, step, total, ratio="decreasing"):
    """Share of steps that generate anew once the buffer is full; ``step`` of the release counts from 1.

    ``decreasing`` is the paper's; ``increasing`` and ``constant`` are options of the release.
    """
    return threshold * {"decreasing": 1 - step / total, "increasing": step / total, "constant": 0.5}[ratio]


def distillm_source(draw, threshold, fresh, full, variant="authors"):
    """Whether a step generates, and what it trains on: ``student``, ``buffer`` or ``data``; ``draw`` is uniform.

    ``authors``: a step that generates trains on its own batch, and generates for any draw below the threshold until the
    buffer is full. ``paper``: it stores the batch and, as any step below the threshold, trains on one from the buffer.
    """
    if variant == "paper":
        return draw < fresh, "buffer" if draw < threshold else "data"
    generates = draw < fresh or (draw < threshold and not full)
    return generates, "student" if generates else "buffer" if draw < threshold else "data"


def gkd_source(draw, share):
    """``student`` for a share lambda of the steps, else ``data`` (GKD, arXiv 2306.13649, Alg. 1)."""
    return "student" if draw < share else "data"


def gkd_count(share, steps):
    """Expected number of on-policy steps and its standard deviation: each step is drawn alone."""
    return share * steps, math.sqrt(steps * share * (1 - share))

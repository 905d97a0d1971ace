"""Token weights that move from low- to high-entropy tokens (docs/method.md, section 2).

    soft     w_i = 1 + κ(2u-1)(2d_i-1)
    exp      w_i = exp(κ(2u-1)(2d_i-1))
    window   w_i = 1/k on tokens with d_i in [u(1-k), u(1-k)+k], else 0

each divided by its mean over the valid tokens of the global batch. u in [0, 1] is the progress of the run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from entkd.config import Curriculum


def raw_weights(difficulty_N: Tensor, progress: float, settings: Curriculum) -> Tensor:
    """Weights before normalisation.

    Parameters
    ----------
    difficulty_N
        (N,) d in [0, 1].
    progress
        u in [0, 1].
    settings
        κ, shape and window.

    Returns
    -------
    Tensor
        (N,) in the dtype of the difficulty, without gradient.
    """
    difficulty_N = difficulty_N.detach()
    if settings.shape == "window":
        width = settings.window
        low = progress * (1 - width)
        high = 1 - (1 - progress) * (1 - width)  # = low + width, and exactly 1 at u = 1, so that d = 1 is inside
        inside_N = (difficulty_N >= low) & (difficulty_N <= high)
        return inside_N.to(difficulty_N.dtype) / width
    tilt_N = settings.kappa * (2 * progress - 1) * (2 * difficulty_N - 1)
    return tilt_N.exp() if settings.shape == "exp" else 1 + tilt_N


def token_weights(
    difficulty_N: Tensor, progress: float, settings: Curriculum, normaliser: Tensor | float | None = None
) -> Tensor:
    """Curriculum weights.

    Parameters
    ----------
    difficulty_N
        (N,) d in [0, 1].
    progress
        u in [0, 1].
    settings
        κ, shape and window.
    normaliser
        Mean of :func:`raw_weights` over the global batch; the mean over ``difficulty_N`` where absent.

    Returns
    -------
    Tensor
        (N,) with mean 1 over the tokens that the normaliser covers, without gradient; all zero where the
        normaliser is 0 (no token lies in the window).
    """
    raw_N = raw_weights(difficulty_N, progress, settings)
    mean = raw_N.double().sum() / max(1, raw_N.numel()) if normaliser is None else normaliser
    return raw_N / mean if mean > 0 else torch.zeros_like(raw_N)


def progress_schedule(lrs: Sequence[float], kind: str) -> list[float]:
    """Progress u at the midpoint of each optimizer step.

    Parameters
    ----------
    lrs
        Learning rate η of each step.
    kind
        ``lr``: (Σ_{j<s} η_j + η_s/2) / Σ_j η_j, so that equal spans of u get equal learning; ``step``:
        (s + ½) / steps; ``easy``: 0; ``hard``: 1.

    Raises
    ------
    ValueError
        ``lr`` where no step learns, or a kind of another name.
    """
    steps = len(lrs)
    if kind == "lr":
        total = float(sum(lrs))
        if total <= 0:
            raise ValueError("progress: lr needs a learning rate above 0 at some step; use progress: step")
        done, schedule = 0.0, []
        for lr in lrs:
            schedule.append((done + float(lr) / 2) / total)
            done += float(lr)
        return schedule
    if kind == "step":
        return [(step + 0.5) / steps for step in range(steps)]
    if kind in ("easy", "hard"):
        return [float(kind == "hard")] * steps
    raise ValueError(f"progress {kind!r}: allowed are lr, step, easy and hard")

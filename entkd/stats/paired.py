"""Two arms compared over seeds and benchmark items.

Shape suffixes: S seeds, I items.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.95
"""Confidence level of every interval."""
ROUNDING = 1e-12
"""A standard deviation below this share of the largest value is what floating point leaves of zero."""


@dataclass(frozen=True)
class Difference:
    """A mean paired difference, in the units of the metric. NaN where the data cannot say."""

    estimate: float
    """Mean over seeds (and items)."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of the 95 % interval."""
    p: float
    """Two-sided p-value that claims rest on; NaN with one seed."""
    se: float
    """Standard error behind the interval."""
    df: float
    """Degrees of freedom behind the interval."""
    n_seeds: int
    """Seeds that both arms have."""
    n_items: int
    """Items that both arms have; 0 where the task reports none."""
    seed_low: float
    """Diagnostic: lower end of the Student t interval over seeds alone."""
    seed_high: float
    """Diagnostic: upper end of the Student t interval over seeds alone."""
    seed_variance: float
    """Variance over seeds of the difference of a whole run."""
    item_variance: float
    """What the choice of items adds to the variance of the estimate; more seeds do not lower it."""
    item_se: float
    """Diagnostic: standard error over items of the difference averaged over seeds."""


def t_interval(estimate: float, se: float, df: float) -> tuple[float, float, float]:
    """Interval and two-sided p of a t-distributed estimate.

    Where nothing varied (``se`` 0) there is no estimate of error: NaN, except that a difference of exactly zero
    between identical results is zero with p = 1.
    """
    if se == 0 and estimate == 0:
        return 0.0, 0.0, 1.0
    if not (se > 0 and df > 0):
        return math.nan, math.nan, math.nan
    half = float(stats.t.ppf(0.5 + LEVEL / 2, df)) * se
    return estimate - half, estimate + half, float(2 * stats.t.sf(abs(estimate) / se, df))


def variance_or_zero(values: NDArray[np.float64]) -> float:
    """Unbiased variance of a vector, with rounding noise taken for zero; NaN for fewer than two values."""
    if values.size < 2:
        return math.nan
    variance = float(values.var(ddof=1))
    return 0.0 if math.sqrt(variance) <= ROUNDING * float(np.abs(values).max()) else variance


def mean_squares(difference_SI: NDArray[np.float64]) -> tuple[float, float, float]:
    """MS_seed, MS_item and MS_residual of a two-way layout with one value per cell.

    Their expectations are n_I σ²_seed + σ², n_S σ²_item + σ² and σ². MS_seed and MS_residual are NaN with one seed.
    """
    n_S, n_I = difference_SI.shape
    grand = difference_SI.mean()
    seed_S, item_I = difference_SI.mean(1), difference_SI.mean(0)
    ms_seed = n_I * variance_or_zero(seed_S)
    ms_item = n_S * variance_or_zero(item_I)
    if n_S < 2 or n_I < 2:
        return ms_seed, ms_item, math.nan
    residual_SI = difference_SI - seed_S[:, None] - item_I[None, :] + grand
    return ms_seed, ms_item, float((residual_SI**2).sum()) / ((n_S - 1) * (n_I - 1))


def satterthwaite(
    ms_seed: NDArray[np.float64],
    ms_item: NDArray[np.float64],
    ms_residual: NDArray[np.float64],
    n_S: int,
    n_I: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """MS_seed + MS_item − MS_residual and its degrees of freedom, elementwise; not for both of the first two at 0.

    The sum falls below the larger of MS_seed and MS_item, and can even be negative, when a variance component is
    estimated as negative; that larger one with its own degrees of freedom replaces it then, which sets the negative
    component to zero.
    """
    df_seed, df_item = n_S - 1, n_I - 1
    total, larger = ms_seed + ms_item - ms_residual, np.maximum(ms_seed, ms_item)
    negative = total < larger * (1 - ROUNDING)
    spread = ms_seed**2 / df_seed + ms_item**2 / df_item + ms_residual**2 / (df_seed * df_item)
    own = np.where(ms_seed > ms_item, df_seed, df_item)
    return np.where(negative, larger, total), np.where(negative, own, total**2 / spread)


def crossed_variance(difference_SI: NDArray[np.float64]) -> tuple[float, float]:
    """Variance of the grand mean when seeds and items are both samples, and its degrees of freedom.

    (MS_seed + MS_item − MS_residual) / (n_S n_I), see ``satterthwaite``.
    """
    n_S, n_I = difference_SI.shape
    ms_seed, ms_item, ms_residual = np.array(mean_squares(difference_SI))
    if max(ms_seed, ms_item) == 0:
        return 0.0, float(n_S - 1)
    total, df = satterthwaite(ms_seed, ms_item, ms_residual, n_S, n_I)
    return float(total) / (n_S * n_I), float(df)


def compare(difference_S: NDArray[np.float64], difference_SI: NDArray[np.float64] | None = None) -> Difference:
    """Mean paired difference with interval and p.

    Parameters
    ----------
    difference_S
        Arm minus reference, one value per common seed.
    difference_SI
        The same per item, where the task has items; its mean over items is ``difference_S``.

    Notes
    -----
    With items and at least two seeds the interval comes from the crossed seed × item variance (``crossed_variance``);
    without items it is Student's t over seeds. With one seed the interval is over items alone: it says nothing about
    another seed, and ``p`` is NaN so that no claim can be made.

    ``p`` is the larger of the crossed test's and the paired t over seeds'. The crossed test holds its level near 0.05
    but not in the tail that a correction for many tests reaches: with 3 seeds MS_seed has 2 degrees of freedom, is
    often small by chance, and then Satterthwaite's formula trusts the items instead. Simulated at 3 seeds, it rejects
    a true null at 0.001 up to 25 times too often; the larger of the two p-values keeps the level.
    """
    estimate = float(difference_S.mean())
    n_S = difference_S.size
    seed_variance = variance_or_zero(difference_S)
    seed_se = math.sqrt(seed_variance / n_S) if n_S > 1 else math.nan
    seed_low, seed_high, seed_p = t_interval(estimate, seed_se, n_S - 1)
    if difference_SI is None or difference_SI.shape[1] < 2:
        return Difference(
            estimate, seed_low, seed_high, seed_p, seed_se, n_S - 1, n_S, 0, seed_low, seed_high, seed_variance,
            item_variance=0.0, item_se=math.nan,
        )  # fmt: skip
    n_I = difference_SI.shape[1]
    _, ms_item, ms_residual = mean_squares(difference_SI)
    item_se = math.sqrt(ms_item / (n_S * n_I))
    if n_S < 2:
        variance, df, item_variance = item_se**2, float(n_I - 1), item_se**2
    else:
        variance, df = crossed_variance(difference_SI)
        item_variance = max(0.0, ms_item - ms_residual) / (n_S * n_I)
    low, high, crossed_p = t_interval(estimate, math.sqrt(variance), df)
    p = float(np.maximum(crossed_p, seed_p)) if n_S > 1 else math.nan
    return Difference(
        estimate, low, high, p, math.sqrt(variance), df, n_S, n_I, seed_low, seed_high, seed_variance,
        item_variance, item_se,
    )  # fmt: skip

"""What a design can detect: power of the two-sided t-test by the noncentral t distribution."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

from scipy import optimize, stats

MOST_SEEDS = 1000
"""Above this the answer to "how many seeds?" is "do not": reported as NaN."""


def power(shift: float, df: float, alpha: float) -> float:
    """Probability that the t-test rejects at ``alpha`` when the true effect is ``shift`` standard errors."""
    critical = float(stats.t.isf(alpha / 2, df))
    # The lower tail as the upper tail of the mirrored distribution: scipy's nct.cdf is NaN there.
    return float(stats.nct.sf(critical, df, shift) + stats.nct.sf(critical, df, -shift))


@lru_cache(maxsize=4096)
def detectable_shift(df: float, alpha: float, target: float) -> float:
    """Effect in standard errors that the t-test detects with power ``target``."""
    upper = 1.0
    while power(upper, df, alpha) < target:
        upper *= 2
    return float(optimize.brentq(lambda shift: power(shift, df, alpha) - target, 0.0, upper, xtol=1e-9))


def smallest_detectable(se: float, df: float, alpha: float, target: float) -> float:
    """Smallest true effect, in the units of ``se``, that is detected with power ``target``; NaN without an error."""
    return detectable_shift(df, alpha, target) * se if se > 0 and df > 0 else math.nan


def seeds_needed(estimate: float, variance: float, df: Callable[[int], int], alpha: float, target: float) -> float:
    """Fewest seeds at which a true effect as large as ``estimate`` would be detected with power ``target``.

    Parameters
    ----------
    estimate, variance
        The effect, and the variance that one seed contributes to it.
    df
        Degrees of freedom of the error as a function of the number of seeds.

    Returns
    -------
    float
        A whole number, or NaN where it exceeds ``MOST_SEEDS`` or the variance is unknown.
    """
    if not (variance > 0 and estimate != 0):
        return math.nan

    def enough(n: int) -> bool:
        return power(abs(estimate) / math.sqrt(variance / n), df(n), alpha) >= target

    few, many = 1, 2
    while not enough(many):
        few, many = many, 2 * many
        if few > MOST_SEEDS:
            return math.nan
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if enough(middle) else (middle, many)
    return float(many) if many <= MOST_SEEDS else math.nan

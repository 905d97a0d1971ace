"""What a comparison of two arms can detect: it claims only where both of its tests reject.

Paired t over seeds and seeds crossed with items share the estimate and MS_seed, so the power of both together is below
that of either: the mean squares are integrated out, as independent multiples of χ².
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

from entkd.stats.paired import satterthwaite

NODES = (64, 16, 4)
"""Equally likely values of MS_seed, MS_item and MS_residual; the first has the fewest degrees of freedom."""
DF = np.geomspace(0.5, 1e6, 400)
"""Degrees of freedom between which critical values are interpolated."""


def jointly_detectable(
    seed: float, item: float, residual: float, n_S: int, n_I: int, alpha: float, target: float
) -> float:
    """Smallest true difference at which both tests reject with power ``target``.

    Parameters
    ----------
    seed, item, residual
        Expected MS_seed, MS_item and MS_residual over n_S · n_I: the first two are the squared standard errors over
        seeds alone and over items alone.
    n_S, n_I
        Seeds and items, two at least.
    alpha
        Level of each test, two-sided.
    """
    unit_N = [_expected_one(df, nodes) for df, nodes in zip(_df(n_S, n_I), NODES, strict=True)]
    seed_N, item_N, residual_N = (
        axis.ravel() for axis in np.meshgrid(seed * unit_N[0], item * unit_N[1], residual * unit_N[2], indexing="ij")
    )
    total_N, df_N = satterthwaite(seed_N, item_N, residual_N, n_S, n_I)
    limit_N = np.maximum(_critical(df_N, alpha) * np.sqrt(total_N), stats.t.isf(alpha / 2, n_S - 1) * np.sqrt(seed_N))
    # The estimate is independent of the mean squares in a balanced normal layout.
    se = math.sqrt(seed + item - residual)

    def power(effect: float) -> float:
        above, below = special.ndtr((effect - limit_N) / se), special.ndtr((-effect - limit_N) / se)
        return float((above + below).mean())

    upper = se
    while power(upper) < target:
        upper *= 2
    return float(optimize.brentq(lambda effect: power(effect) - target, 0.0, upper, xtol=1e-6 * se))


def _df(n_S: int, n_I: int) -> tuple[int, int, int]:
    return n_S - 1, n_I - 1, (n_S - 1) * (n_I - 1)


@lru_cache(maxsize=256)
def _expected_one(df: int, nodes: int) -> NDArray[np.float64]:
    """χ²/df at the middles of equally likely parts."""
    middle_N = (np.arange(nodes) + 0.5) / nodes
    value_N: NDArray[np.float64] = stats.chi2.ppf(middle_N, df) / df
    return value_N


@lru_cache(maxsize=256)
def _critical_at(alpha: float) -> NDArray[np.float64]:
    """Logarithm of the critical value of t at ``DF``."""
    value_N: NDArray[np.float64] = np.log(stats.t.isf(alpha / 2, DF))
    return value_N


def _critical(df_N: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    return np.exp(np.interp(np.log(df_N), np.log(DF), _critical_at(alpha)))

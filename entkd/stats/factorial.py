"""The factorial of the components, analysed in blocks of one seed: 2³ cells where all three are varied on one base.

Shape suffixes: C cells in the order of ``Factorial.cells``, S seeds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from entkd.design import Factorial
from entkd.stats.paired import ROUNDING, t_interval


@dataclass(frozen=True)
class Effect:
    """One contrast of the factorial, in the units of the metric. NaN where the data cannot say."""

    effect: str
    """Name, a key of ``Factorial.contrasts``."""
    estimate: float
    """Mean difference over seeds."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of the 95 % interval."""
    p: float
    """Two-sided p-value; NaN with one seed."""
    df: int
    """Degrees of freedom of the pooled error, (cells − 1)(n_seeds − 1): with 3 seeds 14 for 8 cells, 30 for 16."""
    variance: float
    """Variance that one seed contributes: the pooled error times the sum of the squared coefficients."""
    n_seeds: int
    """Blocks."""


def factorial_effects(design: Factorial, values_CS: NDArray[np.float64]) -> list[Effect]:
    """Every effect of the design.

    The model is cell + seed + error: what a seed shares among the cells drops out, and the error pools the
    (n_C − 1)(n_S − 1) degrees of freedom that are left, where a single pair of arms has n_S − 1. It is an analysis of
    whole runs: it generalises over seeds, on the items that were scored. It holds for a half fraction as it is: every
    cell has a mean of its own, so what is aliased changes the meaning of an estimate and never its error.

    Parameters
    ----------
    values_CS
        Scores, cells in the order of ``design.arms``, seeds paired by column.
    """
    n_C, n_S = values_CS.shape
    mean_C, df = values_CS.mean(1), (n_C - 1) * (n_S - 1)
    residual_CS = values_CS - mean_C[:, None] - values_CS.mean(0)[None, :] + values_CS.mean()
    error = float((residual_CS**2).sum()) / df if df else math.nan
    if math.sqrt(error) <= ROUNDING * float(np.abs(values_CS).max()):
        error = 0.0
    effects = []
    for name, coefficients in design.contrasts.items():
        coefficients_C = np.array(coefficients)
        estimate = float(coefficients_C @ mean_C)
        variance = error * float((coefficients_C**2).sum())
        low, high, p = t_interval(estimate, math.sqrt(variance / n_S), df)
        effects.append(Effect(name, estimate, low, high, p, df, variance, n_S))
    return effects

"""The share of the teacher's lead over the untrained student that an arm has closed. Descriptive: never tested."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from entkd.stats.paired import LEVEL


def fieller(closed_S: NDArray[np.float64], gap_S: NDArray[np.float64]) -> tuple[float, float, float]:
    """Ratio of two means over seeds with Fieller's 95 % interval.

    The limits are the roots of (Ȳ² − t² v_yy) ρ² − 2 (X̄Ȳ − t² v_xy) ρ + (X̄² − t² v_xx) = 0, where v are variances and
    the covariance of the means. With a constant gap this is Student's t interval over the gap.

    Parameters
    ----------
    closed_S
        Arm minus untrained student, one value per seed.
    gap_S
        Teacher minus untrained student of the same seeds.

    Returns
    -------
    tuple
        Ratio, low, high. The limits are NaN with one seed, or where the gap itself is not apart from zero (the set of
        plausible ratios is then unbounded).
    """
    n_S = closed_S.size
    closed, gap = float(closed_S.mean()), float(gap_S.mean())
    ratio = closed / gap
    if n_S < 2:
        return ratio, math.nan, math.nan
    (v_xx, v_xy), (_, v_yy) = np.cov(closed_S, gap_S) / n_S
    t2 = float(stats.t.ppf(0.5 + LEVEL / 2, n_S - 1)) ** 2
    a, b, c = gap**2 - t2 * v_yy, closed * gap - t2 * v_xy, closed**2 - t2 * v_xx
    if a <= 0:
        return ratio, math.nan, math.nan
    half = math.sqrt(max(0.0, b**2 - a * c)) / a
    return ratio, float(b / a - half), float(b / a + half)

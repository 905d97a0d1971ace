"""From p-values to claims.

Two families, declared before any run: the primary one is the contrasts of the factorial that ``Factorial.primary``
names (the main effects of the three components and full − kd; with two bases the main effects are over both, and full −
kd is on the first), corrected by Holm over these on each task; everything else is exploratory, corrected by Holm over
all tests of its table.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Claim = Literal["better", "worse", "not shown"]
"""What a comparison shows."""


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """Holm's step-down adjusted p-values; NaNs stay NaN and do not count as tests.

    The k-th smallest of m is multiplied by m − k + 1, capped at 1, and made no smaller than the one before it.
    """
    p_N = np.asarray(p, dtype=float)
    adjusted_N = np.full(p_N.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(p_N))
    order = tested[np.argsort(p_N[tested], kind="stable")]
    factor = np.arange(order.size, 0, -1)
    adjusted_N[order] = np.minimum(1.0, np.maximum.accumulate(p_N[order] * factor))
    return adjusted_N


def claim(p_holm: float, estimate: float, direction: str, alpha: float) -> Claim:
    """A claim only for ``p_holm < alpha`` (a NaN, as from one seed, is not); its sign by the metric's direction."""
    if not p_holm < alpha:
        return "not shown"
    return "better" if (estimate > 0) == (direction == "higher") else "worse"

"""Scales that one arm far outside the others does not rule."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

BULK = 0.7
"""Share of the distances that certainly belong on the scale."""
FAR = 4.0
"""A distance is far outside where it is more than this many times that of the bulk."""


def bulk_limit(distances: Iterable[float]) -> float:
    """The largest of the distances that are not far outside; 0 only where none is above 0."""
    known = np.asarray(list(distances), dtype=float)
    # Where most arms equal the reference exactly, the others alone say how wide the scale is.
    own = known[np.isfinite(known) & (known > 0)]
    if not len(own):
        return 0.0
    return float(own[own <= FAR * np.quantile(own, BULK)].max())

"""Scales that one arm far outside the others does not rule, and how such an arm is shown at the edge instead."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.axes import Axes

BULK = 0.7
"""Share of the distances that certainly belong on the scale."""
FAR = 4.0
"""A distance, with its interval, is far outside where it is more than this many times that of the bulk."""
FAR_ALONE = 8.0
"""The same for distances without intervals, which would be the larger part of most."""


def bulk_limit(distances: Iterable[float], far: float = FAR) -> float:
    """The largest of the distances that are not far outside; 0 only where none is above 0."""
    known = np.asarray(list(distances), dtype=float)
    # Where most arms equal the reference exactly, the others alone say how wide the scale is.
    own = known[np.isfinite(known) & (known > 0)]
    if not len(own):
        return 0.0
    return float(own[own <= far * np.quantile(own, BULK)].max())


def bulk_range(values: Iterable[float]) -> tuple[float, float]:
    """The smallest and the largest of the values that are not far from their median; without any, both NaN."""
    known = np.asarray(list(values), dtype=float)
    known = known[np.isfinite(known)]
    if not len(known):
        return np.nan, np.nan
    distance = np.abs(known - np.median(known))
    near = known[distance <= bulk_limit(distance, FAR_ALONE)]
    return float(near.min()), float(near.max())


def signed(value: float) -> str:
    """A difference in few digits."""
    return f"{'+' if value > 0 else ''}{short(value)}"


def short(value: float) -> str:
    """At most five digits; a narrow panel has no room for more."""
    if not np.isfinite(value):
        return f"{value:g}".replace("inf", "∞").replace("-", "−")
    if 1000 <= abs(value) < 1e5:
        text = f"{value:.0f}"
    else:
        text = f"{value:.3g}" if abs(value) < 1e5 else f"{value:.1e}".replace("e+0", "e").replace("e+", "e")
    return text.replace("-", "−")


def draw_at_edge(ax: Axes, edge: float, inward: float, y: float, text: str, marker: str, **style: Any) -> None:
    """A marker near the edge of the x axis with an arrow out of the panel, and its number on the inner side.

    ``inward`` is where the panel's other edge lies.
    """
    width = inward - edge
    colour = style["color"]
    place = edge + 0.13 * width
    arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": 0.9, "mutation_scale": 6, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", xy=(edge, y), xytext=(place, y), arrowprops=arrow, zorder=2)
    ax.plot(place, y, marker, zorder=3, **style)
    right = (width < 0) != ax.xaxis_inverted()
    ax.text(
        edge + 0.18 * width,
        y,
        text,
        color=colour,
        fontsize=6.5,
        ha="right" if right else "left",
        va="center",
        # The zero line runs behind a long number, not through it.
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        zorder=2,
    )

"""Quality against cost: what an arm's training took and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from entkd.figures.scale import FAR_ALONE, bulk_limit, short
from entkd.figures.style import GREY, ROLE_LABEL, TEXT_WIDTH, Study, number
from entkd.names import GAP_CLOSED

COSTS = {"seconds": "student training per run (s)", "tflops": "student training per run (TFLOP)"}
EDGE = 0.14
"""Room at an end of the axis for what lies beyond it, in shares of the range of the others."""


def draw_cost(study: Study, runs: pd.DataFrame) -> Figure:
    """Gap closed (of the first suite that states one), or else the first task, over seconds and TFLOP of one run.

    Of the gap closed, the thin bars are the intervals.
    """
    quality, label = _quality(study)
    means = runs.groupby("arm")[list(COSTS)].mean()
    rows = quality[["mean", "low", "high"]].join(means).reindex([arm.name for arm in study.arms])
    height = max(2.6, 0.135 * len(study.arms) + 0.9)
    figure = Figure(figsize=(TEXT_WIDTH, height), layout="constrained")
    axes = figure.subplots(1, len(COSTS), sharey=True)
    scale = _Scale.of(rows)
    for ax, name in zip(axes, COSTS, strict=True):
        _draw(ax, rows, name, study, scale)
    axes[0].set_ylabel(label)
    _name_points(axes[-1], rows, list(COSTS)[-1], study, scale)
    roles = {arm.role: arm for arm in study.arms}
    handles = [Line2D([], [], color=a.colour, marker=a.marker, ls="", label=ROLE_LABEL[r]) for r, a in roles.items()]
    if rows["low"].notna().any():
        handles.append(
            Line2D([], [], color=GREY, marker="|", markersize=9, markeredgewidth=0.7, ls="", label="95 % interval")
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _quality(study: Study) -> tuple[pd.DataFrame, str]:
    """The table's rows of one measure by arm, and the label of its axis."""
    trained = study.table[study.table["arm"].isin([arm.name for arm in study.arms])]
    stated = trained[trained["task"].str.endswith(GAP_CLOSED) & trained["mean"].notna()]
    if len(stated):
        name = stated["task"].iloc[0]
        suite = f" ({name.removesuffix(f'/{GAP_CLOSED}')})" if "/" in name else ""
        gap = trained[trained["task"] == name].set_index("arm")
        return gap, f"share of the untrained–teacher\ngap closed{suite} →"
    task = study.tasks[0]
    arrow = "better →" if task.direction == "higher" else "← better"
    # The interval in the row of a task is that of its difference to the reference.
    level = task.of(trained).assign(low=np.nan, high=np.nan)
    return level.set_index("arm"), f"{task.title}\n{task.unit}, {arrow}"


@dataclass(frozen=True)
class _Scale:
    """The y axis, and the range on it that holds what is not far outside; what is stands between that and the ends."""

    bottom: float
    low: float
    high: float
    top: float

    @classmethod
    def of(cls, rows: pd.DataFrame) -> _Scale:
        """The scale for these rows' means and intervals; of a much wider interval, only a part is on it."""
        means, numbers = rows["mean"], rows[["mean", "low", "high"]]
        finite = numbers.where(np.isfinite(numbers))
        middle = finite["mean"].median()
        if rows["low"].isna().all():
            reach = bulk_limit((means - middle).abs(), FAR_ALONE)
        else:
            reach = bulk_limit((finite - middle).abs().max(axis=1))
        near = finite[(means - middle).abs() <= reach].clip(middle - reach, middle + reach)
        low, high = (0.0, 1.0) if near.empty else (float(np.nanmin(near)), float(np.nanmax(near)))
        unit = (high - low) or 0.1 * abs(high) or 1.0
        below, above = (EDGE if far else 0.0 for far in (means.min() < low, means.max() > high))
        return cls(low - (0.06 + below) * unit, low, high, high + (0.06 + above) * unit)

    def place(self, mean: float) -> float:
        """Where a mean is drawn."""
        if mean < self.low:
            return 0.5 * (self.bottom + self.low)
        return 0.5 * (self.high + self.top) if mean > self.high else mean

    def edge(self, mean: float) -> float | None:
        """The end of the axis beyond which a mean lies."""
        if self.low <= mean <= self.high or np.isnan(mean):
            return None
        return self.bottom if mean < self.low else self.top


def _draw(ax: Axes, rows: pd.DataFrame, name: str, study: Study, scale: _Scale) -> None:
    """One marker per arm; a mean far outside the others is at the edge, with an arrow."""
    for arm in study.arms:
        x, mean = number(rows, arm.name, name), number(rows, arm.name, "mean")
        y, edge = scale.place(mean), scale.edge(mean)
        if edge is not None:
            arrow = {"arrowstyle": "-|>", "color": arm.colour, "linewidth": 0.9, "mutation_scale": 6, "shrinkB": 0}
            ax.annotate("", xy=(x, edge), xytext=(x, y), arrowprops=arrow | {"shrinkA": 0}, zorder=2)
        elif not np.isnan(number(rows, arm.name, "low")):
            # What is open, or much wider than the others, ends where the axis does.
            low, high = np.clip([number(rows, arm.name, end) for end in ("low", "high")], scale.bottom, scale.top)
            ax.vlines(x, low, high, arm.colour, linewidth=0.7, alpha=0.6, zorder=1)
        ax.plot(x, y, arm.marker, color=arm.colour, markerfacecolor="white", markeredgewidth=0.9)
    ax.set_xlabel(COSTS[name])
    ax.margins(x=0.12)
    ax.set_ylim(scale.bottom, scale.top)
    ax.locator_params(axis="x", nbins=5)
    ax.grid(True)


def _name_points(ax: Axes, rows: pd.DataFrame, name: str, study: Study, scale: _Scale) -> None:
    """Arm names in the right margin in the order of their height, each with a thin line to its point.

    A mean that is not at its place is written behind the name.
    """
    means = {arm.name: number(rows, arm.name, "mean") for arm in study.arms}
    arms = sorted((arm for arm in study.arms if np.isfinite(means[arm.name])), key=lambda arm: means[arm.name])
    places = [scale.place(means[arm.name]) for arm in arms]
    heights = spread_out([(place - scale.bottom) / (scale.top - scale.bottom) for place in places])
    for arm, place, height in zip(arms, places, heights, strict=True):
        mean = means[arm.name]
        ax.annotate(
            arm.name if scale.edge(mean) is None else f"{arm.name} ({short(mean)})",
            xy=(number(rows, arm.name, name), place),
            xytext=(1.06, height),
            textcoords="axes fraction",
            va="center",
            color=arm.colour,
            fontsize=6.5,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": GREY,
                "linewidth": 0.3,
                "shrinkA": 1,
                "shrinkB": 2,
                "relpos": (0, 0.5),
            },
        )


def spread_out(wanted: Sequence[float]) -> list[float]:
    """Ascending heights in [0, 1], as near to the ascending ``wanted`` ones as a common distance allows."""
    step = min(0.06, 1 / max(1, len(wanted) - 1))
    heights = list(wanted)
    for place in range(1, len(heights)):
        heights[place] = max(heights[place], heights[place - 1] + step)
    ceiling = 1.0
    for place in reversed(range(len(heights))):
        heights[place] = min(heights[place], ceiling)
        ceiling = heights[place] - step
    return heights

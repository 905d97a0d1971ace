"""Every seed of every arm, per task, between the untrained student and the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from entkd.figures.scale import bulk_range, draw_at_edge, short
from entkd.figures.style import (
    BLACK,
    COLUMN_WIDTH,
    GREY,
    LIGHT_GREY,
    ROLE_LABEL,
    Arm,
    Study,
    Task,
    few_ticks,
    task_panels,
)

SEED: Final[dict[str, Any]] = {"alpha": 0.55, "markersize": 4.5, "markeredgewidth": 0}
MEAN: Final[dict[str, Any]] = {"markerfacecolor": "none", "markeredgewidth": 1.0}


def draw_tasks(study: Study) -> Figure:
    """Small dots are seeds, large markers their mean; lines are the teacher and the untrained student.

    A mean far outside the others, or else a seed, is at the edge with its number.
    """
    figure, panels = task_panels(study.tasks, [arm.name for arm in study.arms], "{unit}", margin=0.5)
    for ax, task in panels:
        _draw_panel(ax, task, task.of(study.scores), study)
    roles = {arm.role: arm for arm in study.arms}
    handles = [Line2D([], [], color=a.colour, marker=a.marker, ls="", label=ROLE_LABEL[r]) for r, a in roles.items()]
    handles += [
        Line2D([], [], color=GREY, marker=".", markersize=4, linestyle="", alpha=0.7, label="one seed"),
        Line2D([], [], color=BLACK, linewidth=0.9, label="teacher"),
        Line2D([], [], color=BLACK, linewidth=0.9, linestyle=":", label="untrained"),
    ]
    ncols = len(handles) if figure.get_figwidth() > COLUMN_WIDTH + 1 else 3
    figure.legend(handles=handles, loc="outside lower center", ncols=ncols, columnspacing=1.2)
    return figure


def _draw_panel(ax: Axes, task: Task, values: pd.DataFrame, study: Study) -> None:
    low, high = bulk_range(values.loc[values["arm"].isin([arm.name for arm in study.arms]), "value"])
    ends, texts = _ends(values, low, high)
    for level, dash in ends:
        ax.axvline(level, color=BLACK, linewidth=0.9, linestyle=dash, zorder=1)
    # An arm between the lines is where it is, however far from the other arms.
    low, high = min([low, *(level for level, _ in ends)]), max([high, *(level for level, _ in ends)])
    far = []
    for y, arm in enumerate(study.arms):
        if y and study.arms[y - 1].role != arm.role:
            ax.axhline(y - 0.5, color=LIGHT_GREY, linewidth=0.6, zorder=0)
        seeds = values.loc[values["arm"] == arm.name, "value"].dropna()
        if seeds.empty:
            continue
        near = seeds[seeds.between(low, high)]
        mean = float(seeds.mean())
        ax.plot(near, [y] * len(near), ".", color=arm.colour, **SEED)
        if len(near) == len(seeds) or low <= mean <= high:  # rounding can put the mean of equal seeds outside of them
            ax.plot(mean, y, arm.marker, color=arm.colour, **MEAN)
        far += [_Far(y, value, is_mean, near, arm) for value, is_mean in _outermost(seeds, mean, low, high)]
    ax.margins(x=0.12)
    _draw_far(ax, far, (low + high) / 2)
    ax.set_title(task.title)
    arrow = "better →" if task.direction == "higher" else "← better"
    ax.set_xlabel("\n".join([task.axis_label("{unit}", arrow), *texts]))
    few_ticks(ax)


@dataclass(frozen=True)
class _Far:
    """What of one arm lies far outside the others: its mean, or else a seed."""

    y: int
    value: float
    is_mean: bool
    near: pd.Series
    """The arm's seeds that are not far outside."""
    arm: Arm


def _outermost(seeds: pd.Series, mean: float, low: float, high: float) -> list[tuple[float, bool]]:
    """What to write at each edge, and whether that is the mean: the mean where it is outside, else the last seed."""
    sides = ((seeds.min() < low, mean < low, seeds.min()), (seeds.max() > high, mean > high, seeds.max()))
    return [(mean if beyond else float(last), bool(beyond)) for any_seed, beyond, last in sides if any_seed]


def _draw_far(ax: Axes, far: Sequence[_Far], middle: float) -> None:
    """Numbers at the edges, in a room that the arms' other seeds leave free."""
    low, high = ax.get_xlim()
    for one in far:
        share = min(0.55, 0.24 + 0.06 * len(short(one.value)))
        if one.near.empty:
            continue
        if one.value > middle:
            high = max(high, (float(one.near.max()) - share * low) / (1 - share))
        else:
            low = min(low, (float(one.near.min()) - share * high) / (1 - share))
    ax.set_xlim(low, high)
    for one in far:
        edge, inward = (high, low) if one.value > middle else (low, high)
        marker, style = (one.arm.marker, MEAN | {"markerfacecolor": "white"}) if one.is_mean else (".", SEED)
        draw_at_edge(ax, edge, inward, one.y, short(one.value), marker, color=one.arm.colour, **style)


def _ends(values: pd.DataFrame, low: float, high: float) -> tuple[list[tuple[float, str]], list[str]]:
    """Teacher and untrained student as level and dash of a line; texts for those too far outside the arms for one."""
    reach = 2 * (high - low)
    ends, far = [], []
    for name, dash in (("teacher", "-"), ("untrained", ":")):
        level = values.loc[values["arm"] == name, "value"].mean()
        if pd.isna(level):
            continue
        if low - reach <= level <= high + reach:
            ends.append((float(level), dash))
        else:
            far.append(f"({name}: {level:.3g})")
    return ends, far

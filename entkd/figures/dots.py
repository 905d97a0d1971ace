"""Every seed of every arm, per task, between the untrained student and the teacher."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from entkd.figures.style import (
    BLACK,
    COLUMN_WIDTH,
    GREY,
    LIGHT_GREY,
    ROLE_LABEL,
    Study,
    Task,
    few_ticks,
    task_panels,
)


def draw_tasks(study: Study) -> Figure:
    """Small dots are seeds, large markers their mean; lines are the teacher and the untrained student."""
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
    for y, arm in enumerate(study.arms):
        if y and study.arms[y - 1].role != arm.role:
            ax.axhline(y - 0.5, color=LIGHT_GREY, linewidth=0.6, zorder=0)
        seeds = values.loc[values["arm"] == arm.name, "value"].dropna()
        if seeds.empty:
            continue
        ax.plot(seeds, [y] * len(seeds), ".", color=arm.colour, alpha=0.55, markersize=4.5, markeredgewidth=0)
        ax.plot(seeds.mean(), y, arm.marker, color=arm.colour, markerfacecolor="none", markeredgewidth=1.0)
    ax.margins(x=0.12)
    far = _draw_ends(ax, values)
    ax.set_title(task.title)
    arrow = "better →" if task.direction == "higher" else "← better"
    ax.set_xlabel("\n".join([task.axis_label("{unit}", arrow), *far]))
    few_ticks(ax)


def _draw_ends(ax: Axes, values: pd.DataFrame) -> list[str]:
    """Teacher and untrained student as lines; texts for those that lie too far outside the arms to be drawn."""
    low, high = ax.get_xlim()
    reach = 1.5 * (high - low)
    far = []
    for name, dash in (("teacher", "-"), ("untrained", ":")):
        level = values.loc[values["arm"] == name, "value"].mean()
        if pd.isna(level):
            continue
        if low - reach <= level <= high + reach:
            ax.axvline(float(level), color=BLACK, linewidth=0.9, linestyle=dash, zorder=1)
        else:
            far.append(f"({name}: {level:.3g})")
    return far

"""Estimates with intervals, one panel per task: the forest plot of arms and the effects of the components."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from entkd.figures.scale import bulk_limit, draw_at_edge, signed
from entkd.figures.style import (
    BLACK,
    BLUE,
    COLUMN_WIDTH,
    GREY,
    LIGHT_GREY,
    ROLE_LABEL,
    Arm,
    Study,
    few_ticks,
    number,
    task_panels,
)

CLAIMS = ("better", "worse")


@dataclass(frozen=True)
class Row:
    """One row of every panel."""

    key: str
    """Value of the frame's key column."""
    label: str
    group: str
    """A thin line separates groups."""
    colour: str
    marker: str


def draw_forest(study: Study) -> Figure:
    """Difference of every arm to the reference, per task, with its 95 % interval.

    The claim of a declared contrast of the factorial is about other seeds on the same items, the interval in its row
    about other items as well. Where that interval holds 0 the marker is half filled.
    """
    rows = [Row(arm.name, arm.name, arm.role, arm.colour, arm.marker) for arm in study.arms if arm.role != "reference"]
    frame = study.table.rename(columns={"delta": "estimate"})
    figure = _interval_panels(study, frame, "arm", rows, "Δ {unit}")
    figure.suptitle(f"Difference to {study.reference}, 95 % interval")
    roles = [arm for arm in _first_of_each_role(study.arms) if arm.role != "reference"]
    handles = [
        Line2D([], [], color=arm.colour, marker=arm.marker, linestyle="-", label=ROLE_LABEL[arm.role]) for arm in roles
    ]
    handles += _claim_handles(study)
    if (frame["claim"].isin(CLAIMS) & (frame["low"] < 0) & (frame["high"] > 0)).any():
        handles.append(_marker("claimed for these items only", fillstyle="left", markerfacecoloralt="white"))
    _legend(figure, handles)
    return figure


def draw_effects(study: Study, frame: pd.DataFrame) -> Figure:
    """Main effects and interactions of the factors, per task, with their 95 % intervals."""
    families = frame.drop_duplicates("effect").set_index("effect")["family"]
    factors = {name for effect in families.index if ":" in effect for name in _factors(effect)}
    rows = [
        Row(
            name,
            _effect_label(name, factors),
            family,
            BLUE if family == "primary" else GREY,
            "o" if family == "primary" else "s",
        )
        for family in ("primary", "exploratory")
        for name in families.index[families == family]
    ]
    figure = _interval_panels(study, frame, "effect", rows, "Δ {unit}")
    figure.suptitle("Effects of the components, 95 % interval")
    handles = [
        Line2D([], [], color=BLUE, marker="o", label="primary family"),
        Line2D([], [], color=GREY, marker="s", label="exploratory"),
    ]
    _legend(figure, handles + _claim_handles(study))
    return figure


def _effect_label(name: str, factors: Collection[str]) -> str:
    """`a:b` is an interaction, `a:b = -c:d` an aliased pair (on two lines), `a-b` a difference of two arms.

    The name of a larger interaction is too long for a label: it is told by the factors that are not in it.
    """
    if " = " in name:
        return name.replace(" = -", "\n= −").replace(" = ", "\n= ").replace(":", " × ")
    own = _factors(name)
    if len(own) > 2:
        others = sorted(set(factors) - set(own))
        return f"{len(own)}-way interaction" + (f" without {' and '.join(others)}" if others else "")
    return name.replace(":", " × ") if len(own) > 1 else name.replace("-", " − ")


def _factors(interaction: str) -> list[str]:
    return interaction.split(" = ")[0].split(":")


def _first_of_each_role(arms: Sequence[Arm]) -> list[Arm]:
    return list({arm.role: arm for arm in reversed(arms)}.values())[::-1]


def _claim_handles(study: Study) -> list[Line2D]:
    labels = {BLACK: f"claimed (Holm p < {study.alpha:g})", "white": "difference not shown"}
    return [_marker(label, markerfacecolor=face) for face, label in labels.items()]


def _marker(label: str, **style: Any) -> Line2D:
    return Line2D([], [], color=BLACK, marker="o", linestyle="", label=label, **style)


def _legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    columns = -(-len(handles) // (1 + (len(handles) > 5))) if figure.get_figwidth() > COLUMN_WIDTH + 1 else 2
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, columnspacing=1.4)


def _interval_panels(study: Study, frame: pd.DataFrame, key: str, rows: Sequence[Row], label: str) -> Figure:
    """One panel per task; the rows are shared. Better is always to the right."""
    figure, panels = task_panels(study.tasks, [row.label for row in rows], label, margin=0.6)
    for ax, task in panels:
        values = task.of(frame).drop_duplicates(key).set_index(key)
        limit = _limit(values, [row.key for row in rows])
        # Before anything is drawn: the direction decides on which side of a marker at the edge its number is.
        ax.set_xlim(*((-limit, limit) if task.direction == "higher" else (limit, -limit)))
        _draw_panel(ax, values, rows, limit)
        ax.set_title(task.title)
        ax.set_xlabel(task.axis_label(label, "better →"))
        few_ticks(ax)
    return figure


def _draw_panel(ax: Axes, values: pd.DataFrame, rows: Sequence[Row], limit: float) -> None:
    """The intervals of one panel; an estimate far outside the others is at the edge, with its number."""
    ax.axvline(0, color=BLACK, linewidth=0.7, zorder=1)
    for y, row in enumerate(rows):
        if y and rows[y - 1].group != row.group:
            ax.axhline(y - 0.5, color=LIGHT_GREY, linewidth=0.6, zorder=0)
        if row.key not in values.index:
            continue
        estimate, low, high = (number(values, row.key, column) for column in ("estimate", "low", "high"))
        if np.isnan(estimate):
            continue
        style = _style(row, str(values.at[row.key, "claim"]), low < 0 < high)
        if abs(estimate) > limit:
            edge = float(np.copysign(limit, estimate))
            draw_at_edge(ax, edge, -edge, y, signed(estimate), row.marker, **style)
            continue
        if not np.isnan(low):
            ends = np.clip([low, high], -2 * limit, 2 * limit)  # an open end is drawn out of the panel
            ax.plot(ends, [y, y], color=row.colour, linewidth=1.1, zorder=2)
        ax.plot(estimate, y, row.marker, zorder=3, **style)


def _style(row: Row, claim: str, holds_zero: bool) -> dict[str, Any]:
    """How a marker is filled: whole for a claim, half where its interval holds 0, else not at all."""
    face = row.colour if claim in CLAIMS else "white"
    return {
        "color": row.colour,
        "markerfacecolor": face,
        "markerfacecoloralt": "white",
        "fillstyle": "left" if face != "white" and holds_zero else "full",
        "markeredgewidth": 0.9,
    }


def _limit(values: pd.DataFrame, keys: Sequence[str]) -> float:
    """Half the width of a panel around zero: all intervals, or the bulk of them where a few lie far outside."""
    shown = values.reindex(list(keys))[["estimate", "low", "high"]].abs()
    # An open end of an interval has no place on any scale, the other numbers of its row have.
    return 1.08 * bulk_limit(shown.where(np.isfinite(shown)).max(axis=1)) or 1.0

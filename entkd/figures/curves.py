"""Learning curves: training loss and dev NLL of every arm, with a band over seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from entkd.figures.style import ROLE_LABEL, TEXT_WIDTH, Arm, Study

LINES = 8
"""Most arms in one panel, beside the reference."""


def draw_curves(study: Study, frame: pd.DataFrame, runs: pd.DataFrame | None) -> Figure:
    """A row of panels for each role (at most eight arms each); the reference is in every row.

    The horizontal axis is trained response tokens where ``runs`` tells them, else optimizer steps.
    """
    groups = _groups(study)
    positions = None if runs is None else (runs["positions"] / runs["steps"]).groupby(runs["arm"]).mean() / 1000
    figure = Figure(figsize=(TEXT_WIDTH, 1.65 * len(groups) + 0.3), layout="constrained")
    axes = figure.subplots(len(groups), 2, squeeze=False, sharex=True, sharey="col")
    reference = [arm for arm in study.arms if arm.role == "reference"]
    for (name, arms), (left, right) in zip(groups, axes, strict=True):
        for arm in [*arms, *reference]:
            own = frame[frame["arm"] == arm.name]
            scale = 1.0 if positions is None else float(positions.get(arm.name, np.nan))
            _draw(left, own[own["metric"] == "loss"], scale, study, arm, smooth=True)
            _draw(right, own[own["metric"] == "dev_nll"], scale, study, arm, smooth=False)
        left.set_ylabel("training loss\n(nats, own objective)")
        right.set_ylabel("dev NLL\n(nats per token)")
        left.set_title(name)
        handles, labels = right.get_legend_handles_labels()
        right.legend(handles, labels, loc="center left", bbox_to_anchor=(1.02, 0.5))
    for ax in axes[-1]:
        ax.set_xlabel("optimizer step" if positions is None else "trained response tokens (thousands)")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return figure


def _groups(study: Study) -> list[tuple[str, Sequence[Arm]]]:
    groups: list[tuple[str, Sequence[Arm]]] = []
    for role, label in ROLE_LABEL.items():
        arms = [arm for arm in study.arms if arm.role == role != "reference"]
        parts = -(-len(arms) // LINES)
        for part in range(parts):
            name = label if parts == 1 else f"{label} ({part + 1} of {parts})"
            groups.append((name, arms[part * LINES : (part + 1) * LINES]))
    return groups or [(ROLE_LABEL["reference"], [])]


def _draw(ax: Axes, frame: pd.DataFrame, scale: float, study: Study, arm: Arm, *, smooth: bool) -> None:
    """Mean over seeds and the range between the lowest and the highest."""
    if frame.empty:
        return
    by_step = frame.pivot_table(index="step", columns="seed", values="value")
    if smooth:  # one step sees few documents: without a running mean the arms cannot be told apart
        by_step = by_step.rolling(max(1, len(by_step) // 10), min_periods=1).mean()
    x = by_step.index.to_numpy(dtype=float) * scale
    style = study.line_style(arm)
    ax.plot(x, by_step.mean(axis=1), label=arm.name, marker="" if smooth else ".", **style)
    ax.fill_between(x, by_step.min(axis=1), by_step.max(axis=1), color=style["color"], alpha=0.13, linewidth=0)

"""What the teacher's entropy looks like, what the method makes of it, and where the arms stay far from the teacher.

The formulas are those of docs/method.md, in numpy; a test holds them against the training code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from numpy.typing import NDArray

from entkd.config import Curriculum, Temperature
from entkd.figures.curves import LINES
from entkd.figures.style import BLACK, BLUE, GREY, SKY, TEXT_WIDTH, VERMILLION, Study

DIFFICULTIES = (0.05, 0.25, 0.5, 0.75, 0.95)
FIDELITY = "entkd_fidelity"


def draw_entropy(study: Study, histograms: pd.DataFrame, method: Mapping[str, Any]) -> Figure:
    """Histograms of H and d, curriculum weight and temperature, and KL to the teacher by decile of its entropy."""
    deciles = _deciles(study)
    figure = Figure(figsize=(TEXT_WIDTH, 4.2 if deciles is None else 4.9), layout="constrained")
    top, *rest = figure.subfigures(1 if deciles is None else 2, 1, height_ratios=None if deciles is None else (1, 1), squeeze=False)[:, 0]
    left, middle, w, t = top.subplots(1, 4)
    _histogram(left, histograms, "entropy", "teacher entropy H (nats)")
    left.set_title("a  entropy")
    _histogram(middle, histograms, "difficulty", "difficulty d")
    middle.set_title("b  difficulty")
    _weights(w, Curriculum.model_validate(method.get("curriculum") or {}))
    w.set_title("c  curriculum")
    _temperatures(t, Temperature.model_validate(method.get("temperature") or {}))
    t.set_title("d  temperature")
    if deciles is not None:
        _decile_panels(rest[0], deciles, study)
    return figure


def curriculum_weight(
    difficulty: NDArray[np.float64], progress: NDArray[np.float64], settings: Curriculum
) -> NDArray[np.float64]:
    """w for a population whose difficulty is uniform on [0, 1], with mean 1 over it; shapes broadcast."""
    fixed = {"easy": 0.0, "hard": 1.0}.get(settings.progress)
    u = progress if fixed is None else np.full_like(progress, fixed)
    slope = settings.kappa * (2 * u - 1)
    if settings.shape == "soft":
        return 1 + slope * (2 * difficulty - 1)
    if settings.shape == "exp":
        safe = np.where(slope == 0, 1.0, slope)
        mean = np.where(slope == 0, 1.0, np.sinh(safe) / safe)
        return np.exp(slope * (2 * difficulty - 1)) / mean
    start = u * (1 - settings.window)
    inside = (difficulty >= start) & (difficulty <= start + settings.window)
    return np.where(inside, 1 / settings.window, 0.0)


def temperature(difficulty: NDArray[np.float64], settings: Temperature) -> NDArray[np.float64]:
    """T = T_0·exp(c(2d − 1))."""
    return settings.base * np.exp(settings.c * (2 * difficulty - 1))


def _histogram(ax: Axes, frame: pd.DataFrame, quantity: str, label: str) -> None:
    """Density of one quantity; a tail with less than a thousandth of the tokens is left out."""
    own = frame[frame["quantity"] == quantity]
    share = own["count"] / own["count"].sum()
    kept = own[share[::-1].cumsum()[::-1] > 1e-3]
    width = kept["right"] - kept["left"]
    density = kept["count"] / own["count"].sum() / width
    ax.bar(kept["left"], density, width, align="edge", color=SKY, edgecolor=BLUE, linewidth=0.3)
    ax.set_xlim(0, kept["right"].max())
    ax.set_xlabel(label)
    ax.set_ylabel("density of tokens")


def _weights(ax: Axes, settings: Curriculum) -> None:
    """w over progress for five difficulties."""
    u = np.linspace(0, 1, 201)
    for place, d in enumerate(DIFFICULTIES):
        shade = place / (len(DIFFICULTIES) - 1)
        colour = tuple((1 - shade) * np.array([0.34, 0.71, 0.91]) + shade * np.array([0.0, 0.16, 0.32]))
        weight = curriculum_weight(np.array(d), u, settings)
        ax.plot(u, weight, color=colour, label=f"d = {d:g}")
    ax.axhline(1, color=GREY, linewidth=0.6, linestyle=":")
    ax.set_xlim(0, 1)
    ax.set_xlabel("progress u")
    ax.set_ylabel("weight w")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, -0.95), ncols=2, handlelength=1.2, columnspacing=0.8)


def _temperatures(ax: Axes, settings: Temperature) -> None:
    """T over difficulty, and the scale of the token's loss that goes with it."""
    d = np.linspace(0, 1, 101)
    t = temperature(d, settings)
    ax.plot(d, t, color=VERMILLION, label="temperature T")
    scale = {"per_token": ("loss scale T²", t**2), "linear": ("loss scale T", t), "off": ("loss scale 1", t**0)}
    name, values = scale[settings.t2]
    ax.plot(d, values, color=BLACK, linestyle="--", linewidth=0.9, label=name)
    ax.set_xlim(0, 1)
    ax.set_xlabel("difficulty d")
    ax.set_ylabel("T and loss scale")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, -0.95), handlelength=1.4)


def _deciles(study: Study) -> pd.DataFrame | None:
    """Mean over seeds of the KL to the teacher: arms × deciles 1 to 10; None where the scores have none."""
    own = study.scores[(study.scores["task"] == FIDELITY) & study.scores["metric"].str.startswith("kl_decile_")]
    if own.empty:
        return None
    decile = own["metric"].str.removeprefix("kl_decile_").astype(int)
    return own.assign(decile=decile).pivot_table(index="arm", columns="decile", values="value")


def _decile_panels(figure: Any, deciles: pd.DataFrame, study: Study) -> None:
    """Left: level, per arm. Right: difference to the reference, where small differences can be seen."""
    arms = [arm for arm in study.arms if arm.name in deciles.index]
    level, difference = figure.subplots(1, 2)
    base = deciles.loc[study.reference]
    for arm in arms:
        style = study.line_style(arm)
        level.plot(deciles.columns, deciles.loc[arm.name], marker=".", markersize=3, linewidth=1, label=arm.name, **style)
        difference.plot(deciles.columns, deciles.loc[arm.name] - base, marker=".", markersize=3, linewidth=1, **style)
    level.set_title("e  distance to the teacher")
    level.set_ylabel("KL (nats per token)")
    difference.set_title(f"f  difference to {study.reference}")
    difference.set_ylabel("Δ KL (nats per token)\n← better")
    for ax in (level, difference):
        ax.set_xlabel("decile of teacher entropy")
        ax.xaxis.set_major_locator(FixedLocator(range(1, 11)))
    columns = -(-len(arms) // max(LINES + 6, 14))
    difference.legend(*level.get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1.02, 0.5), ncols=columns)

"""What the teacher's entropy looks like, what the method makes of it, and where the arms stay far from the teacher.

The formulas are those of docs/method.md, in numpy; a test holds them against the training code.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from numpy.typing import NDArray

from entkd.config import Curriculum, Temperature
from entkd.figures.scale import FAR_ALONE, bulk_limit, signed
from entkd.figures.style import BLACK, BLUE, GREY, ROLE_LABEL, SKY, TEXT_WIDTH, VERMILLION, Study, few_ticks
from entkd.names import FIDELITY

DIFFICULTIES = (0.05, 0.25, 0.5, 0.75, 0.95)


def draw_entropy(study: Study, histograms: pd.DataFrame, method: Mapping[str, Any]) -> Figure:
    """Histograms of H and d, curriculum weight and temperature, and KL to the teacher by decile of its entropy.

    ``method`` holds the curriculum and the temperature of the first arm that has one; without, its panel says so.
    """
    deciles = _deciles(study)
    heights = (2.3,) if deciles is None else (2.3, max(1.7, 0.13 * len(deciles) + 0.6))
    figure = Figure(figsize=(TEXT_WIDTH, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    axes = list(parts[0].subplots(1, 4))
    _histogram(axes[0], histograms, "entropy", "teacher entropy H (nats)")
    axes[0].set_ylabel("density of tokens")
    _histogram(axes[1], histograms, "difficulty", "difficulty d")
    if method.get("curriculum") is not None:
        _weights(axes[2], Curriculum.model_validate(method["curriculum"]), f"arm {study.first_with['curriculum']}")
    else:
        _say_absent(axes[2])
    if method.get("temperature") is not None:
        _temperatures(
            axes[3], Temperature.model_validate(method["temperature"]), f"arm {study.first_with['temperature']}"
        )
    else:
        _say_absent(axes[3])
    if deciles is not None:
        lines, relative = parts[1].subplots(1, 2)
        axes.append(lines)
        _decile_lines(lines, deciles, study)
        excess = _excess(deciles, study)
        if excess is None:
            relative.remove()
        else:
            axes.append(relative)
            _decile_map(relative, excess, study.reference)
    names = ["entropy", "difficulty", "curriculum", "temperature"]
    names += ["distance to the teacher", f"relative to {study.reference}"]
    for ax, letter, name in zip(axes, "abcdef", names, strict=False):
        ax.set_title(f"{letter}  {name}")
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
    few_ticks(ax)


def _say_absent(ax: Axes) -> None:
    ax.set_axis_off()
    ax.text(0.5, 0.5, "no arm has\nthis component", transform=ax.transAxes, ha="center", va="center", color=GREY)


def _weights(ax: Axes, settings: Curriculum, owner: str) -> None:
    """w over progress for five difficulties."""
    u = np.linspace(0, 1, 201)
    for place, d in enumerate(DIFFICULTIES):
        shade = place / (len(DIFFICULTIES) - 1)
        colour = tuple((1 - shade) * np.array([0.34, 0.71, 0.91]) + shade * np.array([0.0, 0.16, 0.32]))
        weight = curriculum_weight(np.array(d), u, settings)
        ax.plot(u, weight, color=colour, label=f"d = {d:g}")
    ax.axhline(1, color=GREY, linewidth=0.6, linestyle=":")
    ax.set_xlim(0, 1)
    ax.set_xticks((0, 0.5, 1))
    ax.set_xlabel("progress u")
    ax.set_ylabel("weight w")
    ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.3), ncols=2, handlelength=1, columnspacing=0.7, title=owner)


def _temperatures(ax: Axes, settings: Temperature, owner: str) -> None:
    """T over difficulty, and the scale of the token's loss that goes with it."""
    d = np.linspace(0, 1, 101)
    t = temperature(d, settings)
    ax.plot(d, t, color=VERMILLION, label="temperature T")
    scale = {"per_token": ("loss scale T²", t**2), "linear": ("loss scale T", t), "off": ("loss scale 1", t**0)}
    name, values = scale[settings.t2]
    ax.plot(d, values, color=BLACK, linestyle="--", linewidth=0.9, label=name)
    ax.set_xlim(0, 1)
    ax.set_xticks((0, 0.5, 1))
    ax.set_xlabel("difficulty d")
    ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.3), handlelength=1.5, title=owner)


def _deciles(study: Study) -> pd.DataFrame | None:
    """Mean over seeds of the KL to the teacher: arms × deciles 1 to 10; None where the scores have none."""
    own = study.scores[(study.scores["task"] == FIDELITY) & study.scores["metric"].str.startswith("kl_decile_")]
    if own.empty:
        return None
    decile = own["metric"].str.removeprefix("kl_decile_").astype(int)
    return own.assign(decile=decile).pivot_table(index="arm", columns="decile", values="value")


def _decile_lines(ax: Axes, deciles: pd.DataFrame, study: Study) -> None:
    """KL by decile, one line per arm in the colour of its role; lines far above the others are named, not shown."""
    arms = [arm for arm in study.arms if arm.name in deciles.index]
    highest = deciles.loc[[arm.name for arm in arms]].max(axis=1)
    top = bulk_limit(highest)
    for arm in arms:
        width, opacity = (1.4, 1.0) if arm.role == "reference" else (0.8, 0.7)
        line = ax.plot(deciles.columns, deciles.loc[arm.name], color=arm.colour, linewidth=width, alpha=opacity)
        line[0].set(label=ROLE_LABEL[arm.role], zorder=3 if arm.role == "reference" else 2)
    ax.set_ylabel("KL (nats per token)")
    far = list(highest.index[highest > top])
    off = textwrap.fill(f"(off scale: {', '.join(far)})", 46) if far else ""
    ax.set_xlabel(f"decile of teacher entropy\n{off}".rstrip())
    ax.xaxis.set_major_locator(FixedLocator(range(1, 11)))
    ax.set_ylim(0, 1.05 * top or 1.0)
    lines = dict(zip(*ax.get_legend_handles_labels()[::-1], strict=True))
    ax.legend(lines.values(), lines.keys(), loc="best")


def _excess(deciles: pd.DataFrame, study: Study) -> pd.DataFrame | None:
    """KL of every other arm relative to the reference's, in per cent; None where there is nothing to compare."""
    others = [arm.name for arm in study.arms if arm.role != "reference" and arm.name in deciles.index]
    if not others or study.reference not in deciles.index:
        return None
    excess = 100 * (deciles.loc[others] / deciles.loc[study.reference] - 1)
    finite = excess.where(np.isfinite(excess))
    return None if finite.isna().all(axis=None) else finite


def _decile_map(ax: Axes, excess: pd.DataFrame, reference: str) -> None:
    """The excess over the reference in colours, which end where most values do.

    An arm far outside the others does not count for the colours; its median is written on its row.
    """
    median = excess.median(axis=1)
    far = median.abs() > bulk_limit(median.abs(), FAR_ALONE)
    limit = float(np.nanquantile(excess[~far].abs(), 0.95)) or 1.0
    image = ax.imshow(excess, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    middle = 0.5 * (len(excess.columns) - 1)
    for y, name in enumerate(excess.index):
        if far[name]:
            ax.text(middle, y, f"{signed(median[name])} %", color="white", fontsize=6, ha="center", va="center")
    ax.set_yticks(range(len(excess)), excess.index)
    ax.set_xticks(range(len(excess.columns)), [str(decile) for decile in excess.columns])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("decile of teacher entropy")
    bar = ax.figure.colorbar(image, ax=ax, extend="both", pad=0.02, aspect=25)
    bar.set_label(f"KL, % over {reference}\n← closer to the teacher")
    bar.outline.set_visible(False)

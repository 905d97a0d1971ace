"""The 2³ factorial of the three components, analysed in blocks of one seed.

Shape suffixes: C the eight cells in the order of ``CELLS``, S seeds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entkd.errors import UserError
from entkd.stats.paired import ROUNDING, t_interval

COMPONENTS = ("curriculum", "temperature", "features")
"""The factors, each off or on."""
CELLS = tuple(itertools.product((False, True), repeat=len(COMPONENTS)))
"""The design: which components are on, from none to all."""
FULL_MINUS_KD = "full-kd"
"""The contrast of the cell with all three components and the cell with none."""


def _contrasts() -> dict[str, NDArray[np.float64]]:
    on_CF = np.array(CELLS)
    sign_CF = np.where(on_CF, 1.0, -1.0)
    contrasts = {}
    for size in range(1, len(COMPONENTS) + 1):
        for factors in itertools.combinations(range(len(COMPONENTS)), size):
            name = ":".join(COMPONENTS[f] for f in factors)
            contrasts[name] = sign_CF[:, list(factors)].prod(1) / (len(CELLS) / 2)
    contrasts[FULL_MINUS_KD] = on_CF.all(1).astype(float) - (~on_CF).all(1).astype(float)
    return contrasts


EFFECTS = _contrasts()
"""Effect → its coefficients over the cells. A main effect is the mean of the four cells with the component minus the
mean of the four without it. An interaction is, in the same units, half of what switching one component on adds to the
effect of the other (the mean of the cells where the product of the ±1 codes is +1, minus the mean where it is −1)."""


@dataclass(frozen=True)
class Effect:
    """One contrast of the factorial, in the units of the metric. NaN where the data cannot say."""

    effect: str
    """Name, a key of ``EFFECTS``."""
    estimate: float
    """Mean difference over seeds."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of the 95 % interval."""
    p: float
    """Two-sided p-value; NaN with one seed."""
    df: int
    """Degrees of freedom of the pooled error, 7 (n_seeds − 1)."""
    variance: float
    """Variance that one seed contributes: the pooled error times the sum of the squared coefficients."""
    n_seeds: int
    """Blocks."""


def factorial_cells(arms: Sequence[Mapping[str, Any]]) -> dict[tuple[bool, ...], str] | None:
    """The arm of each of the eight cells, or None where the experiment has no complete factorial.

    Parameters
    ----------
    arms
        Mappings with ``name``, ``role`` and, per component, a string that is empty where the component is off. Only
        arms with the role ``factorial`` count.

    Raises
    ------
    UserError
        If two factorial arms switch the same components on: they would not be a 2³ design.
    """
    cells: dict[tuple[bool, ...], str] = {}
    for arm in arms:
        if arm["role"] != "factorial":
            continue
        cell = tuple(bool(arm[component]) for component in COMPONENTS)
        if cell in cells:
            on = " + ".join(c for c, present in zip(COMPONENTS, cell, strict=True) if present) or "no component"
            raise UserError(
                f"arms.{arm['name']}.role: `factorial` makes it the cell `{on}`, which arms.{cells[cell]} already is; "
                "give one of them the role control or baseline"
            )
        cells[cell] = str(arm["name"])
    return {cell: cells[cell] for cell in CELLS} if len(cells) == len(CELLS) else None


def factorial_effects(values_CS: NDArray[np.float64]) -> list[Effect]:
    """Every effect of ``EFFECTS`` from scores of the eight cells.

    The model is cell + seed + error: what a seed shares among the cells drops out, and the error pools the 7 (n_S − 1)
    degrees of freedom that are left, where a single pair of arms has n_S − 1. It is an analysis of whole runs, so it
    generalises over seeds, on the items that were scored.

    Parameters
    ----------
    values_CS
        Scores, cells in the order of ``CELLS``, seeds paired by column.
    """
    n_C, n_S = values_CS.shape
    if n_C != len(CELLS):
        raise ValueError(f"values_CS has {n_C} rows; the design has {len(CELLS)} cells")
    mean_C, df = values_CS.mean(1), (n_C - 1) * (n_S - 1)
    residual_CS = values_CS - mean_C[:, None] - values_CS.mean(0)[None, :] + values_CS.mean()
    error = float((residual_CS**2).sum()) / df if df else math.nan
    if math.sqrt(error) <= ROUNDING * float(np.abs(values_CS).max()):
        error = 0.0
    effects = []
    for name, coefficients_C in EFFECTS.items():
        estimate = float(coefficients_C @ mean_C)
        variance = error * float((coefficients_C**2).sum())
        low, high, p = t_interval(estimate, math.sqrt(variance / n_S), df)
        effects.append(Effect(name, estimate, low, high, p, df, variance, n_S))
    return effects

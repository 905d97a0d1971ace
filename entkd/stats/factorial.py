"""The factorial of the components, analysed in blocks of one seed: 2³ cells where all three are varied.

Shape suffixes: C cells in the order of ``Factorial.cells``, F factors, S seeds.
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
from entkd.names import COMPONENTS
from entkd.stats.paired import ROUNDING, t_interval


@dataclass(frozen=True)
class Factorial:
    """A complete two-level design: one arm for every combination of its factors."""

    factors: tuple[str, ...]
    """The components that are varied, two or three of them."""
    arms: tuple[str, ...]
    """Arm of each cell, in the order of ``cells``: from no factor on (the base) to all."""

    @property
    def cells(self) -> tuple[tuple[bool, ...], ...]:
        """Which factors are on in each cell."""
        return tuple(itertools.product((False, True), repeat=len(self.factors)))

    @property
    def full_minus_base(self) -> str:
        """Name of the contrast of the cell with every factor on and the one with none, e.g. `full-kd`."""
        return f"{self.arms[-1]}-{self.arms[0]}"

    @property
    def contrasts(self) -> dict[str, NDArray[np.float64]]:
        """Effect → its coefficients over the cells.

        A main effect is the mean of the cells with the component minus the mean of those without it. An interaction
        is the mean of the cells where the product of the ±1 codes is +1 minus the mean where it is −1: half of what
        switching one component on adds to the effect of the other.
        """
        sign_CF = np.where(np.array(self.cells), 1.0, -1.0)
        contrasts = {}
        for size in range(1, len(self.factors) + 1):
            for chosen in itertools.combinations(range(len(self.factors)), size):
                name = ":".join(self.factors[f] for f in chosen)
                contrasts[name] = sign_CF[:, list(chosen)].prod(1) / (len(self.arms) / 2)
        contrasts[self.full_minus_base] = np.array([-1.0, *[0.0] * (len(self.arms) - 2), 1.0])
        return contrasts


@dataclass(frozen=True)
class Effect:
    """One contrast of the factorial, in the units of the metric. NaN where the data cannot say."""

    effect: str
    """Name, a key of ``Factorial.contrasts``."""
    estimate: float
    """Mean difference over seeds."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of the 95 % interval."""
    p: float
    """Two-sided p-value; NaN with one seed."""
    df: int
    """Degrees of freedom of the pooled error, (cells − 1)(n_seeds − 1): 14 for 2³ and 3 seeds."""
    variance: float
    """Variance that one seed contributes: the pooled error times the sum of the squared coefficients."""
    n_seeds: int
    """Blocks."""


def factorial_of(arms: Sequence[Mapping[str, Any]]) -> Factorial | None:
    """The design that the arms with the role ``factorial`` make up, or None where it is not complete.

    Parameters
    ----------
    arms
        Mappings with ``name``, ``role`` and, per component, a string that is empty where the component is off.

    Raises
    ------
    UserError
        If two factorial arms switch the same components on.
    """
    chosen = [arm for arm in arms if arm["role"] == "factorial"]
    factors = tuple(c for c in COMPONENTS if len({bool(arm[c]) for arm in chosen}) == 2)
    cells: dict[tuple[bool, ...], str] = {}
    for arm in chosen:
        cell = tuple(bool(arm[factor]) for factor in factors)
        if cell in cells:
            on = " + ".join(f for f, present in zip(factors, cell, strict=True) if present) or "no component"
            raise UserError(
                f"arms.{arm['name']}.role: `factorial` makes it the cell `{on}`, which arms.{cells[cell]} already is; "
                "give one of them the role control or baseline"
            )
        cells[cell] = str(arm["name"])
    if len(factors) < 2 or len(cells) < 2 ** len(factors):
        return None
    return Factorial(factors, tuple(cells[cell] for cell in sorted(cells)))


def factorial_effects(design: Factorial, values_CS: NDArray[np.float64]) -> list[Effect]:
    """Every effect of the design.

    The model is cell + seed + error: what a seed shares among the cells drops out, and the error pools the
    (n_C − 1)(n_S − 1) degrees of freedom that are left, where a single pair of arms has n_S − 1. It is an analysis of
    whole runs: it generalises over seeds, on the items that were scored.

    Parameters
    ----------
    values_CS
        Scores, cells in the order of ``design.arms``, seeds paired by column.
    """
    n_C, n_S = values_CS.shape
    mean_C, df = values_CS.mean(1), (n_C - 1) * (n_S - 1)
    residual_CS = values_CS - mean_C[:, None] - values_CS.mean(0)[None, :] + values_CS.mean()
    error = float((residual_CS**2).sum()) / df if df else math.nan
    if math.sqrt(error) <= ROUNDING * float(np.abs(values_CS).max()):
        error = 0.0
    effects = []
    for name, coefficients_C in design.contrasts.items():
        estimate = float(coefficients_C @ mean_C)
        variance = error * float((coefficients_C**2).sum())
        low, high, p = t_interval(estimate, math.sqrt(variance / n_S), df)
        effects.append(Effect(name, estimate, low, high, p, df, variance, n_S))
    return effects

"""The factorial design that arms make up. Pure Python: the configuration and the statistics both ask it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from entkd.errors import UserError
from entkd.names import COMPONENTS


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
        return _cells(self.factors)

    @property
    def full_minus_base(self) -> str:
        """Name of the contrast of the cell with every factor on and the one with none, e.g. `full-kd`."""
        return f"{self.arms[-1]}-{self.arms[0]}"

    @property
    def primary(self) -> list[str]:
        """The effects of the primary family: the factors' main effects, and all factors against none."""
        return [*self.factors, self.full_minus_base]

    @property
    def contrasts(self) -> dict[str, tuple[float, ...]]:
        """Effect → its coefficients over the cells.

        A main effect is the mean of the cells with the component minus the mean of those without it. An interaction
        is the mean of the cells where the product of the ±1 codes is +1 minus the mean where it is −1: half of what
        switching one component on adds to the effect of the other.
        """
        half = len(self.arms) / 2
        contrasts = {}
        for size in range(1, len(self.factors) + 1):
            for chosen in itertools.combinations(range(len(self.factors)), size):
                name = ":".join(self.factors[f] for f in chosen)
                contrasts[name] = tuple(math.prod(1 if cell[f] else -1 for f in chosen) / half for cell in self.cells)
        contrasts[self.full_minus_base] = (-1.0, *[0.0] * (len(self.arms) - 2), 1.0)
        return contrasts


def factorial_of(arms: Sequence[Mapping[str, Any]]) -> Factorial | None:
    """The design that the arms with the role ``factorial`` make up, or None where it is not complete.

    Parameters
    ----------
    arms
        Mappings with ``name``, ``role`` and, per component, a value that is false where the component is off.

    Raises
    ------
    UserError
        If two factorial arms switch the same components on.
    """
    factors, taken = _taken_cells(arms)
    if len(factors) < 2 or len(taken) < 2 ** len(factors):
        return None
    return Factorial(factors, tuple(taken[cell] for cell in _cells(factors)))


def lacking(arms: Sequence[Mapping[str, Any]]) -> str:
    """Why the factorial arms are no complete design, or nothing where they are, or where there are none.

    Raises
    ------
    UserError
        If two factorial arms switch the same components on.
    """
    factors, taken = _taken_cells(arms)
    if not taken:
        return ""
    if len(factors) < 2:
        return f"the factorial arms vary {' and '.join(factors) or 'no component'}; a design varies at least two"
    absent = [_words(factors, cell) for cell in _cells(factors) if cell not in taken]
    return f"the factorial arms lack {', '.join(absent)}" if absent else ""


def _taken_cells(arms: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], dict[tuple[bool, ...], str]]:
    """The components that the factorial arms vary, and the arm in each cell."""
    chosen = [arm for arm in arms if arm["role"] == "factorial"]
    factors = tuple(c for c in COMPONENTS if len({bool(arm[c]) for arm in chosen}) == 2)
    taken: dict[tuple[bool, ...], str] = {}
    for arm in chosen:
        cell = tuple(bool(arm[factor]) for factor in factors)
        if cell in taken:
            raise UserError(
                f"arms.{arm['name']}.role: `factorial` makes it the cell `{_words(factors, cell)}`, which "
                f"arms.{taken[cell]} already is; give one of them the role control or baseline"
            )
        taken[cell] = str(arm["name"])
    return factors, taken


def _cells(factors: Sequence[str]) -> tuple[tuple[bool, ...], ...]:
    return tuple(itertools.product((False, True), repeat=len(factors)))


def _words(factors: Sequence[str], cell: Sequence[bool]) -> str:
    return " + ".join(factor for factor, on in zip(factors, cell, strict=True) if on) or "no component"

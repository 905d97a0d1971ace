"""The factorial design that arms make up. Pure Python: the configuration and the statistics both ask it.

The factors are the components that the factorial arms vary, and the base (the divergence that the components stand on)
where they stand on two. All combinations make a complete design. With four factors half of the combinations are one as
well, where the product of the ±1 codes of all factors is the same in each: the regular half fraction of resolution IV
(Box, Hunter and Hunter, *Statistics for Experimenters*, 2005, chapter 6).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from entkd.errors import UserError
from entkd.names import COMPONENTS

HALVED = 4
"""Factors from which a half fraction is accepted: with fewer, main effects are aliased with two-factor interactions."""


@dataclass(frozen=True)
class Factorial:
    """A two-level design: one arm for every combination of its factors, or for a regular half of them."""

    factors: tuple[str, ...]
    """The components that are varied, in the order of ``COMPONENTS``, then the base where it is."""
    arms: tuple[str, ...]
    """Arm of each cell, in the order of ``cells``."""
    bases: tuple[str, ...] = ()
    """The two bases in words where the base is the last factor: off, on. Empty where all arms stand on one."""
    sign: int = 0
    """Defining relation I = sign · (product of all factors) of a half fraction; 0 for a complete design."""

    @property
    def cells(self) -> tuple[tuple[bool, ...], ...]:
        """Which factors are on in each cell; the last factor changes fastest."""
        return _cells(len(self.factors), self.sign)

    @property
    def components(self) -> tuple[str, ...]:
        """The factors that are components."""
        return self.factors[:-1] if self.bases else self.factors

    @property
    def ends(self) -> tuple[str, str] | None:
        """The arms with every component and with none, both with the base off; a half fraction lacks one of them."""
        if self.sign:
            return None
        taken = dict(zip(self.cells, self.arms, strict=True))
        on, off = ((state,) * len(self.components) + (False,) * bool(self.bases) for state in (True, False))
        return taken[on], taken[off]

    @property
    def full_minus_base(self) -> str | None:
        """Name of the contrast of the two ``ends``, e.g. `full-kd`."""
        return "-".join(self.ends) if self.ends else None

    @property
    def primary(self) -> list[str]:
        """The effects of the primary family: the components' main effects, and all components against none.

        With two bases the main effects are over both, and all against none on the base that is off. A half fraction
        has no arm for one of these two, so its primary family are the main effects. The base is never in it.
        """
        return [*self.components, *([self.full_minus_base] if self.full_minus_base else [])]

    @property
    def relation(self) -> str:
        """The defining relation of a half fraction, e.g. `I = -curriculum:temperature:features:reverse_kl`."""
        return f"I = {'-' if self.sign < 0 else ''}{':'.join(self.factors)}"

    @property
    def contrasts(self) -> dict[str, tuple[float, ...]]:
        """Effect → its coefficients over the cells.

        A main effect is the mean of the cells with the factor minus the mean of those without it. An interaction
        is the mean of the cells where the product of the ±1 codes is +1 minus the mean where it is −1: half of what
        switching one factor on adds to the effect of the other.

        In a half fraction the contrast of a set of factors is, up to the sign of the defining relation, that of the
        other factors, and its expectation the sum (difference) of both effects. Such a pair of two-factor interactions
        is one effect, named `a:b = c:d` (`a:b = -c:d`). A main effect has its factor's name; what is aliased with it
        is the interaction of all other factors.
        """
        half, sets = len(self.arms) / 2, range(len(self.factors))
        contrasts: dict[str, tuple[float, ...]] = {}
        for size in range(1, len(self.factors) // 2 + 1 if self.sign else len(self.factors) + 1):
            for chosen in itertools.combinations(sets, size):
                alias = tuple(f for f in sets if f not in chosen)
                name = self._name(chosen)
                if self.sign and len(alias) == size:
                    if alias < chosen:
                        continue
                    name += f" = {'-' if self.sign < 0 else ''}{self._name(alias)}"
                contrasts[name] = tuple(_code(cell, chosen) / half for cell in self.cells)
        if self.ends:
            full, base = self.ends
            contrasts["-".join(self.ends)] = tuple(float(arm == full) - float(arm == base) for arm in self.arms)
        return contrasts

    def _name(self, chosen: Sequence[int]) -> str:
        return ":".join(self.factors[f] for f in chosen)


def factorial_of(arms: Sequence[Mapping[str, Any]]) -> Factorial | None:
    """The design that the arms with the role ``factorial`` make up, or None where they make up none.

    Parameters
    ----------
    arms
        Mappings with ``name``, ``role``, per component a value that is false where the component is off, and, where
        they stand on two bases, ``base`` in words. The base of the first factorial arm is the level off.

    Raises
    ------
    UserError
        If two factorial arms are one cell, or if they stand on more than two bases.
    """
    cells = _Taken(arms)
    n_factors = len(cells.factors)
    if n_factors < 2:
        return None
    for sign in (0, 1, -1) if n_factors >= HALVED else (0,):
        wanted = _cells(n_factors, sign)
        if set(wanted) == set(cells.taken):
            return Factorial(cells.factors, tuple(cells.taken[cell] for cell in wanted), cells.bases, sign)
    return None


def lacking(arms: Sequence[Mapping[str, Any]]) -> str:
    """Why the factorial arms are no design, or nothing where they are one, or where there are none.

    Raises
    ------
    UserError
        If two factorial arms are one cell, or if they stand on more than two bases.
    """
    cells = _Taken(arms)
    if not cells.taken or factorial_of(arms):
        return ""
    if len(cells.factors) < 2:
        return f"the factorial arms vary {' and '.join(cells.factors) or 'no component'}; a design varies at least two"
    absent, _ = cells.against(0)
    why = f"the factorial arms lack {', '.join(absent)}"
    if len(cells.factors) < HALVED:
        return why
    nearest = min((1, -1), key=lambda sign: sum(map(len, cells.against(sign))))
    absent, surplus = cells.against(nearest)
    needs = [f"they lack {', '.join(absent)}"] if absent else []
    needs += [f"{', '.join(surplus)} must have another role"] if surplus else []
    relation = Factorial(cells.factors, (), cells.bases, nearest).relation
    return f"{why}; for the half fraction {relation} {' and '.join(needs)}"


class _Taken:
    """The factors that the factorial arms vary, and the arm in each cell."""

    def __init__(self, arms: Sequence[Mapping[str, Any]]) -> None:
        chosen = [arm for arm in arms if arm["role"] == "factorial"]
        bases = list(dict.fromkeys(str(arm.get("base", "")) for arm in chosen))
        if len(bases) > 2:
            third = next(arm["name"] for arm in chosen if arm.get("base", "") == bases[2])
            raise UserError(
                f"arms.{third}.role: `factorial` on `{bases[2]}`, beside arms on `{bases[0]}` and `{bases[1]}`; a "
                "design has at most two bases: give the arms of one of them the role control or baseline"
            )
        self.bases = tuple(bases) if len(bases) == 2 else ()
        varied = [c for c in COMPONENTS if len({bool(arm[c]) for arm in chosen}) == 2]
        self.factors = (*varied, _base_name(*self.bases)) if self.bases else tuple(varied)
        self.taken: dict[tuple[bool, ...], str] = {}
        for arm in chosen:
            cell = tuple(bool(arm[component]) for component in varied)
            if self.bases:
                cell += (arm["base"] == self.bases[1],)
            if cell in self.taken:
                raise UserError(
                    f"arms.{arm['name']}.role: `factorial` makes it the cell `{self.words(cell)}`, which "
                    f"arms.{self.taken[cell]} already is; give one of them the role control or baseline"
                )
            self.taken[cell] = str(arm["name"])

    def words(self, cell: Sequence[bool]) -> str:
        """The components of a cell, and its base where there are two."""
        components = self.factors[:-1] if self.bases else self.factors
        on = " + ".join(factor for factor, state in zip(components, cell, strict=False) if state) or "no component"
        return f"{on} on {self.bases[cell[-1]]}" if self.bases else on

    def against(self, sign: int) -> tuple[list[str], list[str]]:
        """Cells that the design lacks, in words, and arms that it has no cell for."""
        wanted = _cells(len(self.factors), sign)
        absent = [self.words(cell) for cell in wanted if cell not in self.taken]
        return absent, [arm for cell, arm in self.taken.items() if cell not in wanted]


def _base_name(off: str, on: str) -> str:
    """The base as a factor: the divergence that is on, or `base` where more than the divergence's name differs."""
    return on if off.isidentifier() and on.isidentifier() else "base"


def _cells(n_factors: int, sign: int) -> tuple[tuple[bool, ...], ...]:
    """All combinations, or those in which the product of the ±1 codes is ``sign``."""
    combinations = itertools.product((False, True), repeat=n_factors)
    return tuple(cell for cell in combinations if not sign or _code(cell, range(n_factors)) == sign)


def _code(cell: Sequence[bool], chosen: Sequence[int]) -> int:
    """Product of the ±1 codes of the chosen factors."""
    return math.prod(1 if cell[f] else -1 for f in chosen)

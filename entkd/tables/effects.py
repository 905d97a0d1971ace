"""``effects.csv``: main effects and interactions of the factors, the primary family of claims."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from entkd.config.errors import unknown_name
from entkd.errors import UserError
from entkd.stats import (
    Effect,
    Factorial,
    claim,
    factorial_effects,
    factorial_of,
    holm,
    seeds_needed,
    smallest_detectable,
)
from entkd.tables.measured import Measured

COLUMNS = ["task", "metric", "effect", "estimate", "low", "high", "df", "p", "p_holm", "family", "claim", "mdd", "seeds_needed"]  # fmt: skip  # noqa: E501
PRIMARY, EXPLORATORY = "primary", "exploratory"


def effect_table(settings: dict[str, Any], measured: list[Measured]) -> pd.DataFrame:
    """One row per task and effect; no rows where the factorial arms make up no design.

    The effects that the settings declare as ``primary`` are corrected by Holm on each task by itself; the others by
    Holm over all of them in the table. ``mdd`` and ``seeds_needed`` are at the strictest level that Holm may ask for,
    alpha over the size of the family, so a true effect of that size is claimed with the stated power whatever the
    other tests give.
    """
    design = factorial_of(settings["arms"])
    if design is None:
        return pd.DataFrame(columns=COLUMNS)
    for name in settings["primary"]:
        if name not in design.contrasts:
            raise UserError(unknown_name("primary", name, design.contrasts))
    analysis = settings["analysis"]
    rows, effects = [], []
    for m in measured:
        for effect in factorial_effects(design, _cells(design, m)):
            family = PRIMARY if effect.effect in settings["primary"] else EXPLORATORY
            rows.append({"task": m.label, "metric": m.metric, "direction": m.direction, "family": family})
            effects.append(effect)
    table = pd.DataFrame(rows)
    for column in ("effect", "estimate", "low", "high", "df", "p"):
        table[column] = [getattr(effect, column) for effect in effects]
    table["p_holm"], table["level"] = np.nan, np.nan
    # Tasks are families of their own for the primary effects, one family together for the others.
    scope = table["task"] + " " + table["metric"]
    for _, index in table.groupby(scope.where(table["family"] == PRIMARY, ""), sort=False).groups.items():
        table.loc[index, "p_holm"] = holm(table.loc[index, "p"].to_numpy(dtype=float))
        table.loc[index, "level"] = analysis["alpha"] / len(index)
    table["claim"] = [
        claim(p, estimate, direction, analysis["alpha"])
        for p, estimate, direction in zip(table["p_holm"], table["estimate"], table["direction"], strict=True)
    ]
    pairs = list(zip(effects, table["level"], strict=True))
    table["mdd"] = [_detectable(effect, level, analysis["power"]) for effect, level in pairs]
    table["seeds_needed"] = [_seeds(effect, level, analysis["power"], len(design.arms)) for effect, level in pairs]
    table.loc[table["claim"] != "not shown", "seeds_needed"] = np.nan
    return table[COLUMNS]


def _cells(design: Factorial, m: Measured) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    seeds = m.seeds(*design.arms)
    return np.array([m.by_seed(arm, seeds) for arm in design.arms])


def _detectable(effect: Effect, level: float, power: float) -> float:
    return smallest_detectable((effect.variance / effect.n_seeds) ** 0.5, effect.df, level, power)


def _seeds(effect: Effect, level: float, power: float, n_cells: int) -> float:
    return seeds_needed(effect.estimate, effect.variance, lambda n: (n_cells - 1) * (n - 1), level, power)

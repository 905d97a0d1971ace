"""How many decimals the tables for people show: as many as the errors of a column leave any meaning, and no more."""

from __future__ import annotations

import math
import statistics
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from entkd.stats.paired import ROUNDING
from entkd.tables.measured import PSEUDO_ARMS

MOST = 8
"""More decimals than this are never shown."""
SDS = 3.5
"""Half-width of the interval of a difference over three seeds, in sds of one arm: t · √(2/3)."""


class Decimals(NamedTuple):
    """Decimals of the numbers of one task and metric."""

    mean: int
    """Of mean ± sd."""
    delta: int
    """Of a difference, its interval and its mdd."""


def arm_decimals(table: pd.DataFrame) -> dict[tuple[str, str], Decimals]:
    """(task, metric) → decimals by the arms that were trained: two digits of the error that is typical of them.

    Typical is the median, and the size of a mean says nothing: neither an untrained student's perplexity of 10⁶ nor
    one arm that diverged takes the decimals from all others.
    """
    trained = table[~table["arm"].isin(PSEUDO_ARMS)]
    return {(str(task), str(metric)): _of_arms(rows) for (task, metric), rows in trained.groupby(["task", "metric"])}


def effect_decimals(effects: pd.DataFrame, arms: dict[tuple[str, str], Decimals]) -> dict[tuple[str, str], int]:
    """(task, metric) → decimals of effects: two digits of their typical interval, else what the arms have."""
    decimals = {}
    for (task, metric), rows in effects.groupby(["task", "metric"]):
        key = str(task), str(metric)
        half = _typical((rows["high"] - rows["low"]) / 2, rows["estimate"])
        decimals[key] = _two_digits(half) if half else arms[key].delta
    return decimals


def of_claim(line: pd.Series[Any], estimate: float, digits: int) -> int:
    """Decimals of a claimed difference: more than its column's where it or its interval would be shown as 0."""
    sizes = [size for size in (abs(estimate), (line["high"] - line["low"]) / 2) if size > 0]
    return max([digits, *(_two_digits(size) - 1 for size in sizes)])


def _of_arms(rows: pd.DataFrame) -> Decimals:
    spread = SDS * _typical(rows["sd"], rows["mean"])
    half = _typical((rows["high"] - rows["low"]) / 2, rows["mean"])
    # Without any error the size of the numbers is all there is to go by.
    plain = max(1.0, float(rows["mean"].abs().median())) / 100
    return Decimals(_two_digits(spread or half or plain), _two_digits(half or spread or plain))


def _typical(errors: pd.Series[float], values: pd.Series[float]) -> float:
    """Lower median of what is more than rounding leaves of zero; 0 without any."""
    known = errors[np.isfinite(errors) & (errors > ROUNDING * values.abs())]
    return float(statistics.median_low(known)) if len(known) else 0.0


def _two_digits(size: float) -> int:
    return min(MOST, max(0, 1 - math.floor(math.log10(size))))

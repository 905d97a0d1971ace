"""``ablation_table.csv``: every arm on every task against the reference arm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from entkd.names import COMPONENTS, FIDELITY, GAP_CLOSED
from entkd.stats import Difference, claim, compare, factorial_of, fieller, holm, jointly_detectable, smallest_detectable
from entkd.tables.effects import PRIMARY
from entkd.tables.measured import PSEUDO_ARMS, TEACHER, UNTRAINED, Measured, common_seeds

COSTS = ["tokens", "seconds", "tflops", "peak_gib"]
COLUMNS = [
    "arm", "role", *COMPONENTS, "divergence", "task", "metric", "direction", "n", "n_paired", "mean", "sd", "delta",
    "low", "high", "p_holm", "claim", "mdd", "seed_low", "seed_high", "item_se", "gap_closed", *COSTS,
]  # fmt: skip


def arm_table(
    settings: dict[str, Any], measured: list[Measured], effects: pd.DataFrame, runs: pd.DataFrame | None
) -> pd.DataFrame:
    """One row per arm and task, one per arm and suite for `gap_closed`: teacher, untrained, then the settings' order.

    ``delta`` is arm minus reference on the seeds that both have, ``low`` and ``high`` its 95 % interval over seeds and
    items. Every comparison is exploratory, corrected by Holm over the whole table, but one: the arm with all
    components against the arm with none is a declared contrast of the factorial, so its ``p_holm``, ``claim`` and
    ``mdd`` are those of `effects.csv` and speak of other seeds on the same items. Its interval stays the crossed one,
    so that the intervals of all rows compare, and may hold 0 beside a claim. Teacher and untrained student are
    references: no test, no claim. In a `gap_closed` row ``mean`` is the ratio and ``low``, ``high`` its Fieller
    interval.
    """
    reference = settings["analysis"]["reference"]
    suites = list(dict.fromkeys(m.suite for m in measured))
    arms = {name: {"role": "reference"} for name in PSEUDO_ARMS if all(name in m.values for m in measured)}
    arms |= {arm["name"]: arm for arm in settings["arms"]}
    rows = []
    for name, arm in arms.items():
        about = {"arm": name} | {key: arm.get(key, "") for key in ("role", *COMPONENTS, "divergence")}
        rows += [about | _scores(m, name) | _against(m, name, reference) for m in measured]
        for suite in suites:
            label = GAP_CLOSED if len(suites) == 1 else f"{suite}/{GAP_CLOSED}"
            rows.append(about | {"task": label} | _gap_over_suite([m for m in measured if m.suite == suite], name))
    table = pd.DataFrame(rows).reindex(columns=[*COLUMNS, "p", "difference"])
    _add_claims(settings, table, effects)
    if runs is not None:
        # What a run trained on are its response positions; its `tokens` also count prompts and padding.
        trained = runs.assign(tokens=runs["positions"])
        means = trained.groupby("arm")[COSTS].mean()
        table[COSTS] = means.reindex(table["arm"]).to_numpy()
    return table[COLUMNS]


def _scores(m: Measured, arm: str) -> dict[str, Any]:
    values = m.values[arm]
    row = {"task": m.label, "metric": m.metric, "direction": m.direction, "n": len(values)}
    row |= {"mean": values.mean(), "sd": values.std(ddof=1)}
    if _has_gap(m):
        closed, gap = _closed(m, arm)
        row["gap_closed"] = closed.mean() / gap.mean()
    return row


def _against(m: Measured, arm: str, reference: str) -> dict[str, Any]:
    if arm == reference:
        return {}
    seeds = m.seeds(arm, reference)
    d = compare(m.by_seed(arm, seeds) - m.by_seed(reference, seeds), m.by_item(arm, reference, seeds))
    shown = {key: getattr(d, key) for key in ("low", "high", "seed_low", "seed_high", "item_se", "p")}
    return {"n_paired": d.n_seeds, "delta": d.estimate, "difference": d} | shown


def _has_gap(m: Measured) -> bool:
    """Whether the teacher leads the untrained student by enough to speak of a share of it."""
    if not all(arm in m.values for arm in PSEUDO_ARMS):
        return False
    gap = m.sign * (m.values[TEACHER].mean() - m.values[UNTRAINED].mean())
    return bool(gap > 0 and gap >= m.min_gap)


def _closed(m: Measured, arm: str, seeds: Sequence[int] | None = None) -> tuple[Any, Any]:
    """Arm − untrained and teacher − untrained by seed, positive where better, on the task's scale."""
    seeds = m.seeds(arm, TEACHER, UNTRAINED) if seeds is None else seeds
    untrained = m.by_seed(UNTRAINED, seeds)
    scale = m.sign / m.scale
    return scale * (m.by_seed(arm, seeds) - untrained), scale * (m.by_seed(TEACHER, seeds) - untrained)


def gap_tasks(measured: list[Measured]) -> list[Measured]:
    """The tasks that `gap_closed` over a suite sums: not fidelity, where the teacher is at 0 by definition."""
    return [m for m in measured if m.task != FIDELITY and _has_gap(m)]


def _gap_over_suite(measured: list[Measured], arm: str) -> dict[str, Any]:
    row = {"metric": "ratio", "direction": "higher", "n": len(measured[0].values[arm])}
    tasks = gap_tasks(measured)
    if not tasks:
        return row
    seeds = common_seeds(tasks, arm, TEACHER, UNTRAINED)
    if not seeds:
        return row | {"n": 0}
    parts = [_closed(m, arm, seeds) for m in tasks]
    closed, gap = (np.sum(side, axis=0) for side in zip(*parts, strict=True))
    ratio, low, high = fieller(closed, gap)
    return row | {"mean": ratio, "gap_closed": ratio, "low": low, "high": high, "n": closed.size}


def _add_claims(settings: dict[str, Any], table: pd.DataFrame, effects: pd.DataFrame) -> None:
    """Fill p_holm, claim and mdd in place."""
    analysis = settings["analysis"]
    alpha, power = analysis["alpha"], analysis["power"]
    tested = table["difference"].notna() & ~table["arm"].isin(PSEUDO_ARMS)
    declared = _declared(settings, effects)
    primary = tested & table["arm"].isin({arm for arm, _, _ in declared})
    others = table.index[tested & ~primary]
    table["claim"] = table["claim"].astype(object)
    table.loc[others, "p_holm"] = holm(table.loc[others, "p"].to_numpy(dtype=float))
    level = alpha / max(1, int(table.loc[others, "p"].notna().sum()))
    pooled = {label: _pooled_variance(rows["difference"]) for label, rows in table[tested].groupby(["task", "metric"])}
    for index in table.index[tested]:
        row = table.loc[index]
        if index in others:
            d = row["difference"]
            table.loc[index, "claim"] = claim(row["p_holm"], d.estimate, row["direction"], alpha)
            table.loc[index, "mdd"] = _detectable(d, pooled[row["task"], row["metric"]], level, power)
        else:
            effect = declared[row["arm"], row["task"], row["metric"]]
            table.loc[index, ["p_holm", "claim", "mdd"]] = [effect["p_holm"], effect["claim"], effect["mdd"]]


def _declared(settings: dict[str, Any], effects: pd.DataFrame) -> dict[tuple[str, str, str], pd.Series[Any]]:
    """(arm, task, metric) → effect, for the arm whose comparison with the reference is a primary contrast."""
    design = factorial_of(settings["arms"])
    if design is None or design.ends is None or design.ends[1] != settings["analysis"]["reference"]:
        return {}
    rows = effects[(effects["effect"] == design.full_minus_base) & (effects["family"] == PRIMARY)]
    return {(design.ends[0], row["task"], row["metric"]): row for _, row in rows.iterrows()}


def _pooled_variance(differences: pd.Series[Any]) -> float:
    """Variance over seeds of a paired difference, pooled over the arms of a task.

    By the median, each divided by that of χ²/df, and not by the mean: one arm that diverges in one seed would say of
    all others that nothing about them can be known.
    """
    counts = [(d.seed_variance, d.n_seeds - 1) for d in differences if d.n_seeds > 1]
    known = [variance * df / float(stats.chi2.median(df)) for variance, df in counts]
    return float(np.median(known)) if known else math.nan


def _detectable(d: Difference, seed_variance: float, level: float, power: float) -> float:
    """Smallest difference that both tests behind ``p`` detect: paired t over seeds, and seeds crossed with items."""
    if d.n_seeds < 2 or not seed_variance > 0:
        return math.nan
    seeds = seed_variance / d.n_seeds
    if d.n_items == 0:
        return smallest_detectable(math.sqrt(seeds), d.n_seeds - 1, level, power)
    # A typical arm may vary less over seeds than this one does within them; a run's variance is never below that.
    residual = min(d.item_se**2 - d.item_variance, seeds)
    return jointly_detectable(seeds, d.item_variance + residual, residual, d.n_seeds, d.n_items, level, power)

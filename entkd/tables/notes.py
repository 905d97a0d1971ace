"""What stands under the tables of arms and of effects."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pandas as pd

from entkd.names import COMPONENTS, GAP_CLOSED
from entkd.stats import LEVEL, factorial_of
from entkd.tables.arms import COSTS
from entkd.tables.effects import EXPLORATORY, PRIMARY
from entkd.tables.measured import PSEUDO_ARMS

CLAIMED = {"better": " ▲", "worse": " ▼"}
OTHER_ITEMS = "†"
"""Beside a claim whose row's interval, which also covers other items, holds 0."""


def only_these_items(line: pd.Series[Any]) -> bool:
    """Whether a claim stands beside an interval around 0, as that of a declared contrast may: it has another error."""
    return line["claim"] in CLAIMED and bool(line["low"] < 0 < line["high"])


def usual(labels: pd.Series[str]) -> str:
    """The most frequent setting of a component, shown as a tick; the first one where two are equally frequent."""
    given = Counter(label for label in labels if label)
    return given.most_common(1)[0][0] if given else ""


def arm_notes(settings: dict[str, Any], table: pd.DataFrame) -> tuple[str, ...]:
    analysis, design = settings["analysis"], factorial_of(settings["arms"])
    counts = sorted(set(table.loc[~table["arm"].isin(PSEUDO_ARMS), "n"].astype(int)))
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    ticks = "; ".join(f"{c}: {usual(table[c])}" for c in COMPONENTS if usual(table[c]))
    notes = [f"✓ means {ticks}. Another setting is written out."] if ticks else []
    notes += [
        f"n = {n} seed{'s' if counts != [1] else ''} per arm; mean ± sd over seeds. Δ is the arm minus "
        f"{analysis['reference']} in the units of the metric, paired by seed and item, with its {_percent(LEVEL)} "
        "interval over seeds and items (over seeds alone where a task has no items). ↑ higher is better, ↓ lower is "
        "better. teacher and untrained are reference rows and are not tested.",
        "p is the larger of two: that of seeds crossed with items, and that of the paired t test over seeds. At 3 "
        "seeds the crossed p alone rejects a true null at 0.001 up to 2.5 % of the time, and Holm's correction reads "
        "p as small as that.",
        f"▲ better, ▼ worse: claimed because p < {analysis['alpha']:g} after Holm's correction. Without a mark the "
        "difference is not shown; mdd is the smallest true difference that this design would claim with "
        f"{_percent(analysis['power'])} power whatever the other tests give, at the noise of a typical arm "
        "(the median). Where it is larger than any real difference, this many seeds of a single arm cannot claim.",
    ]
    notes += _paired(table, analysis["reference"])
    if counts == [1]:
        notes.append("With one seed no claim about the method is possible: intervals are over items alone.")
    but = ""
    ends = design.ends if design and design.full_minus_base in settings["primary"] else None
    if ends and ends[1] == analysis["reference"]:
        but = f", except {' − '.join(ends)}, which is a declared contrast (next table)"
    notes.append(f"All comparisons here are exploratory and corrected together, over arms and tasks{but}.")
    if table.apply(only_these_items, axis=1).any():
        notes.append(
            f"{OTHER_ITEMS} claimed by the declared contrast, for other seeds on these items; the interval shown is "
            "for other items as well, and holds 0: on other items a difference is not shown."
        )
    if table.loc[table["task"].str.endswith(GAP_CLOSED), "mean"].notna().any():
        notes.append(
            "gap closed is the sum over a suite's tasks of arm − untrained, each divided by its declared scale, over "
            f"that of teacher − untrained, with Fieller's {_percent(LEVEL)} interval over seeds; fidelity, and tasks "
            "with too small a gap, are left out. It describes and is not tested."
        )
    if table[COSTS].notna().any(axis=None):
        notes.append(
            "tokens (trained response tokens), seconds, TFLOPs and peak memory are means over seeds of the student's "
            "training alone, where its arm is on-policy with the text that it writes and the teacher's passes over "
            "that; the teacher's pass over the data, made once for all arms, and what a pipeline does before training "
            "(SeqKD's generation) come on top. "
            "Seconds are wall time with other jobs beside it."
        )
    return tuple(notes)


def _paired(table: pd.DataFrame, reference: str) -> list[str]:
    """A note where an arm is compared on fewer seeds than it has, because the reference lacks some."""
    compared = table[table["n_paired"].notna() & ~table["arm"].isin(PSEUDO_ARMS)]
    fewer = compared[compared["n_paired"] < compared["n"]]
    if fewer.empty:
        return []
    tasks = compared.groupby("arm").size()
    parts = []
    for (n_paired, n), rows in fewer.groupby(["n_paired", "n"]):
        names = [
            str(arm) if len(own) == tasks[arm] else f"{arm} on {', '.join(own['task'] + ' ' + own['metric'])}"
            for arm, own in rows.groupby("arm", sort=False)
        ]
        parts.append(f"{n_paired:.0f} of {n:.0f} seeds of {', '.join(names)}")
    return [
        f"Δ, its interval and p are of the seeds that the arm and {reference} both have, fewer than are behind the "
        f"arm's mean ± sd: {'; '.join(parts)}."
    ]


def effect_notes(settings: dict[str, Any]) -> tuple[str, ...]:
    alpha, power = settings["analysis"]["alpha"], _percent(settings["analysis"]["power"])
    return (
        "A main effect is the mean of the arms with the component minus the mean of those without it, in the units of "
        "the metric; an interaction is half of what one component adds to the effect of another. Error pooled over the "
        "factorial, blocked by seed: the claims are about other seeds on these items.",
        f"The {PRIMARY} effects were declared before the run and are corrected by Holm on each task by itself; the "
        f"{EXPLORATORY} ones by Holm over all tasks. ▲ better, ▼ worse: p < {alpha:g} after correction. Otherwise not "
        f"shown: mdd is the smallest true effect claimed with {power} power, followed by the seeds that an effect as "
        "large as the estimate would need.",
    )


def _percent(share: float) -> str:
    return f"{100 * share:g} %"

"""Wide tables for people, as cells that Markdown and LaTeX share, and as Markdown."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pandas as pd

from entkd.names import COMPONENTS, GAP_CLOSED
from entkd.stats import LEVEL, Factorial, factorial_of
from entkd.tables.arms import COSTS
from entkd.tables.design_notes import design_notes, effect_words
from entkd.tables.effects import EXPLORATORY, PRIMARY
from entkd.tables.measured import PSEUDO_ARMS

CLAIMED = {"better": " ▲", "worse": " ▼"}
OTHER_ITEMS = "†"
"""Beside a claim whose row's interval, which also covers other items, holds 0."""
ARROW = {"higher": "↑", "lower": "↓"}


@dataclass(frozen=True)
class Wide:
    """One table: cells are strings, columns have a group and a name."""

    title: str
    """One sentence."""
    cells: pd.DataFrame
    """Rows as shown; columns are (group, name), the group empty for a column of its own."""
    notes: tuple[str, ...]
    """Footnotes."""


def wide_tables(
    settings: dict[str, Any],
    table: pd.DataFrame,
    effects: pd.DataFrame,
    runs: pd.DataFrame | None = None,
    notes: tuple[str, ...] = (),
) -> list[Wide]:
    """The arms, and the factorial's effects where there are any; ``runs`` are the costs of every run, ``notes`` more
    footnotes of the first table."""
    arms = Wide(
        f"Every arm against {settings['analysis']['reference']}",
        _arm_cells(table),
        _arm_notes(settings, table) + _ledger(runs) + notes,
    )
    design = factorial_of(settings["arms"])
    if design is None or effects.empty:
        return [arms]
    notes = _effect_notes(settings) + design_notes(design)
    title = f"Effects of the components{' and their base' if design.bases else ''}"
    return [arms, Wide(title, _effect_cells(design, table, effects), notes)]


def _arm_cells(table: pd.DataFrame) -> pd.DataFrame:
    decimals = _digits(table)
    usual = {component: _usual(table[component]) for component in COMPONENTS}
    rows = []
    for _, own in table.groupby("arm", sort=False):
        first = own.iloc[0]
        row = {("", "arm"): str(first["arm"])}
        for component, label in usual.items():
            row["", component] = "✓" if first[component] and first[component] == label else first[component]
        row["", "divergence"] = first["divergence"]
        for _, line in own.iterrows():
            if line["task"].endswith(GAP_CLOSED):
                row["", _gap_heading(line["task"])] = _number(line["mean"], 2) + _interval(line, 2)
                continue
            digits, group = decimals[line["task"], line["metric"]], _heading(line)
            sd = "" if math.isnan(line["sd"]) else f" ± {_number(line['sd'], digits)}"
            row[group, "mean ± sd"] = _number(line["mean"], digits) + sd
            row[group, "Δ"] = _estimate(line, line["delta"], digits)
        row |= _costs(first)
        rows.append(row)
    return pd.DataFrame(rows, columns=pd.MultiIndex.from_tuples(rows[0])).fillna("")


def _costs(row: pd.Series[Any]) -> dict[tuple[str, str], str]:
    shown = {"tokens": f"{row['tokens']:,.0f}", "seconds": f"{row['seconds']:,.0f}"}
    shown |= {"tflops": f"{row['tflops']:,.1f}", "peak_gib": f"{row['peak_gib']:.2f}"}
    names = dict(zip(COSTS, ("tokens", "seconds", "TFLOPs", "peak GiB"), strict=True))
    return {("", names[cost]): "" if pd.isna(row[cost]) else shown[cost] for cost in COSTS}


def _effect_cells(design: Factorial, table: pd.DataFrame, effects: pd.DataFrame) -> pd.DataFrame:
    decimals = _digits(table)
    directions = table.set_index(["task", "metric"])["direction"].to_dict()
    rows = []
    for effect, own in effects.groupby("effect", sort=False):
        row = {("", "effect"): effect_words(design, str(effect)), ("", "family"): own["family"].iloc[0]}
        for _, line in own.iterrows():
            line["direction"] = directions[line["task"], line["metric"]]
            digits = decimals[line["task"], line["metric"]]
            row["", _heading(line)] = _estimate(line, line["estimate"], digits)
        rows.append(row)
    return pd.DataFrame(rows, columns=pd.MultiIndex.from_tuples(rows[0]))


def _estimate(line: pd.Series[Any], estimate: float, digits: int) -> str:
    """`+0.012 [−0.001, +0.025] ▲`, or with what the design could have shown in place of the mark."""
    if math.isnan(estimate):
        return ""
    shown = _number(estimate, digits, sign=True) + _interval(line, digits, sign=True)
    if line["claim"] == "not shown" and not math.isnan(line["mdd"]):
        seeds = line.get("seeds_needed", math.nan)
        needed = "" if math.isnan(seeds) else f", {seeds:.0f} seeds"
        return f"{shown} (mdd {_number(line['mdd'], digits)}{needed})"
    return shown + CLAIMED.get(line["claim"], "") + (OTHER_ITEMS if _only_these_items(line) else "")


def _only_these_items(line: pd.Series[Any]) -> bool:
    """Whether a claim stands beside an interval around 0, as that of a declared contrast may: it has another error."""
    return line["claim"] in CLAIMED and bool(line["low"] < 0 < line["high"])


def _interval(line: pd.Series[Any], digits: int, sign: bool = False) -> str:
    if math.isnan(line["low"]):
        return ""
    return f" [{_number(line['low'], digits, sign)}, {_number(line['high'], digits, sign)}]"


def _number(value: float, digits: int, sign: bool = False) -> str:
    if math.isnan(value):
        return ""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return ("−" if value < 0 else "+" if sign else "") + text


def _digits(table: pd.DataFrame) -> dict[tuple[str, str], int]:
    """(task, metric) → decimals of its numbers: three for numbers below 10, one less for each power of ten."""
    decimals = {}
    for (task, metric), rows in table.groupby(["task", "metric"]):
        largest = max(1.0, float(rows["mean"].abs().max()))
        decimals[str(task), str(metric)] = max(0, 3 - math.floor(math.log10(largest)))
    return decimals


def _gap_heading(task: str) -> str:
    """`suite/gap_closed` is `suite gap closed`."""
    return task.replace("/", " ").replace(GAP_CLOSED, "gap closed")


def _heading(line: pd.Series[Any]) -> str:
    return f"{line['task']} {line['metric']} {ARROW[line['direction']]}"


def _usual(labels: pd.Series[str]) -> str:
    """The most frequent setting of a component, shown as a tick; the first one where two are equally frequent."""
    given = Counter(label for label in labels if label)
    return given.most_common(1)[0][0] if given else ""


def _arm_notes(settings: dict[str, Any], table: pd.DataFrame) -> tuple[str, ...]:
    analysis, design = settings["analysis"], factorial_of(settings["arms"])
    counts = sorted(set(table.loc[~table["arm"].isin(PSEUDO_ARMS), "n"].astype(int)))
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    ticks = "; ".join(f"{c}: {_usual(table[c])}" for c in COMPONENTS if _usual(table[c]))
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
    if counts == [1]:
        notes.append("With one seed no claim about the method is possible: intervals are over items alone.")
    but = ""
    ends = design.ends if design and design.full_minus_base in settings["primary"] else None
    if ends and ends[1] == analysis["reference"]:
        but = f", except {' − '.join(ends)}, which is a declared contrast (next table)"
    notes.append(f"All comparisons here are exploratory and corrected together, over arms and tasks{but}.")
    if table.apply(_only_these_items, axis=1).any():
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
            "that; the teacher's pass over the data, made once for all arms, and SeqKD's generation come on top. "
            "Seconds are wall time with other jobs beside it."
        )
    return tuple(notes)


def _ledger(runs: pd.DataFrame | None) -> tuple[str, ...]:
    """What the teacher read, and for how many runs; and in which it ran again."""
    if runs is None or "teacher_tokens" not in runs:
        return ()
    readers = runs.loc[runs["teacher_tokens"] > 0, "teacher_tokens"]
    return (*_once(readers, len(runs)), *_again(runs))


def _once(readers: pd.Series[int], runs: int) -> tuple[str, ...]:
    return tuple(
        f"The teacher read {tokens:,} tokens, once: {count} of the {runs} runs trained on that one pass, in every "
        "epoch."
        for tokens, count in sorted(readers.value_counts().items())
    )


def _again(runs: pd.DataFrame) -> tuple[str, ...]:
    """Arms whose students write text, which the teacher reads in training: a cost that others do not have."""
    if "teacher_tokens_online" not in runs:
        return ()
    online = runs[runs["teacher_tokens_online"] > 0]
    means = online.groupby("arm", sort=False)[["teacher_tokens_online", "generated_tokens"]].mean()
    return tuple(
        f"The teacher ran again for {arm}: on average it read {read:,.0f} tokens a run, in text of which the student "
        f"wrote {written:,.0f}."
        for arm, (read, written) in zip(means.index, means.to_numpy(), strict=True)
    )


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _effect_notes(settings: dict[str, Any]) -> tuple[str, ...]:
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


def to_markdown(tables: list[Wide]) -> str:
    """Markdown with one heading, table and list of notes for each."""
    parts = []
    for wide in tables:
        header = [" ".join(part for part in column if part) for column in wide.cells.columns]
        lines = [header, ["---"] * len(header), *wide.cells.to_numpy().tolist()]
        parts.append(f"## {wide.title}\n")
        parts.append("\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines))
        parts.append("\n" + "\n".join(f"- {note}" for note in wide.notes) + "\n")
    return "\n".join(parts)

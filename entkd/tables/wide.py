"""Wide tables for people, as cells that Markdown and LaTeX share, and as Markdown."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from entkd.names import COMPONENTS, GAP_CLOSED
from entkd.stats import Factorial, factorial_of
from entkd.tables.arms import COSTS
from entkd.tables.decimals import arm_decimals, effect_decimals, of_claim
from entkd.tables.design_notes import design_notes, effect_words
from entkd.tables.ledger import ledger
from entkd.tables.notes import CLAIMED, OTHER_ITEMS, arm_notes, effect_notes, only_these_items, usual

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
        arm_notes(settings, table) + ledger(runs) + notes,
    )
    design = factorial_of(settings["arms"])
    if design is None or effects.empty:
        return [arms]
    notes = effect_notes(settings) + design_notes(design)
    title = f"Effects of the components{' and their base' if design.bases else ''}"
    return [arms, Wide(title, _effect_cells(design, table, effects), notes)]


def _arm_cells(table: pd.DataFrame) -> pd.DataFrame:
    decimals = arm_decimals(table)
    ticked = {component: usual(table[component]) for component in COMPONENTS}
    rows = []
    for _, own in table.groupby("arm", sort=False):
        first = own.iloc[0]
        row = {("", "arm"): str(first["arm"])}
        for component, label in ticked.items():
            row["", component] = "✓" if first[component] and first[component] == label else first[component]
        row["", "divergence"] = first["divergence"]
        for _, line in own.iterrows():
            if line["task"].endswith(GAP_CLOSED):
                row["", _gap_heading(line["task"])] = _number(line["mean"], 2) + _interval(line, 2)
                continue
            shown, group = decimals[line["task"], line["metric"]], _heading(line)
            sd = "" if math.isnan(line["sd"]) else f" ± {_number(line['sd'], shown.mean)}"
            row[group, "mean ± sd"] = _number(line["mean"], shown.mean) + sd
            row[group, "Δ"] = _estimate(line, line["delta"], shown.delta)
        row |= _costs(first)
        rows.append(row)
    return pd.DataFrame(rows, columns=pd.MultiIndex.from_tuples(rows[0])).fillna("")


def _costs(row: pd.Series[Any]) -> dict[tuple[str, str], str]:
    shown = {"tokens": f"{row['tokens']:,.0f}", "seconds": f"{row['seconds']:,.0f}"}
    shown |= {"tflops": f"{row['tflops']:,.1f}", "peak_gib": f"{row['peak_gib']:.2f}"}
    names = dict(zip(COSTS, ("tokens", "seconds", "TFLOPs", "peak GiB"), strict=True))
    return {("", names[cost]): "" if pd.isna(row[cost]) else shown[cost] for cost in COSTS}


def _effect_cells(design: Factorial, table: pd.DataFrame, effects: pd.DataFrame) -> pd.DataFrame:
    decimals = effect_decimals(effects, arm_decimals(table))
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
    digits = of_claim(line, estimate, digits) if line["claim"] in CLAIMED else digits
    shown = _number(estimate, digits, sign=True) + _interval(line, digits, sign=True)
    if line["claim"] == "not shown" and not math.isnan(line["mdd"]):
        seeds = line.get("seeds_needed", math.nan)
        needed = "" if math.isnan(seeds) else f", {seeds:.0f} seeds"
        return f"{shown} (mdd {_number(line['mdd'], digits)}{needed})"
    return shown + CLAIMED.get(line["claim"], "") + (OTHER_ITEMS if only_these_items(line) else "")


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


def _gap_heading(task: str) -> str:
    """`suite/gap_closed` is `suite gap closed`."""
    return task.replace("/", " ").replace(GAP_CLOSED, "gap closed")


def _heading(line: pd.Series[Any]) -> str:
    return f"{line['task']} {line['metric']} {ARROW[line['direction']]}"


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

"""The ablation table: a long CSV, the factorial's effects, and wide tables for people. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from entkd.config.jobs import with_choices
from entkd.frames import read_csv
from entkd.tables.arms import arm_table
from entkd.tables.budget import budget_notes
from entkd.tables.effects import effect_table
from entkd.tables.latex import to_latex
from entkd.tables.measured import measure, read_items, read_runs, read_scores
from entkd.tables.wide import to_markdown, wide_tables
from entkd.tuning import chosen_points, notes, untold

__all__ = ["make_tables"]

FLOATS = "%.8g"


def make_tables(
    settings: dict[str, Any],
    scores: Path,
    items: Path | None,
    runs: Path | None,
    csv: Path,
    markdown: Path,
    latex: Path,
    effects: Path,
    tuning: Path | None = None,
) -> None:
    """Analyse scores and write the tables. The same input gives the same bytes.

    Parameters
    ----------
    settings
        ``analysis`` (reference, alpha, power), ``arms`` (name, role and the components in words, in the order of the
        rows), ``tasks`` (suite, task, metric, direction, min_gap, scale), ``primary`` (effects of the
        factorial that were declared before the run).
    scores
        CSV with arm, seed, suite, task, metric, value; arms that the settings do not name are left out.
    items
        Parquet with the same keys, item and value; without it intervals are over seeds alone.
    runs
        CSV with what each student cost; without it those columns are blank.
    csv, markdown, latex, effects
        Where to write.
    tuning
        CSV with the trials of tuned arms; where the settings have a ``tune`` and this is missing, a note says that what
        was chosen is not known.

    Raises
    ------
    UserError
        If a column, arm, metric or item that the analysis needs is not there, or items do not average to their score.
    """
    trials = None if tuning is None else read_csv(tuning)
    if trials is not None:
        settings = with_choices(settings, chosen_points(trials))
    measured = measure(settings, read_scores(scores), None if items is None else read_items(items))
    effect_rows = effect_table(settings, measured)
    costs = None if runs is None else read_runs(runs)
    table = arm_table(settings, measured, effect_rows, costs)
    tuned = untold(settings) if trials is None else notes(settings, trials)
    more = budget_notes(settings, costs) + tuned
    wide = wide_tables(settings, table, effect_rows, costs, more)
    for path in (csv, markdown, latex, effects):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(csv, index=False, float_format=FLOATS)
    effect_rows.to_csv(effects, index=False, float_format=FLOATS)
    Path(markdown).write_text(to_markdown(wide), encoding="utf-8")
    Path(latex).write_text(to_latex(wide), encoding="utf-8")

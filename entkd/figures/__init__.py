"""The figures of an experiment, from its tables alone: pandas and matplotlib, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

from entkd.config.jobs import with_choices
from entkd.figures.cost import draw_cost
from entkd.figures.curves import draw_curves
from entkd.figures.dots import draw_tasks
from entkd.figures.entropy import draw_entropy
from entkd.figures.intervals import draw_effects, draw_forest
from entkd.figures.style import STYLE, Study, save
from entkd.tuning import chosen_points

__all__ = ["make_figures"]


def make_figures(
    settings: Mapping[str, Any],
    scores: Path,
    table: Path,
    effects: Path | None,
    runs: Path | None,
    curves: Path | None,
    entropy: Path | None,
    output: Path,
    tuning: Path | None = None,
) -> None:
    """Draw what the given tables allow, as pdf, svg and png in ``output``; print what is skipped and why.

    Parameters
    ----------
    settings
        ``analysis`` (reference, alpha), ``arms`` (name, role) and optionally ``method`` (the curriculum and
        temperature that the entropy figure shows; their defaults where it has none).
    scores, table
        Every score, and the table of differences.
    effects, runs, curves, entropy
        Effects of the components, costs, learning curves, histograms of the teacher's entropy; each may be None.
    output
        Folder of the figures.
    tuning
        The trials of tuned arms: the entropy figure then draws what was chosen.

    Raises
    ------
    FileNotFoundError
        If a given file is missing.
    """
    if tuning is not None:
        settings = with_choices(dict(settings), chosen_points(pd.read_csv(tuning, dtype={"arm": str})))
    study = Study(settings, pd.read_csv(scores), pd.read_csv(table))
    costs = None if runs is None else pd.read_csv(runs)
    with matplotlib.rc_context(fname=STYLE):
        save(draw_forest(study), output, "forest")
        save(draw_tasks(study), output, "tasks")
        if effects is not None:
            save(draw_effects(study, pd.read_csv(effects)), output, "effects")
        else:
            _say_skipped("effects", "effects.csv")
        if curves is not None:
            save(draw_curves(study, pd.read_csv(curves), costs), output, "curves")
        else:
            _say_skipped("curves", "curves.csv")
        if entropy is not None:
            save(draw_entropy(study, pd.read_csv(entropy), settings.get("method") or {}), output, "entropy")
        else:
            _say_skipped("entropy", "the signals' entropy.csv")
        if costs is not None:
            save(draw_cost(study, costs), output, "cost")
        else:
            _say_skipped("cost", "runs.csv")


def _say_skipped(figure: str, needs: str) -> None:
    print(f"figure `{figure}` skipped: it needs {needs}")

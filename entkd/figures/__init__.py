"""The figures of an experiment, from its tables alone: pandas and matplotlib, no torch."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from entkd.config.jobs import with_choices
from entkd.figures.cost import draw_cost
from entkd.figures.curves import draw_curves
from entkd.figures.dots import draw_tasks
from entkd.figures.entropy import draw_entropy
from entkd.figures.intervals import draw_effects, draw_forest
from entkd.figures.style import STYLE, Study, save
from entkd.frames import read_csv
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
    threads: int = 1,
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
    threads
        How many figures are drawn at a time, each in a process of its own where it is more than one.

    Raises
    ------
    FileNotFoundError
        If a given file is missing.
    """
    if tuning is not None:
        settings = with_choices(dict(settings), chosen_points(read_csv(tuning)))
    study = Study(settings, read_csv(scores), read_csv(table))
    costs = None if runs is None else read_csv(runs)
    drawn: list[_Drawn] = [("forest", draw_forest, (study,)), ("tasks", draw_tasks, (study,))]
    if effects is not None:
        drawn.append(("effects", draw_effects, (study, read_csv(effects))))
    else:
        _say_skipped("effects", "effects.csv")
    if curves is not None:
        drawn.append(("curves", draw_curves, (study, read_csv(curves), costs)))
    else:
        _say_skipped("curves", "curves.csv")
    if entropy is not None:
        drawn.append(("entropy", draw_entropy, (study, read_csv(entropy), settings.get("method") or {})))
    else:
        _say_skipped("entropy", "the signals' entropy.csv")
    if costs is not None:
        drawn.append(("cost", draw_cost, (study, costs)))
    else:
        _say_skipped("cost", "runs.csv")
    if threads == 1:
        for one in drawn:
            _draw(output, *one)
        return
    # Matplotlib holds Python's lock while it draws. A fork has imported it, which takes as long as two figures.
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    with ProcessPoolExecutor(min(threads, len(drawn)), context) as pool:
        for future in [pool.submit(_draw, output, *one) for one in drawn]:
            future.result()


_Drawn = tuple[str, Callable[..., Figure], tuple[Any, ...]]
"""A figure's name, the function that draws it, and what that takes."""


def _draw(output: Path, name: str, function: Callable[..., Figure], arguments: tuple[Any, ...]) -> None:
    with matplotlib.rc_context(fname=STYLE):
        save(function(*arguments), output, name)


def _say_skipped(figure: str, needs: str) -> None:
    print(f"figure `{figure}` skipped: it needs {needs}")

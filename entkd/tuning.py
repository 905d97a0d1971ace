"""The choice among an arm's trials, by their dev NLL alone, and all trials as one table. Imports no torch.

Only the records of the trials are read: nothing here, and nothing before it, has seen the test split.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from entkd.config.tune import patch_of
from entkd.errors import UserError
from entkd.files import replacing, write_json
from entkd.frames import read_csv

COLUMNS = ["arm", "trial", "settings", "dev_nll", "chosen", "steps", "seconds", "tflops", "folder"]


def choose(arm: str, settings: dict[str, Any], runs: Sequence[Path], patch: Path, table: Path) -> None:
    """Take the trial with the lowest dev NLL, the first of them where several are equal.

    Parameters
    ----------
    arm
        Name of the arm.
    settings
        ``trials``: ``name`` and ``point`` (dotted key → value) of each, in the order in which they were drawn.
    runs
        ``…/{trial}/seed{seed}/run.json`` of every trial.
    patch
        Written: the JSON Merge Patch on `method` and `training` that makes the arm's settings the chosen ones.
    table
        Written: CSV with one row per trial.

    Raises
    ------
    UserError
        If the record of a trial is missing or one too many, or no trial has a finite dev NLL.
    """
    points = {trial["name"]: trial["point"] for trial in settings["trials"]}
    records = {path.parents[1].name: path for path in runs}
    if records.keys() != points.keys():
        differing = min(records.keys() ^ points.keys())
        raise UserError(f"arm {arm}: trial {differing} has no record or is not asked for; give each trial's run.json")
    rows = []
    for number, (name, point) in enumerate(points.items(), start=1):
        record = json.loads(records[name].read_text(encoding="utf-8"))
        row = {"arm": arm, "trial": number, "settings": json.dumps(point), "chosen": False, "folder": name}
        rows.append(row | {key: record[key] for key in ("dev_nll", "steps", "seconds", "tflops")})
    nlls = [math.inf if row["dev_nll"] is None else row["dev_nll"] for row in rows]
    best = min(range(len(rows)), key=nlls.__getitem__)
    if not math.isfinite(nlls[best]):
        raise UserError(
            f"arm {arm}: none of its {len(rows)} trials has a finite dev loss; lower tune.grids.training.lr"
        )
    rows[best]["chosen"] = True
    with replacing(table) as path:
        pd.DataFrame(rows, columns=COLUMNS).to_csv(path, index=False)
    write_json(patch, patch_of(list(points.values())[best]))


def collect_tuning(files: Sequence[Path], output: Path) -> None:
    """The trials of all arms in one CSV."""
    with replacing(output) as path:
        pd.concat([read_csv(file, text=("folder",)) for file in files]).to_csv(path, index=False)


def chosen_points(tuning: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Arm → the point that was chosen for it."""
    rows = tuning[tuning["chosen"]]
    return {str(arm): json.loads(settings) for arm, settings in zip(rows["arm"], rows["settings"], strict=True)}


def notes(settings: dict[str, Any], tuning: pd.DataFrame) -> tuple[str, ...]:
    """What the table says of the tuning: how many trials each arm had, what they cost, what was chosen."""
    points = chosen_points(tuning)
    names = [arm["name"] for arm in settings["arms"]]
    untuned = [name for name in names if name not in points]
    counts = sorted(set(tuning.groupby("arm").size()))
    rest = f"; {', '.join(untuned)} had none and trained as written" if untuned else ""
    cost = f"{tuning['tflops'].sum():,.1f} TFLOPs, {tuning['seconds'].sum():,.0f} seconds"
    chosen = "; ".join(f"{name}: {_words(points[name])}" for name in names if name in points)
    return (
        f"Tuned: {', '.join(name for name in names if name in points)}, each with "
        f"{' or '.join(map(str, counts))} trials, chosen by the lowest NLL of the dev split, never by test{rest}. The "
        f"trials cost {cost} in all, on top of the columns here; tuning.csv lists them.",
        f"Chosen: {chosen}.",
    )


def untold(settings: dict[str, Any]) -> tuple[str, ...]:
    """What a table without the trials of its tuned arms has to say: its settings of them were perhaps never trained."""
    if "tune" not in settings:
        return ()
    return (
        f"Tuned: {', '.join(settings['tune']['arms'])}. No tuning.csv was given, so what was chosen for them is not "
        "known here: their settings in this table are those as written, which need not be those that were trained.",
    )


def _words(point: dict[str, Any]) -> str:
    """`lr 0.002, temperature.c −0.5`."""
    return ", ".join(f"{key.partition('.')[2]} {value}" for key, value in point.items())

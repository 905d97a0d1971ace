"""Gather what single jobs wrote: scores of all models in one file, costs and learning curves of all runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from entkd.errors import UserError
from entkd.files import replacing
from entkd.frames import read_csv

RUN_COLUMNS = [
    "arm",
    "seed",
    "steps",
    "tokens",
    "positions",
    "seconds",
    "tflops",
    "peak_gib",
    "signals",
    "teacher_tokens",
    "teacher_tokens_online",
    "generated_tokens",
    "on_policy_steps",
    "replayed_steps",
    "resumed",
    "device",
]
ONLINE_COLUMNS = ["teacher_tokens_online", "generated_tokens", "on_policy_steps", "replayed_steps"]
"""0 in records of runs from before there was student text; older ones do not name their signals either."""
CURVE_COLUMNS = ["arm", "seed", "step", "seconds", "metric", "value"]
_SCORE_KEY = ["arm", "seed", "suite", "task", "metric"]
_ITEM_KEY = [*_SCORE_KEY, "item"]


def collect_scores(files: Sequence[Path], scores: Path, items: Path) -> None:
    """All score files as one table, and the items beside them (``X.items.parquet`` of ``X.csv``) as another.

    Raises
    ------
    UserError
        For a result that occurs twice, or a task that was scored in two versions: their scores do not compare.
    """
    items_of = {path: _items_of(path) for path in files}
    score_table = pd.concat([read_csv(path, text=("task_version",)) for path in files], ignore_index=True)
    item_table = pd.concat([pd.read_parquet(items_of[path]) for path in files], ignore_index=True)
    _refuse_repeats(score_table, _SCORE_KEY)
    _refuse_repeats(item_table, _ITEM_KEY)
    for _, own in score_table.groupby(["suite", "task"]):
        example = own.groupby("task_version")["arm"].first()
        if len(example) > 1:
            task = f"{own['suite'].iloc[0]}/{own['task'].iloc[0]}"
            where = ", ".join(f"{version} (e.g. arm {arm})" for version, arm in example.items())
            raise UserError(f"{task}: scored in versions {where}; delete the older scores and score again")
    with replacing(scores) as path:
        score_table.to_csv(path, index=False)
    with replacing(items) as path:
        item_table.to_parquet(path, index=False)


def collect_runs(folders: Sequence[Path], runs: Path, curves: Path) -> None:
    """One row per run from its ``run.json``, and every number of its ``metrics.jsonl`` as a row of its own.

    Parameters
    ----------
    folders
        ``…/{arm}/seed{seed}`` folders, or the ``run.json`` in them.
    """
    run_rows: list[dict[str, Any]] = []
    curve_rows: list[dict[str, Any]] = []
    for given in folders:
        folder = given.parent if given.name == "run.json" else given
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        arm, seed = folder.parent.name, int(record["seed"])
        if folder.name != f"seed{seed}":
            raise UserError(f"{folder}/run.json: made with seed {seed}, but its folder is {folder.name}; rename it")
        known = dict.fromkeys(ONLINE_COLUMNS, 0) | {"signals": ""} | record
        run_rows.append({"arm": arm} | {column: known[column] for column in RUN_COLUMNS[1:]})
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            where = {"arm": arm, "seed": seed, "step": row.pop("step"), "seconds": row.pop("seconds", None)}
            curve_rows += [where | {"metric": metric, "value": value} for metric, value in row.items()]
    run_table = pd.DataFrame(run_rows, columns=RUN_COLUMNS)
    _refuse_repeats(run_table, ["arm", "seed"])
    curve_table = pd.DataFrame(curve_rows, columns=CURVE_COLUMNS)
    with replacing(runs) as path:
        run_table.to_csv(path, index=False)
    with replacing(curves) as path:
        curve_table.to_csv(path, index=False)


def _items_of(path: Path) -> Path:
    if path.suffix != ".csv":
        raise UserError(f"{path}: not a score file; give the .csv files, their items are found beside them")
    return path.with_suffix(".items.parquet")


def _refuse_repeats(table: pd.DataFrame, key: list[str]) -> None:
    repeated = table[table.duplicated(key)]
    if len(repeated):
        first = ", ".join(f"{column} {repeated.iloc[0][column]}" for column in key)
        raise UserError(f"{len(repeated)} results occur twice, the first is {first}; give each file once")

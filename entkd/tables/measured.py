"""Scores as read from files: one ``Measured`` per task and metric, paired on request by seed and item."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from entkd.config.errors import unknown_name
from entkd.errors import UserError
from entkd.frames import NAMES, read_csv

TEACHER, UNTRAINED = "teacher", "untrained"
PSEUDO_ARMS = (TEACHER, UNTRAINED)
"""Models that no arm trained. Scored once where they are the same for every seed."""
TOLERANCE = 1e-4
"""Relative difference up to which items average to their score: published scores may be rounded."""


@dataclass(frozen=True)
class Measured:
    """What was measured on one task with one metric."""

    suite: str
    """The suite that scored it."""
    label: str
    """The task's name; with its suite in front where two suites share the task."""
    task: str
    """The task's name alone."""
    metric: str
    """Metric of the task."""
    direction: str
    """`higher` or `lower` is better."""
    min_gap: float
    """Lead of the teacher over the untrained student below which `gap_closed` leaves the task out."""
    scale: float
    """Units of the metric that count as one in `gap_closed`."""
    values: dict[str, pd.Series[float]]
    """Arm → score by seed."""
    items: dict[str, pd.DataFrame]
    """Arm → score by seed (rows) and item (columns); empty where the task has no items."""
    weights: pd.Series[float]
    """Weight by item, of mean 1: the share of an item in the denominator of a ratio, 1 in a plain mean."""

    @property
    def sign(self) -> int:
        """+1 where higher is better, −1 where lower is."""
        return 1 if self.direction == "higher" else -1

    def seeds(self, *arms: str) -> list[int]:
        """Seeds that all the arms have, a pseudo-arm scored once counting for every seed.

        Raises
        ------
        UserError
            If the arms have no seed in common.
        """
        common = common_seeds([self], *arms)
        if not common:
            have = "; ".join(f"{arm}: {sorted(self.values[arm].index)}" for arm in arms)
            raise UserError(f"scores of {self.label} {self.metric}: no seed in common ({have}); score the same seeds")
        return common

    def by_seed(self, arm: str, seeds: Sequence[int]) -> NDArray[np.float64]:
        """Scores of an arm, (S,); those of a pseudo-arm scored once are repeated."""
        values = self.values[arm]
        if self.constant(arm):
            return np.full(len(seeds), float(values.iloc[0]), np.float64)
        return np.asarray(values.loc[list(seeds)], dtype=np.float64)

    def by_item(self, arm: str, other: str, seeds: Sequence[int]) -> NDArray[np.float64] | None:
        """Differences arm − other, (S, I), or None where one of them has no items.

        The metric may be a ratio Σx/Σy. Its item is then d_i = x_i / mean(y) of weight w_i = y_i / mean(y), and what
        item i adds to the error of the ratio D = mean(d) is d_i − D w_i. Returned is d_i − D (w_i − 1): the same mean
        D in each seed, without the spread that long and short items have because D is not 0. With weights of 1 it is
        the difference itself.

        Raises
        ------
        UserError
            If the two were scored on different items.
        """
        if arm not in self.items or other not in self.items:
            return None
        odd = set(self.items[arm].columns) ^ set(self.items[other].columns)
        if odd:
            raise UserError(
                f"items of {self.label} {self.metric}: arms {arm} and {other} were scored on different items "
                f"(item {min(odd)} is missing in one of them); score both with the same suite"
            )
        ours, theirs = (self._items_of(name, seeds) for name in (arm, other))
        difference_SI: NDArray[np.float64] = ours.to_numpy(dtype=float) - theirs[ours.columns].to_numpy(dtype=float)
        above_I = self.weights[ours.columns].to_numpy(dtype=float) - 1
        linear_SI: NDArray[np.float64] = difference_SI - difference_SI.mean(1, keepdims=True) * above_I
        return linear_SI

    def constant(self, arm: str) -> bool:
        """Whether this is a pseudo-arm that was scored once, the same for every seed."""
        return arm in PSEUDO_ARMS and len(self.values[arm]) == 1

    def _items_of(self, arm: str, seeds: Sequence[int]) -> pd.DataFrame:
        items = self.items[arm]
        wanted = [items.index[0]] * len(seeds) if self.constant(arm) else list(seeds)
        missing = sorted(set(wanted) - set(items.index))
        if missing or items.loc[wanted].isna().to_numpy().any():
            where = f"seed {missing[0]}" if missing else "some items of a seed"
            raise UserError(f"items of {self.label} {self.metric}: arm {arm} lacks {where}; score it again")
        found, stated = items.loc[wanted].mean(axis=1).to_numpy(dtype=float), self.by_seed(arm, seeds)
        if not np.allclose(found, stated, rtol=TOLERANCE, atol=1e-6):
            raise UserError(
                f"items of {self.label} {self.metric}: those of arm {arm} average to {found.tolist()} "
                f"over seeds {list(seeds)}, its scores are {stated.tolist()}; collect both from the same runs, "
                "or leave out --items"
            )
        return items.loc[wanted]


def common_seeds(tasks: Sequence[Measured], *arms: str) -> list[int]:
    """Seeds that all the arms have on all the tasks, which may be none; [0] of arms that were scored once."""
    own = [set(m.values[arm].index) for m in tasks for arm in arms if not m.constant(arm)]
    return sorted(set.intersection(*own)) if own else [0]


def measure(settings: dict[str, Any], scores: pd.DataFrame, items: pd.DataFrame | None) -> list[Measured]:
    """The tasks of the settings, in their order, with the scores of every arm that the settings name.

    The pseudo-arms may be missing (a published table need not have them); an arm may not.
    """
    names = Counter((task["task"], task["metric"]) for task in settings["tasks"])
    arms = [arm["name"] for arm in settings["arms"]]
    all_scores, all_items = _by_task(scores), {} if items is None else _by_task(items)
    measured = []
    for task in settings["tasks"]:
        key = (task["suite"], task["task"], task["metric"])
        if key not in all_scores:
            known = [metric for suite, name, metric in all_scores if (suite, name) == key[:2]]
            here = f"scores of task {task['task']} in suite {task['suite']}"
            raise UserError(unknown_name(here, task["metric"], known) if known else f"{here}: there are none; score it")
        shared = names[task["task"], task["metric"]] > 1
        about_items = all_items.get(key)
        where = f"{task['task']} {task['metric']}"
        measured.append(
            Measured(
                suite=task["suite"],
                label=f"{task['suite']}/{task['task']}" if shared else task["task"],
                task=task["task"],
                metric=task["metric"],
                direction=task["direction"],
                min_gap=task["min_gap"],
                scale=task["scale"],
                values=_values(all_scores[key], arms, f"scores of {where}"),
                items={} if about_items is None else _matrices(about_items),
                weights=pd.Series(dtype=float) if about_items is None else _weights(about_items, f"items of {where}"),
            )
        )
    return measured


def _by_task(frame: pd.DataFrame) -> dict[tuple[str, str, str], pd.DataFrame]:
    return {(str(s), str(t), str(m)): rows for (s, t, m), rows in frame.groupby(["suite", "task", "metric"])}


def _values(scores: pd.DataFrame, arms: list[str], where: str) -> dict[str, pd.Series[float]]:
    values = {}
    for arm, rows in scores[scores["arm"].isin([*PSEUDO_ARMS, *arms])].groupby("arm"):
        number = pd.to_numeric(rows["value"], errors="coerce")
        bad = rows[~np.isfinite(number)]
        if len(bad):
            value, seed = bad.iloc[0][["value", "seed"]]
            raise UserError(f"{where}: value `{value}` of {_who(str(arm), seed)}")
        by_seed = pd.Series(number.to_numpy(dtype=float), index=rows["seed"].astype(int)).sort_index()
        if by_seed.index.has_duplicates:
            twice = by_seed.index[by_seed.index.duplicated()][0]
            raise UserError(f"{where}: arm `{arm}` has seed {twice} twice; collect the scores again")
        values[str(arm)] = by_seed
    for arm in arms:
        if arm not in values:
            raise UserError(
                f"{where}: none of arm `{arm}` (there are {', '.join(values)}); score it, or remove it from the arms"
            )
    return values


def _who(arm: str, seed: int) -> str:
    """Whose score is no number, and what can be done: to score a student that diverged again gives the same."""
    said = f"arm `{arm}`, seed {seed}, is no finite number"
    if arm in PSEUDO_ARMS:
        return f"{said}; no arm trained that model, so leave the task out, or score it again where the file was damaged"
    return (
        f"{said}: that student diverged. Lower training.lr or set training.clip, and train again; or take arm `{arm}` "
        f"out of the arms, or {seed} out of the seeds"
    )


def _matrices(items: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return {str(arm): rows.pivot(index="seed", columns="item", values="value") for arm, rows in items.groupby("arm")}


def _weights(items: pd.DataFrame, where: str) -> pd.Series[float]:
    """Weight by item; a file without weights (a published one, say) is taken for one of plain means."""
    if "weight" not in items:
        return pd.Series(1.0, index=pd.Index(items["item"].unique()))
    ends = items.groupby("item")["weight"].agg(["min", "max", "count", "size"])
    odd = ends[(ends["count"] < ends["size"]) | (ends["max"] - ends["min"] > TOLERANCE)]
    if len(odd):
        raise UserError(f"{where}: item {odd.index[0]} has no weight, or another one for another arm; score it again")
    if abs(ends["max"].mean() - 1) > TOLERANCE:
        raise UserError(f"{where}: the weights have the mean {ends['max'].mean():.6g}, not 1; score it again")
    return ends["max"]


def read_scores(path: Path) -> pd.DataFrame:
    """``scores.csv``."""
    return _columns(path, read_csv(path), [*NAMES, "seed", "value"])


def read_items(path: Path) -> pd.DataFrame:
    """``items.parquet``."""
    return _columns(path, pd.read_parquet(path), [*NAMES, "seed", "item", "value"])


def read_runs(path: Path) -> pd.DataFrame:
    """``runs.csv``."""
    return _columns(path, read_csv(path), ["arm", "positions", "seconds", "tflops", "peak_gib"])


def _columns(path: Path, frame: pd.DataFrame, needed: list[str]) -> pd.DataFrame:
    missing = [column for column in needed if column not in frame]
    if missing:
        raise UserError(f"{path}: column {', '.join(missing)} is missing; it has {', '.join(map(str, frame.columns))}")
    return frame

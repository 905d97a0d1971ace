"""Fair tuning: which points of the declared grids each tuned arm tries. The same number for every arm, known before
anything runs.

A key's values are drawn in rounds: each round has every value once, in the order of a hash of (seed, round, key,
value). So with as many trials as learning rates every arm tries each of them once, whatever else it tries. Points do
not depend on other arms, two arms with the same key try its values in the same order, and more trials keep the first.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from entkd.config.arms import ResolvedArm, merge_patch
from entkd.config.errors import problems_of, show
from entkd.config.grid import FIXED, TRAINING_KEYS, grid_of, written_values
from entkd.config.method import Method
from entkd.config.signals import Signals, lacking_signals
from entkd.config.stages import Slug, Training
from entkd.settings import Settings


class Tune(Settings):
    """Tuning, the same number of trials for every arm that is named, chosen by the NLL of the dev split."""

    trials: int = Field(ge=2, le=1000)
    """Trials of each tuned arm: training runs with other points of its grid."""
    arms: Literal["all"] | tuple[Slug, ...] = "all"
    """Which arms are tuned: `all`, or a list of names. The others train with their settings as written."""
    seed: int = Field(1000, ge=0)
    """Seed of the drawn points and of the trials' training. None of `seeds`: a student that was chosen by the luck of
    its own seed would flatter its arm."""
    grids: dict[str, tuple[Any, ...]] = Field(min_length=1)
    """Dotted key → values to try. `training.lr` and a few more of `training`, and any number of `method`. A key counts
    for the arms that have its component, unless the arm sets it itself: then it is what the arm is. Where two
    divergences, approaches or schedules have a key of one name, say whose it is: `method.approach.taid.start`."""

    @field_validator("arms")
    @classmethod
    def _arms_are_named_once(cls, arms: Any) -> Any:
        if arms != "all" and not arms:
            raise ValueError("names no arm; name some, or write `all`, or remove `tune`")
        if len(set(arms)) != len(arms) and arms != "all":
            raise ValueError(f"{show(list(arms))} names an arm twice")
        return arms

    @field_validator("grids")
    @classmethod
    def _grids_can_be_tried(cls, grids: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        for key, values in grids.items():
            block, _, name = key.partition(".")
            if block not in ("training", "method") or not name:
                raise ValueError(f"`{key}` is no key of a trial; write `training.lr` or `method.temperature.c`")
            if block == "training" and name not in TRAINING_KEYS:
                raise ValueError(
                    f"`{key}` cannot be tuned, as every trial has the same budget; of `training` can be "
                    f"{', '.join(TRAINING_KEYS)}"
                )
            if key.rpartition(".")[2] in FIXED:
                raise ValueError(f"`{key}` says what an arm is, which is not tuned; write arms of their own")
            if any(value is None or isinstance(value, Mapping) for value in values):
                raise ValueError(f"`{key}`: {show(list(values))} must be a list of numbers or words")
            if not values or len({json.dumps(value) for value in values}) != len(values):
                raise ValueError(f"`{key}`: {show(list(values))} must be different values, at least one")
        return grids


@dataclass(frozen=True)
class Trial:
    """One training run with one point of an arm's grid."""

    name: str
    """Its folder: a digest of the point, so that the same point is never trained twice."""
    point: dict[str, Any]
    """Dotted key → value."""
    arm: ResolvedArm
    """The arm at this point."""
    training: Training
    """The training settings at this point."""


def patch_of(point: Mapping[str, Any]) -> dict[str, Any]:
    """A point as the JSON Merge Patch on `method` and `training` that makes it."""
    patch: dict[str, Any] = {}
    for key, value in point.items():
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        patch = merge_patch(patch, nested, "tune.grids")
    return patch


def at_point(arm: ResolvedArm, training: Training, point: Mapping[str, Any]) -> tuple[ResolvedArm, Training]:
    """The arm and the training settings at a point of the grid; raises ValidationError where it is not allowed."""
    whole = {"method": arm.trained_method, "training": training.model_dump(mode="json")}
    patched = merge_patch(whole, patch_of(point), "tune.grids")
    method = Method.model_validate(patched["method"])
    return arm.model_copy(update={"method": method}), Training.model_validate(patched["training"])


def draw(
    grid: Mapping[str, tuple[Any, ...]], trials: int, seed: int, written: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """The first ``trials`` distinct points; the grid must have as many.

    The first of them has the ``written`` value of every key whose grid holds it, so that the choice among the trials is
    never worse on dev than the arm as it is written. Without it an arm with settings of its own would have met each
    learning rate with other values of these than the published ones, and plain distillation would not.
    """
    points: dict[str, dict[str, Any]] = {}
    number = 0
    while len(points) < trials:
        point = {key: _value(key, values, number, seed, (written or {}).get(key)) for key, values in grid.items()}
        points.setdefault(json.dumps(point, sort_keys=True), point)
        number += 1
    return list(points.values())


def _value(key: str, values: tuple[Any, ...], number: int, seed: int, written: Any) -> Any:
    """The value of a key in draw ``number``: each once in every turn, the ``written`` one first in the first turn."""
    turn, place = divmod(number, len(values))

    def rank(value: Any) -> tuple[bool, str]:
        return turn > 0 or value != written, _digest(f"{seed}/tune/{turn}/{key}/{json.dumps(value)}")

    return sorted(values, key=rank)[place]


def trials_of(
    tune: Tune, arm: ResolvedArm, patch: Mapping[str, Any], training: Training, signals: Signals
) -> tuple[list[Trial], list[str]]:
    """The trials of an arm, and what is wrong with them: one line per problem."""
    where = f"tune: arm {arm.name}"
    grid = grid_of(tune.grids, arm, patch)
    size = math.prod(len(values) for values in grid.values())
    if size < tune.trials:
        keys = ", ".join(f"{key} ({len(values)})" for key, values in grid.items()) or "none"
        return [], [
            f"{where} has {size} points to try, fewer than trials {tune.trials}; keys that count for it: {keys}. Add "
            "values to training.lr, which every arm has, or lower trials, or leave the arm out of tune.arms"
        ]
    found: list[Trial] = []
    problems: list[str] = []
    for point in draw(grid, tune.trials, tune.seed, written_values(arm, training)):
        at = f"{where} at {show(point)}"
        try:
            patched, trained = at_point(arm, training, point)
        except ValidationError as error:
            model = Training if error.title == "Training" else Method
            problems += [f"{where}: {problem}" for problem in problems_of(error, model, model.__name__.lower())]
            continue
        problems += [f"{at}: method.{key}: {why}" for key, why in lacking_signals(patched.method, signals)]
        found.append(Trial(_digest(json.dumps(point, sort_keys=True))[:10], point, patched, trained))
    seen: dict[str, Trial] = {}
    for trial in found:
        settings = json.dumps([trial.arm.trained_method, trial.training.model_dump(mode="json")], sort_keys=True)
        if settings in seen:
            problems.append(f"{where}: {show(trial.point)} and {show(seen[settings].point)} are the same settings")
        seen[settings] = trial
    return found, list(dict.fromkeys(problems))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

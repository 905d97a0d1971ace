"""The experiment as data: one file, validated before anything runs."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from entkd.config.arms import Arm, ResolvedArm, expand_sweeps, resolve_arms
from entkd.config.errors import ProblemsError, unknown_name
from entkd.config.grid import grid_problems
from entkd.config.method import Method
from entkd.config.pipelines import lacking_pipeline
from entkd.config.scoring import Analysis, ReportedSuite
from entkd.config.signals import Signals, lacking_signals
from entkd.config.stages import Data, Slug, Student, Teacher, Training
from entkd.config.tune import Trial, Tune, trials_of
from entkd.design import Factorial, factorial_of, lacking
from entkd.errors import UserError
from entkd.settings import Settings

RESULT_FOLDERS = ("budget", "data", "figures", "logs", "scores", "signals", "students", "teachers", "tuning")
"""Folders of the demo's results, which no other experiment may take as its name."""


class Runtime(Settings):
    """Where things run. Changing these never retrains anything."""

    threads: int = Field(1, ge=1)
    """CPU threads of a training or scoring job. Two jobs of one thread usually beat one of two."""
    memory_gib: float = Field(4.0, gt=0)
    """Memory that a training or scoring job asks the scheduler for."""
    gpus: Literal["auto", 0, 1] = "auto"
    """GPUs of a job: `auto` asks for one where this machine has any, 0 is the CPU. On a cluster give the number: the
    machine that submits the jobs often has none."""
    cache: Path = Path("cache")
    """Folder of the content-addressed teacher signals, shared by experiments."""
    scoring_gib: float = Field(2.0, gt=0)
    """Memory from which the batch size of scoring follows."""
    save_minutes: float = Field(5.0, gt=0)
    """Minutes of training between two resume checkpoints."""
    log_every: int = Field(10, ge=1)
    """Training steps between two looks at the loss on the device, which cost a wait there."""


class Experiment(Settings):
    """Everything that decides a result."""

    name: Slug = "demo"
    """`demo` writes to `results/`, any other name to `results/{name}/`."""
    teacher: Teacher = Teacher()
    """The model to learn from."""
    data: Data
    """The text to learn on."""
    signals: Signals = Signals()
    """What is stored of the teacher's outputs."""
    student: Student = Student()
    """The model that learns."""
    training: Training
    """How long and how it learns."""
    method: Method
    """The method that arms are patches of."""
    arms: dict[Slug, Arm] = Field(min_length=1)
    """Name → JSON Merge Patch (RFC 7396) on `method`."""
    sweeps: dict[Slug, dict[str, list[Any]]] = {}
    """Arm name → {dotted method key: values}; expands to ordinary arms `{arm}.{key}={value}`."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0, 1, 2), min_length=1)
    """Random seeds; every arm is trained once with each."""
    tune: Tune | None = None
    """Tuning on the dev split; without it every arm trains with its settings as written."""
    suites: dict[Slug, ReportedSuite] = Field(min_length=1)
    """What students are scored on."""
    analysis: Analysis = Analysis()
    """How scores become claims."""
    runtime: Runtime = Runtime()
    """Where things run."""

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        problems = []
        if self.name in RESULT_FOLDERS:
            problems.append(f"name: `{self.name}` is a folder of the demo's results; choose another")
        if len(set(self.seeds)) != len(self.seeds):
            problems.append(f"seeds: {list(self.seeds)} repeat themselves")
        runs = {"training": self.training, "teacher.finetune": self.teacher.finetune}
        for path, training in runs.items():
            if training is not None and self.data.max_tokens > training.block:
                problems.append(
                    f"data.max_tokens: {self.data.max_tokens} is more than {path}.block {training.block}, and a "
                    "document must fit into a block"
                )
        resolved = self.resolved_arms  # raises what is wrong with an arm
        if self.analysis.reference not in resolved:
            problems.append(unknown_name("analysis.reference", self.analysis.reference, resolved))
        problems += [
            f"arms.{arm.name}.{key}: {why}"
            for arm in resolved.values()
            for key, why in (*lacking_signals(arm.method, self.signals), *lacking_pipeline(arm.pipeline, arm.method))
        ]
        if self.training.budget is not None:
            problems += [
                f"arms.{arm.name}.on_policy: what the student will write is not known when the steps of a budget are "
                "planned; give training.steps or training.epochs"
                for arm in resolved.values()
                if arm.method.on_policy is not None
            ]
        problems += self._tuning[1]
        for name, suite in self.suites.items():
            named = [(task.name, task.metric) for task in suite.tasks]
            twice = next((pair for pair in named if named.count(pair) > 1), None)
            if twice is not None:
                problems.append(f"suites.{name}.tasks: {twice[0]} with metric {twice[1]} is there twice; remove one")
        try:
            lacking([arm.components for arm in resolved.values()])
        except UserError as error:  # two arms in one cell, more than two bases
            problems.append(str(error))
        if problems:
            raise ProblemsError(problems)
        return self

    @cached_property
    def resolved_arms(self) -> dict[str, ResolvedArm]:
        """Every arm, sweeps included, with its complete method. Order as written."""
        return resolve_arms(self.method, self.arms, self.sweeps)

    @property
    def trials(self) -> dict[str, list[Trial]]:
        """The trials of every tuned arm, in the order of the arms; empty without tuning."""
        return self._tuning[0]

    @cached_property
    def _tuning(self) -> tuple[dict[str, list[Trial]], list[str]]:
        """The trials of every tuned arm, and what is wrong with the tuning."""
        if self.tune is None:
            return {}, []
        known = self.resolved_arms
        chosen = list(known) if self.tune.arms == "all" else self.tune.arms
        problems = [unknown_name("tune.arms", name, known) for name in chosen if name not in known]
        if problems:
            return {}, problems
        if self.tune.seed in self.seeds:
            problems.append(
                f"tune.seed: {self.tune.seed} is one of `seeds`; a student chosen by the luck of its own seed would "
                "flatter its arm: take another"
            )
        written = expand_sweeps(self.arms, self.sweeps)
        arms = {name: (arm, written[name].patch) for name, arm in known.items() if name in chosen}
        trials = {}
        for name, (arm, patch) in arms.items():
            trials[name], found = trials_of(self.tune, arm, patch, self.training, self.signals)
            problems += found
        return trials, problems + list(grid_problems(self.tune.grids, arms))

    @property
    def factorial(self) -> Factorial | None:
        """The design that the factorial arms make up, complete or a half fraction; None where they make up none."""
        return factorial_of([arm.components for arm in self.resolved_arms.values()])

    @property
    def lacking_cells(self) -> str:
        """Why there is no design although there are factorial arms; nothing where there is one, or no such arm."""
        return lacking([arm.components for arm in self.resolved_arms.values()])

    @property
    def results(self) -> str:
        """The folder that this experiment writes to, relative to the working directory."""
        return "results" if self.name == "demo" else f"results/{self.name}"


def canonical_json(value: Any) -> str:
    """Settings as one line of JSON with sorted keys: equal settings give equal strings."""
    if isinstance(value, Settings):
        value = value.model_dump(mode="json")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)

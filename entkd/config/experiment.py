"""The experiment as data: one file, validated before anything runs."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from entkd.config.arms import Arm, ResolvedArm, resolve_arms
from entkd.config.base import Settings
from entkd.config.method import Method
from entkd.config.stages import Analysis, Data, Signals, Slug, Student, Suite, Teacher, Training


class Runtime(Settings):
    """Where things run. Changing these never retrains anything."""

    threads: int = Field(1, ge=1)
    """CPU threads of a training or scoring job. Two jobs of one thread usually beat one of two."""
    memory_gib: float = Field(4.0, gt=0)
    """Memory that a training or scoring job asks the scheduler for."""
    gpus: int | Literal["auto"] = "auto"
    """GPUs of a job: `auto` asks for one where this machine has any, 0 is the CPU."""
    cache: Path = Path("cache")
    """Folder of the content-addressed teacher signals, shared by experiments."""


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
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    """Random seeds; every arm is trained once with each."""
    suites: dict[Slug, Suite] = Field(min_length=1)
    """What students are scored on."""
    analysis: Analysis = Analysis()
    """How scores become claims."""
    runtime: Runtime = Runtime()
    """Where things run."""

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} repeat themselves")
        resolved = self.resolved_arms  # raises what is wrong with an arm
        if self.analysis.reference not in resolved:
            from entkd.config.errors import unknown_name

            raise ValueError(unknown_name("analysis.reference", self.analysis.reference, resolved))
        return self

    @cached_property
    def resolved_arms(self) -> dict[str, ResolvedArm]:
        """Every arm, sweeps included, with its complete method. Order as written."""
        return resolve_arms(self.method, self.arms, self.sweeps)

    @property
    def results(self) -> str:
        """The folder that this experiment writes to, relative to the working directory."""
        return "results" if self.name == "demo" else f"results/{self.name}"


def canonical_json(value: Any) -> str:
    """Settings as one line of JSON with sorted keys: equal settings give equal strings."""
    if isinstance(value, Settings):
        value = value.model_dump(mode="json")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)

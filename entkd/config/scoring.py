"""Settings of what students are scored on, and of how scores become claims.

What decides a score is one class, what the table makes of it another: the second reruns no scoring.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from entkd.settings import Settings


class Task(Settings):
    """One lm-eval task and the metric of it that is scored."""

    name: str
    """Task or group name, lm-eval's or ours."""
    metric: str
    """Metric as lm-eval names it, e.g. `acc`."""


class ReportedTask(Task):
    """One lm-eval task, the metric of it that the table shows, and how the table reads it."""

    direction: Literal["higher", "lower"]
    """Which way is better."""
    min_gap: float = Field(0.0, ge=0)
    """Teacher-student gap under which `gap_closed` leaves this task out."""
    scale: float = Field(1.0, gt=0)
    """Units of this metric that count as one where `gap_closed` sums over tasks, e.g. 100 for a percentage."""


class Suite(Settings):
    """What decides a score."""

    tasks: tuple[Task, ...] = Field(min_length=1)
    """Tasks of the suite, all scored in one process."""
    include_path: Path | None = None
    """Folder with further lm-eval task files."""
    limit: int | None = Field(None, ge=1)
    """Score only this many items of each task."""
    fidelity: bool = True
    """Also measure KL to the teacher and top-1 agreement on the test split."""
    max_generated_tokens: int = Field(64, ge=1)
    """Longest generated response of `entkd_rouge`."""
    apply_chat_template: bool = False
    """Wrap prompts of other tasks in the chat template. Ours carry their own."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the scored model."""


class ReportedSuite(Suite):
    """What students are scored on."""

    tasks: tuple[ReportedTask, ...] = Field(min_length=1)
    """Tasks of the suite, all scored in one process."""


class Analysis(Settings):
    """How scores become claims."""

    reference: str = "kd"
    """The arm that every other arm is compared with."""
    alpha: float = Field(0.05, gt=0, lt=1)
    """Error rate of the claims, per family of tests."""
    power: float = Field(0.8, gt=0, lt=1)
    """Power at which the smallest detectable difference is stated."""

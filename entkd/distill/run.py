"""What one training run is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from entkd.config import Method, Training


@dataclass(frozen=True)
class Run:
    """One training run: what to train, from which files, into which folder."""

    method: Method
    training: Training
    seed: int
    student: Path
    """Folder of the untrained student."""
    data: Path
    """Folder of the prepared data."""
    signals: Path | None
    """Manifest of the teacher's signals."""
    teacher: Path | None
    """Folder of the teacher itself, for methods in which it reads what the student writes."""
    output: Path
    """Folder of the run."""
    dtype: torch.dtype
    """Autocast precision."""
    save_minutes: float
    """Minutes between two resume checkpoints."""
    log_every: int
    """Steps between two looks at the loss on the device."""
    trial: bool = False
    """Whether this is a trial of tuning: its weights are left out, and where it diverges, that is its result."""

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the numbers, as JSON."""
        return {"method": self.method.model_dump(mode="json"), "training": self.training.model_dump(mode="json")}

    @property
    def title(self) -> str:
        """The run in the log, e.g. `kd/seed0`."""
        return f"{self.output.parent.name}/{self.output.name}"

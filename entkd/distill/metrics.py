"""Metrics of a run, without a host sync in the step: device values wait until somebody looks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Metrics:
    """Rows of ``metrics.jsonl``, in the order of the run."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._waiting: list[tuple[dict[str, Any], dict[str, Tensor]]] = []

    def add(self, known: dict[str, Any], on_device: dict[str, Tensor], seconds: float) -> None:
        """Add a row: host values now, device values at the next `flush`."""
        self._waiting.append((known | {"seconds": round(seconds, 3)}, on_device))

    def flush(self) -> None:
        """Fetch every waiting device value, in one transfer a row."""
        for known, on_device in self._waiting:
            values = torch.stack([value.float() for value in on_device.values()]).tolist()
            self.rows.append(known | dict(zip(on_device, values, strict=True)))
        self._waiting.clear()

    def latest(self, *names: str) -> dict[str, float]:
        """The last value of each metric that has one."""
        found: dict[str, float] = {}
        for row in reversed(self.rows):
            found |= {name: row[name] for name in names if name in row and name not in found}
            if len(found) == len(names):
                break
        return found

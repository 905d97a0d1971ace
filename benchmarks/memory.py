"""Peak memory of one competitor: in a process of its own, since the peak of a process is that of all who ran in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from entkd.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True)
class Memory:
    """MiB of resident memory."""

    loaded: float
    """Once models and data are there, before the first step."""
    peak: float
    """The most while steps ran."""

    @property
    def added(self) -> float:
        """What the steps took on top: gradients, optimizer state, activations, logits."""
        return self.peak - self.loaded


class PeakMemory:
    """Watches this process from the moment it is made. Needs Linux, whose kernel can forget the peak of loading."""

    def __init__(self) -> None:
        try:
            _CLEAR_REFS.write_text("5", encoding="ascii")
        except OSError as error:
            raise UserError(f"{_CLEAR_REFS}: {error}; peak memory needs Linux, leave out --memory") from error
        self._loaded = psutil.Process().memory_info().rss / 2**20

    def stop(self) -> Memory:
        """The peak so far."""
        lines = _STATUS.read_text(encoding="ascii").splitlines()
        peak = next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))
        return Memory(self._loaded, peak)

    def report(self) -> None:
        """Print it for `of_child`."""
        memory = self.stop()
        print(json.dumps({"loaded": memory.loaded, "peak": memory.peak}), flush=True)


def of_child(module: str, arguments: Sequence[str]) -> Memory:
    """What `python -m module arguments` reports in its last line.

    Raises
    ------
    UserError
        If it fails; with what it printed.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return Memory(**json.loads(done.stdout.strip().splitlines()[-1]))

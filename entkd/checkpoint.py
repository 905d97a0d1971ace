"""Atomic resume state: a run killed at any moment goes on where it was, bit for bit on the same thread count.

The state lives in ``resume/`` beside the outputs. Snakemake is not told of it, because it wipes what it was told
of when a job fails. A state is written under a temporary name, flushed to disk and renamed, so a kill during the
write leaves the one before.
"""

from __future__ import annotations

import shutil
import signal
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import nn

from entkd.files import locked, replacing

FORMAT = 3


class ResumeFolder:
    """The ``resume/`` folder of one run.

    ``identity`` names what the state belongs to (settings, seed, hashes of the inputs). A state of another
    identity is removed: continuing it would mix two experiments.
    """

    def __init__(self, output: Path, identity: str) -> None:
        self.folder = output / "resume"
        self.identity = identity
        self._state = self.folder / "state.pt"

    def load(self) -> dict[str, Any] | None:
        """The newest state of this identity, or None."""
        if not self._state.exists():
            return None
        state = torch.load(self._state, map_location="cpu", weights_only=True)
        if state["format"] != FORMAT or state["identity"] != self.identity:
            print(
                f"{self.folder}: resume state of other settings or inputs; starting anew", file=sys.stderr, flush=True
            )
            self._state.unlink(missing_ok=True)  # another process of the same run may have been faster
            return None
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Write the state atomically."""
        with replacing(self._state) as temporary, temporary.open("wb") as stream:
            torch.save({"format": FORMAT, "identity": self.identity, **state}, stream)

    def save_best(self, model: nn.Module, step: int) -> None:
        """Keep the weights of the best evaluation so far, by step."""
        with replacing(self._best(step)) as temporary:
            save_model(model, str(temporary))

    def load_best(self, model: nn.Module, step: int) -> None:
        """Give the model the weights that `save_best` kept at this step."""
        load_model(model, self._best(step))

    def prune_best(self, keep: int | None) -> None:
        """Remove the kept weights of every step but one."""
        for path in self.folder.glob("best-*.safetensors"):
            if keep is None or path != self._best(keep):
                path.unlink()

    def remove(self) -> None:
        """Remove the folder: the outputs are complete."""
        shutil.rmtree(self.folder)

    def _best(self, step: int) -> Path:
        return self.folder / f"best-{step}.safetensors"

    def lock(self) -> AbstractContextManager[None]:
        """Hold the run against a second process, e.g. one left over from a killed workflow; waits for it."""
        return locked(self.folder / "lock", "this run")


class StopRequest:
    """Notes SIGTERM and SIGUSR1 so that the loop can act between two steps.

    SIGUSR1 (batch systems send it before the time limit) asks for a checkpoint; SIGTERM for a checkpoint and exit.
    """

    def __init__(self) -> None:
        self.save = False
        self.stop = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.save = True
        self.stop = self.stop or number == signal.SIGTERM

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

"""Atomic resume state: a run killed at any moment goes on where it was, bit for bit on the same thread count.

The state lives in ``resume/`` beside the outputs. Snakemake is not told of it, because it wipes what it was told
of when a job fails. A state is written under a temporary name, flushed to disk and renamed, so a kill during the
write leaves the one before.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import nn

from entkd.errors import UserError

FORMAT = 1


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
        """The newest state of this identity, or None. Temporary files of a killed write are removed."""
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink()
        if not self._state.exists():
            return None
        state = torch.load(self._state, map_location="cpu", weights_only=True)
        if state["format"] != FORMAT or state["identity"] != self.identity:
            print(
                f"{self.folder}: resume state of other settings or inputs; starting anew", file=sys.stderr, flush=True
            )
            self._state.unlink()
            return None
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Write the state atomically."""
        temporary = self._state.with_suffix(".tmp")
        with refuse_full_disk(temporary), temporary.open("wb") as stream:
            torch.save({"format": FORMAT, "identity": self.identity, **state}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(self._state)
        _sync_folder(self.folder)

    def save_best(self, model: nn.Module, step: int) -> None:
        """Keep the weights of the best evaluation so far, by step."""
        path = self._best(step)
        temporary = path.with_suffix(".tmp")
        with refuse_full_disk(temporary):
            save_model(model, str(temporary))
        temporary.replace(path)

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

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run against a second process, e.g. one left over from a killed workflow; waits for it."""
        path = self.folder / "lock"
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("w") as stream:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    print(
                        f"{self.folder}: another process works on this run; waiting for it", file=sys.stderr, flush=True
                    )
                    fcntl.flock(stream, fcntl.LOCK_EX)
                # The other process removes the folder when it finishes: then this lock is on a file that is gone.
                if path.exists() and path.stat().st_ino == os.fstat(stream.fileno()).st_ino:
                    yield
                    return


@contextlib.contextmanager
def refuse_full_disk(path: Path) -> Iterator[None]:
    """Turn a full disk into an error that names the file, and remove what was half written."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch and safetensors report a failed write as RuntimeError or their own OSError subclass
        free = shutil.disk_usage(path.parent).free
        full = (
            getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or free < 2**20 or "os error 28" in str(error)
        )
        path.unlink(missing_ok=True)
        if full:
            raise UserError(
                f"{path}: no space left on device ({free / 2**20:.0f} MiB free); free some and run again"
            ) from error
        raise


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


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

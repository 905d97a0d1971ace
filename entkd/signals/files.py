"""Files of the signal store: written whole or not at all, by one job at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from entkd.config import canonical_json
from entkd.errors import UserError


class StoreWriteError(UserError, OSError):
    """A file of the store could not be written, for instance because the disk is full."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write a safetensors file under a temporary name, flush it to disk and rename it.

    Parameters
    ----------
    path
        The final name.
    tensors
        CPU tensors.
    header
        What the file says of itself. It is stored as one string: safetensors does not keep the order of several,
        and equal content must give equal bytes.

    Raises
    ------
    StoreWriteError
        If the write fails; names the file, the bytes it needs and the bytes free. Nothing half-written is left.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            temporary,
            {"entkd": canonical_json(header)},
        )
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        needed, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(path.parent).free
        raise StoreWriteError(
            f"{path}: cannot be written ({error}); it needs {needed:,} bytes and {free:,} are free. "
            "Free some space, or move runtime.cache to another disk, and run again: finished shards are kept"
        ) from error


def read_header(path: Path) -> dict[str, Any] | None:
    """What a file of the store says of itself; None if it is absent, cut short or not one of ours."""
    try:
        with safe_open(path, "pt") as file:
            header: dict[str, Any] = json.loads((file.metadata() or {})["entkd"])
            return header
    except (FileNotFoundError, SafetensorError, KeyError, json.JSONDecodeError):
        return None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a store against other jobs; waits for one that holds it. The kernel releases it when a job dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder}: another job writes these teacher signals; waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

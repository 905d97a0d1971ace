"""Files that are there whole or not at all, whatever happens during the write."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from entkd.errors import UserError


class WriteError(UserError, OSError):
    """A file could not be written, for instance because the disk is full."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what libraries raise on a full disk, each in its own way, into an error that names file and free space."""
    try:
        yield
    except WriteError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # Python and numpy, torch.save, safetensors
        free = shutil.disk_usage(path.parent).free / 2**20
        raise WriteError(
            f"{path}: cannot be written ({error}); {free:,.0f} MiB are free there. Free some space and run again: "
            "finished parts are kept"
        ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``; what is written there takes its place when the block ends without an error.

    The content is flushed to disk before the rename, so that a power cut leaves the old or the new, never a hole. Works
    for files and folders, and makes the folder around them. After an error nothing of the new content is left.

    Raises
    ------
    WriteError
        If the write fails.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(temporary)
    try:
        with writing(path):
            yield temporary
            for part in [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]:
                _sync(part)
            if temporary.is_dir() and path.exists():  # a folder cannot be renamed over one that has files
                shutil.rmtree(path)
            temporary.replace(path)
            _sync(path.parent)
    except BaseException:
        _remove(temporary)
        raise


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file ``path`` against other processes; waits for one that holds it, and says so.

    The kernel releases it when a process dies, however it dies. The folder is made where it is missing.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{path.parent}: another process works on {what}; waiting for it", file=sys.stderr, flush=True)
                fcntl.flock(stream, fcntl.LOCK_EX)
            # The other process may have removed the folder when it finished: then this lock is on a file that is gone.
            if path.exists() and path.stat().st_ino == os.fstat(stream.fileno()).st_ino:
                yield
                return


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys sorted."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

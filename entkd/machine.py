"""What this machine has, asked without importing torch: Snakemake reads it at every start."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import psutil

CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def has_gpu() -> bool:
    """Whether NVIDIA's driver lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return any(line.startswith("GPU ") for line in listing.stdout.splitlines())


def memory_mib() -> int:
    """Memory of this machine, or of the container that it is, in MiB."""
    total = int(psutil.virtual_memory().total)
    limit = CONTAINER_LIMIT.read_text(encoding="ascii").strip() if CONTAINER_LIMIT.is_file() else "max"
    return (total if limit == "max" else min(total, int(limit))) // 2**20


def keep_freed_memory() -> None:
    """Tell glibc's allocator to keep large freed blocks for the next tensor; does nothing with other allocators.

    By default it hands every block over 32 MiB back to the system, and each step of a training loop then waits for
    its gradient and logit buffers to be zeroed again: a sixth of a step's time on the two cores where it was measured.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**31 - 1)

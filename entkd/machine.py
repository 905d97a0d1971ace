"""What this machine has, asked without importing torch: Snakemake reads it at every start."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil

CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def has_gpu() -> bool:
    """Whether NVIDIA's driver lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return any(line.startswith("GPU ") for line in listing.stdout.splitlines())


def hide_gpus() -> None:
    """Let this process and its children see no GPU: jobs that have not asked for one must not crowd it."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def memory_mib() -> int:
    """Memory of this machine, or of the container that it is, in MiB."""
    total = int(psutil.virtual_memory().total)
    limit = CONTAINER_LIMIT.read_text(encoding="ascii").strip() if CONTAINER_LIMIT.is_file() else "max"
    return (total if limit == "max" else min(total, int(limit))) // 2**20


def keep_freed_memory() -> None:
    """Let this process use freed memory again, instead of giving it back and having the kernel clear other pages.

    A training step makes and drops tensors of megabytes by the hundred: 20,000 page faults where it was measured, a
    twentieth of its time. By glibc's `mallopt`; elsewhere nothing happens.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, 2**30)
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)

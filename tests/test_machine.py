"""What the workflow learns about the machine it runs on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from entkd import machine


@pytest.mark.parametrize(
    ("listing", "answer"),
    [("GPU 0: NVIDIA H100 (UUID: GPU-1)\nGPU 1: NVIDIA H100 (UUID: GPU-2)", True), ("No devices found.", False)],
)
def test_gpus_are_what_the_driver_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listing: str, answer: bool
) -> None:
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{listing}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.has_gpu() is answer
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert machine.has_gpu() is False


@pytest.mark.parametrize(("limit", "mib"), [("2097152000\n", 2000), ("max\n", None), (None, None)])
def test_memory_is_the_containers_where_it_is_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str | None, mib: int | None
) -> None:
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr(machine, "CONTAINER_LIMIT", tmp_path / "memory.max")
    assert machine.memory_mib() == (mib or psutil.virtual_memory().total // 2**20)


def test_large_blocks_are_kept_for_the_next_tensor() -> None:
    """In a child, because the setting is the process's: page faults of ten buffers of 64 MiB, one after the other."""
    script = """
import resource, sys
from entkd.machine import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    bytearray(64 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
"""
    faults = {
        mode: int(
            subprocess.run([sys.executable, "-c", script, mode], capture_output=True, text=True, check=True).stdout
        )
        for mode in ("plain", "keep")
    }
    assert faults["keep"] < faults["plain"] / 4

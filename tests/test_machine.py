"""What the workflow learns about the machine it runs on."""

from __future__ import annotations

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

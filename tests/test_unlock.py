"""Unlocking: never while a Snakemake is alive, always after a dead one, and its orphaned jobs are stopped first."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from entkd import unlock as module
from entkd.errors import UserError
from entkd.unlock import unlock

SLEEP = "import time; time.sleep(60)"


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a stale lock; `snakemake --unlock` itself is replaced by a note."""
    locks = tmp_path / ".snakemake/locks"
    locks.mkdir(parents=True)
    (locks / "0.input.lock").touch()
    (tmp_path / "results/logs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module.subprocess, "run", lambda *args, **_: (tmp_path / "unlocked").write_text(str(args[0])))
    return tmp_path


def start(folder: Path, program: str, log: str | None = None) -> subprocess.Popen[bytes]:
    """A process that looks like ``program`` and writes to ``log``."""
    (folder / program).write_text(SLEEP)
    with (folder / log).open("w") if log else contextlib.nullcontext() as output:
        process = subprocess.Popen([sys.executable, str(folder / program)], cwd=folder, stdout=output)
    while program not in " ".join(psutil.Process(process.pid).cmdline()):
        time.sleep(0.01)
    return process


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_free_folder_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    calls: list[object] = []
    monkeypatch.setattr(module.subprocess, "run", lambda *arguments, **_: calls.append(arguments))
    unlock()
    assert not calls


def test_stale_lock_is_removed(locked: Path) -> None:
    unlock()
    assert "'--unlock'" in (locked / "unlocked").read_text()


def test_broken_experiment_and_profile_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real Snakemake, in a folder whose workflow cannot be read."""
    for name in ("Snakefile", "config/config.yaml", "profiles/default/profile.yaml", ".snakemake/locks/0.input.lock"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("[broken", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    unlock()
    assert not list(tmp_path.glob(".snakemake/locks/*"))


def test_running_snakemake_keeps_its_lock(locked: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    processes.append(start(locked, "snakemake"))
    with pytest.raises(UserError, match=f"Snakemake runs here .process {processes[0].pid}"):
        unlock()
    assert not (locked / "unlocked").exists()


def test_snakemake_elsewhere_does_not_matter(
    locked: Path, processes: list[subprocess.Popen[bytes]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    processes.append(start(tmp_path_factory.mktemp("elsewhere"), "snakemake"))
    unlock()
    assert (locked / "unlocked").exists()


def test_orphaned_jobs_are_stopped_and_others_are_not(locked: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    processes.append(start(locked, "entkd", "results/logs/distill.kd.seed0.log"))
    processes.append(start(locked, "entkd"))  # started by hand: no log of the workflow
    unlock()
    assert processes[0].poll() is not None
    assert processes[1].poll() is None
    assert (locked / "unlocked").exists()

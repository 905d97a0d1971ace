"""Free a working directory whose Snakemake was killed: its lock stays, and so may jobs that it started."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from entkd.errors import UserError

PATIENCE_SECONDS = 120.0
"""Time that an orphaned job gets to write its resume state."""


def unlock() -> None:
    """Remove the lock of this folder if no Snakemake runs here, after ending the jobs that a dead one left behind.

    Such a job would write into the outputs that the next Snakemake makes anew. It is asked to stop (SIGTERM), writes
    its resume state, and the next run continues there.

    Raises
    ------
    UserError
        If a Snakemake is alive in this folder, or a job does not end.
    """
    here = Path.cwd()
    locks = here / ".snakemake" / "locks"
    if not locks.is_dir() or not any(locks.iterdir()):
        return
    alive = [process.pid for process in _processes_in(here) if _runs(process, "snakemake")]
    if alive:
        raise UserError(f"{here}: Snakemake runs here (process {alive[0]}); wait for it, or stop it with Ctrl-C")
    orphans = [process for process in _processes_in(here) if _runs(process, "entkd") and _logs_below(process, here)]
    for process in orphans:
        print(f"process {process.pid} is a job of a killed Snakemake; stopping it", file=sys.stderr)
        process.terminate()
    _, stuck = psutil.wait_procs(orphans, timeout=PATIENCE_SECONDS)
    if stuck:
        raise UserError(f"{here}: job {stuck[0].pid} of a killed Snakemake does not end; stop it with kill -9")
    # A workflow without rules: the lock is the folder's, whatever the experiment and the profile are, and whether they
    # can be read or not.
    none = ("--profile", "none", "--workflow-profile", "none", "--cores", "1", "--quiet")
    subprocess.run([sys.executable, "-m", "snakemake", "--unlock", "--snakefile", os.devnull, *none], check=True)


def _processes_in(folder: Path) -> Iterator[psutil.Process]:
    """Other processes whose working directory is ``folder``, as far as this user may see them."""
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.cwd() == str(folder):
                yield process
        except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
            continue


def _runs(process: psutil.Process, program: str) -> bool:
    """Whether a process is ``program``, started as a script or with ``python -m``."""
    try:
        words = process.cmdline()
    except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
        return False
    return program in [Path(word).name for word in words[:3]] and "unlock" not in words


def _logs_below(process: psutil.Process, folder: Path) -> bool:
    """Whether a process writes a log of the workflow: one started by hand writes to a terminal."""
    try:
        logs = [Path(file.path) for file in process.open_files() if file.path.endswith(".log")]
    except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
        return False
    return any(log.parent.name == "logs" and log.is_relative_to(folder / "results") for log in logs)

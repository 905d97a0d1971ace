"""The experiment of ``tests/tiny`` in a folder of its own, run by the real workflow with the real stages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def copy_experiment(folder: Path, teacher: Path, changes: dict[str, object] | None = None) -> None:
    """Put workflow, data, teacher and the experiment, as ``config/config.yaml``, into ``folder``."""
    shutil.copy(ROOT / "Snakefile", folder)
    for name in ("workflow", "profiles"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "tests/tiny/train.jsonl", folder)
    shutil.copytree(teacher, folder / "teacher")
    experiment = yaml.safe_load((ROOT / "tests/tiny/experiment.yaml").read_text(encoding="utf-8")) | (changes or {})
    (folder / "config").mkdir()
    (folder / "config/config.yaml").write_text(yaml.safe_dump(experiment, sort_keys=False), encoding="utf-8")


def environment(folder: Path) -> dict[str, str]:
    """The environment with this Python's `entkd` first on PATH, and no cache shared with other runs."""
    binaries = Path(sys.executable).parent
    path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "xdg")}


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Snakemake in ``folder``, in a process group of its own, so that all of it can be killed."""
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--nocolor", *arguments]
    with (folder / "snakemake.log").open("a", encoding="utf-8") as log:
        return subprocess.Popen(
            command, cwd=folder, env=environment(folder), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def run(folder: Path, *arguments: str) -> str:
    """A run that has to succeed; returns what it printed."""
    before = (folder / "snakemake.log").stat().st_size if (folder / "snakemake.log").exists() else 0
    code = start(folder, *arguments).wait()
    printed = (folder / "snakemake.log").read_bytes()[before:].decode()
    assert code == 0, printed[-6000:]
    return printed

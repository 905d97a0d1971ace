"""`kill -9` at random moments: every rerun completes, and the weights are those of an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tiny_experiment import copy_experiment, environment, run, start

CHANGES = {
    "arms": {
        "kd": {"role": "factorial"},
        "full": {"role": "factorial", "curriculum": {}, "temperature": {}, "features": {"points": 2}},
        "seqkd": {"pipeline": "seqkd", "divergence": None, "ce": {}},
    },
    "seeds": [0],
    "training": {
        "steps": 1200, "block": 128, "blocks_per_step": 2, "micro_blocks": 1, "eval_every": 400, "precision": "fp32",
    },
    "runtime": {"threads": 1, "memory_gib": 0.5, "gpus": 0, "save_minutes": 0.02},
}  # fmt: skip


def weights(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): json.loads(path.read_text(encoding="utf-8"))["weights_sha256"]
        for path in sorted(folder.glob("results/tiny/students/*/seed*/run.json"))
    }


def unlock(folder: Path) -> None:
    """What `make ablation` does first."""
    command = [sys.executable, "-m", "entkd.cli", "unlock"]
    subprocess.run(command, cwd=folder, env=environment(folder), check=True, capture_output=True)


def training_process(snakemake: psutil.Process) -> psutil.Process | None:
    """The Python process of a distillation that runs now."""
    for child in snakemake.children(recursive=True):
        try:
            command = child.cmdline()
        except psutil.NoSuchProcess:
            continue
        if "distill" in command and "python" in Path(command[0]).name:
            return child
    return None


def resumes(folder: Path) -> int:
    """How often the training runs in the folder were continued."""
    records = folder.glob("results/tiny/students/*/seed*/run.json")
    return sum(json.loads(path.read_text(encoding="utf-8"))["resumed"] for path in records)


def kill_somewhere(process: subprocess.Popen[str], kind: str, draw: random.Random) -> bool:
    """Kill a distillation, the workflow with all its jobs, or the workflow alone, at a random moment.

    False if it finished first.
    """
    # A distillation is waited for; the other kills fall at any moment of the first half minute.
    deadline = time.monotonic() + (60 if kind == "distill" else draw.uniform(2, 30))
    while time.monotonic() < deadline and process.poll() is None:
        victim = training_process(psutil.Process(process.pid)) if kind == "distill" else None
        if victim is not None:
            time.sleep(draw.uniform(4, 16))  # past the imports, into its 1,200 steps
            if victim.is_running():
                victim.kill()
                assert process.wait() != 0
                return True
        time.sleep(0.05)
    if process.poll() is not None:
        return False
    if kind == "everything":
        os.killpg(process.pid, signal.SIGKILL)
    else:  # the workflow alone: its jobs live on as orphans
        process.kill()
    process.wait()
    return True


@pytest.mark.slow
def test_ten_kills_change_nothing(tmp_path: Path, tiny_teacher: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        copy_experiment(folder, tiny_teacher, CHANGES)
    run(whole)
    expected = weights(whole)
    assert len(expected) == 3
    draw = random.Random(0)
    kinds = ["distill", "everything", "snakemake"]
    hits = resumed = 0
    for _ in range(60):
        if hits == 10:
            break
        unlock(killed)
        process = start(killed)
        if kill_somewhere(process, kinds[hits % 3], draw):
            hits += 1
        else:  # it finished before the kill: check it, and start over
            assert process.wait() == 0
            assert weights(killed) == expected
            resumed += resumes(killed)
            shutil.rmtree(killed / "results")
            shutil.rmtree(killed / "cache")
    assert hits == 10
    unlock(killed)
    run(killed)
    assert weights(killed) == expected
    assert resumed + resumes(killed) >= 2  # some kills hit a training run after a checkpoint
    assert not list(killed.glob("results/tiny/students/*/seed*/resume"))
    print(f"{hits} kills, weights {expected}")

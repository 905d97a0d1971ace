"""`kill -9` at random moments: every rerun completes, and the weights are those of an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
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
        "steps": 150, "block": 128, "blocks_per_step": 2, "micro_blocks": 1, "eval_every": 50, "precision": "fp32",
    },
    "runtime": {"threads": 1, "memory_gib": 0.5, "gpus": 0, "save_minutes": 0.01},
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


@pytest.mark.slow
def test_ten_kills_change_nothing(tmp_path: Path, tiny_teacher: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        copy_experiment(folder, tiny_teacher, CHANGES)
    run(whole)
    draw = random.Random(0)
    kinds = ["distill", "everything", "snakemake"]
    for number in range(10):
        unlock(killed)
        process = start(killed)
        kind = kinds[number % 3]
        # A distillation is waited for; the other kills fall at any moment of the first half minute.
        deadline = time.monotonic() + (60 if kind == "distill" else draw.uniform(2, 30))
        victim = None
        while time.monotonic() < deadline and process.poll() is None and victim is None:
            if kind == "distill":
                victim = training_process(psutil.Process(process.pid))
            time.sleep(0.05)
        if victim is not None:
            time.sleep(draw.uniform(0, 8))
            if victim.is_running():
                victim.kill()
            process.wait()
        elif kind == "everything" and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        else:  # the workflow alone: its jobs live on as orphans
            process.kill()
        process.wait()
    unlock(killed)
    run(killed)
    assert weights(killed) == weights(whole)
    assert len(weights(whole)) == 3
    assert not list(killed.glob("results/tiny/students/*/seed*/resume"))

"""A budget of seconds as a number of steps: a few steps of the arm are timed on a copy, which is thrown away.

Measured inside the training itself, the length of a run, and with it the curriculum's progress and the learning rates,
would follow from the load of the machine and be known only at its end. Measured before and written down, the schedule
is known as a whole and the run can be repeated from its record.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from entkd.config import Method, Training
from entkd.distill.stage import distill
from entkd.errors import UserError
from entkd.files import write_json

UNTIMED, TIMED = 3, 8
"""Steps before the clock counts (buffers, compilers), and steps of which it takes the median."""


def calibrate(
    method: Method,
    training: Training,
    seed: int,
    student: Path,
    data: Path,
    signals: Path | None,
    output: Path,
    threads: int = 1,
) -> None:
    """Write the JSON Merge Patch that replaces ``training.budget.seconds`` by the steps that fit into it.

    Parameters
    ----------
    method, training, seed, student, data, signals
        As in :func:`distill`.
    output
        File of the patch.
    threads
        CPU threads to time with: those of the training, whatever the job was given.

    Raises
    ------
    UserError
        If there is no budget of seconds, or not one step fits into it.
    """
    budget = training.budget.seconds if training.budget is not None else None
    if budget is None:
        raise UserError(f"training: {training.length}; only `budget: {{ seconds: ... }}` is measured")
    torch.set_num_threads(threads)
    steps = UNTIMED + TIMED
    short = training.model_dump() | {"budget": None, "steps": steps, "eval_every": steps, "checkpoint": "last"}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "calibration"
        distill(method, Training(**short), seed, student, data, signals, run, math.inf, log_every=1, trial=True)
        beforehand = json.loads((run / "run.json").read_text(encoding="utf-8"))["seconds_beforehand"]
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = np.diff([row["seconds"] for row in rows if "seconds" in row])[UNTIMED - 1 :]
    median = float(np.median(seconds))
    fitting = math.floor((budget - beforehand) / median)
    if fitting < 1:
        passes = f" after {beforehand:.3g} for the untrained student's pass over the data" if beforehand else ""
        raise UserError(
            f"training.budget: {budget:g} seconds are less than a step takes, {median:.3g}{passes}; raise it"
        )
    says = f"{TIMED} steps took {seconds.min():.3g} to {seconds.max():.3g} s, median {median:.3g}"
    if beforehand:
        says += f", and the pass before the first {beforehand:.3g} s"
    print(f"{says}: {fitting} steps are {budget:g} s", file=sys.stderr, flush=True)
    write_json(output, {"training": {"budget": None, "steps": fitting}})

"""The stages `distill` and `finetune-teacher`: who may run, what is continued, and what the run is."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from pathlib import Path

import torch

from entkd import runtime
from entkd.checkpoint import ResumeFolder
from entkd.config import CrossEntropy, Method, Training, canonical_json
from entkd.distill.distributed import World
from entkd.distill.loop import train
from entkd.distill.outputs import finished
from entkd.distill.run import Run
from entkd.files import write_json
from entkd.models import model_sha256


def distill(
    method: Method,
    training: Training,
    seed: int,
    student: Path,
    data: Path,
    signals: Path | None,
    output: Path,
    save_minutes: float = 5.0,
    log_every: int = 10,
    trial: bool = False,
    teacher: Path | None = None,
) -> None:
    """Train one student and write ``model/``, ``metrics.jsonl`` and ``run.json`` into ``output``.

    Parameters
    ----------
    method, training
        The resolved arm, and length, batch and optimizer of the run.
    seed
        Seed of every named random stream of the run.
    student
        Folder of the untrained student.
    data
        Folder of the prepared data.
    signals
        Manifest of the teacher's signals; None for arms that train on the data alone.
    output
        Folder of the run. An interrupted run found here is continued.
    save_minutes
        Minutes between two resume checkpoints.
    log_every
        Steps between two looks at the loss on the device, which cost a wait there.
    trial
        Leave the weights out, and take a dev loss that is no number for a result (``dev_nll: null`` in the record).
    teacher
        Folder of the teacher itself; for methods with `on_policy`, in which it reads what the student writes.

    Raises
    ------
    UserError
        If the stored signals lack something that the method needs, or the inputs do not fit together.
    """
    world = World.join()
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = runtime.resolve_dtype(training.precision, device_type)
    run = Run(method, training, seed, student, data, signals, teacher, output, dtype, save_minutes, log_every, trial)
    resume = ResumeFolder(output, _identity(run, device_type))
    with resume.lock() if world.leads else contextlib.nullcontext(), runtime.device_slot() as device:
        world.barrier()  # nobody looks at the folder before the lock is held
        if finished(output, resume.identity):
            print(f"{output}: already complete, finished by an earlier process", file=sys.stderr, flush=True)
        else:
            train(run, resume, world, device)
        world.barrier()
        if world.leads:
            resume.remove()


def finetune_teacher(
    training: Training, teacher: Path, data: Path, output: Path, save_minutes: float = 5.0, log_every: int = 10
) -> None:
    """Fine-tune the teacher on the training responses (cross-entropy alone) and write it as a teacher folder."""
    imported = json.loads((teacher / "manifest.json").read_text(encoding="utf-8"))
    distill(Method(ce=CrossEntropy()), training, 0, teacher / "model", data, None, output, save_minutes, log_every)
    finetuned = {"sha256": model_sha256(output / "model"), "finetuned_from": imported["sha256"]}
    write_json(output / "manifest.json", imported | finetuned)


def _identity(run: Run, device_type: str) -> str:
    """What a resume state belongs to: settings, seed, the content of every input, and how the device computes."""
    parts = {
        "settings": run.settings,
        "seed": run.seed,
        "student": model_sha256(run.student),
        "data": json.loads((run.data / "manifest.json").read_text(encoding="utf-8"))["files"],
        "signals": run.signals and json.loads(run.signals.read_text(encoding="utf-8"))["key"],
        "arithmetic": f"{run.dtype} on {device_type}",
    }
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()

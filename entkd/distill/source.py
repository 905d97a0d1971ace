"""Where the training loop gets its steps from: the data and the stored signals, or also the student and the teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from entkd.data import Corpus
from entkd.data.packing import Batch, Block
from entkd.distill.distributed import World
from entkd.distill.targets import Step, TeacherTargets

if TYPE_CHECKING:
    from entkd.distill.loop import Run


class Source:
    """Every step is the data's own, with the stored targets. The base of sources that have other steps as well."""

    def __init__(self, targets: TeacherTargets) -> None:
        self.targets = targets

    def step(self, step: int, blocks: Sequence[Block], batches: Sequence[Batch], progress: float) -> Step:
        """The micro-batches of a step and their targets.

        Parameters
        ----------
        step
            Number of the step, from 1.
        blocks, batches
            Documents of the data that are this step's, and their micro-batches on the CPU.
        progress
            u in [0, 1].
        """
        return self.targets.step(batches, progress)

    def evaluated(self, nll: float) -> None:
        """Told the dev loss, in nats, after each evaluation."""

    def state(self) -> dict[str, Any]:
        """What a continued run needs: tensors and plain values."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""

    def record(self) -> dict[str, Any]:
        """The ledger of the run: what the student wrote, and what the teacher read of it."""
        return {"generated_tokens": 0, "teacher_tokens_online": 0, "on_policy_steps": 0, "replayed_steps": 0}

    def tflops(self) -> float:
        """TFLOPs of generation and of the teacher's passes over it."""
        return 0.0


def step_source(
    run: Run,
    steps: Sequence[Sequence[Block]],
    targets: TeacherTargets,
    corpus: Corpus,
    student: PreTrainedModel,
    eos_token_id: int,
    world: World,
    device: torch.device,
    evaluate: Callable[[], float],
) -> Source:
    """The source that the method of a run needs.

    Parameters
    ----------
    steps
        Documents of every step of the run.
    targets
        The stored targets of the data.
    student
        The model that is trained, on its device; it writes with the weights it has when a step asks for it.
    evaluate
        Gives the dev loss of the student as it is, in nats.

    Raises
    ------
    UserError
        If the teacher is missing or not that of the signals, or a buffer is smaller than a step.
    """
    if run.method.on_policy is None:
        return Source(targets)
    from entkd.onpolicy.generation import Writer
    from entkd.onpolicy.pipeline import OnPolicy

    writer = Writer(
        student, run.student, run.method.on_policy, run.training.block, run.seed, eos_token_id, device, run.dtype
    )
    return OnPolicy(run, steps, targets, corpus, writer, world, device, evaluate)

"""Where the training loop gets its steps from: the data and the stored signals, unless a subclass knows more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from entkd.data.packing import Batch, Block
from entkd.distill.targets import Step, TeacherTargets


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

"""Which source the steps of a run come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from entkd.data import Corpus
from entkd.data.packing import Block
from entkd.distill.distributed import World
from entkd.distill.run import Run
from entkd.distill.source import Source
from entkd.distill.targets import TeacherTargets


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
    # Here, because `entkd.onpolicy` builds on this package, whose face imports the loop.
    from entkd.onpolicy.generation import Writer
    from entkd.onpolicy.pipeline import OnPolicy

    writer = Writer(
        student, run.student, run.method.on_policy, run.training.block, run.seed, eos_token_id, device, run.dtype
    )
    return OnPolicy(run, steps, targets, corpus, writer, world, device, evaluate)

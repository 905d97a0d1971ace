"""The steps of a run, known as a whole before the first one, and what they cost by analysis.

A budget of tokens or TFLOPs becomes a number of steps here: as many whole ones as fit into it. A budget of seconds
became one before, in a job of its own (``calibration.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from entkd.config import Training
from entkd.data import Corpus
from entkd.data.packing import Block, pack, plan_steps, stream_steps
from entkd.distill.flops import training_tflops
from entkd.distill.scan import looks, scans
from entkd.distill.targets import TeacherTargets
from entkd.errors import UserError


@dataclass(frozen=True)
class Costs:
    """What steps cost: their tokens and positions by counting, their TFLOPs by analysis, linear in both."""

    response_lengths: NDArray[np.int64]
    """(documents,) response tokens of each document."""
    feature_tokens: NDArray[np.int64]
    """(documents,) tokens with a feature loss of each document."""
    block: int
    """Tokens of a block."""
    scanning: Callable[[int], bool]
    """Whether a step of so many micro-batches runs the student over all of them once more."""
    micro_blocks: int
    """Blocks of a micro-batch."""
    per_token: float
    """TFLOPs of a token through the trunk."""
    per_position: float
    """TFLOPs of a response token through the output projections."""
    per_scanned_token: float
    """TFLOPs of a token through the trunk without gradient, as often as an approach looks at its outputs."""
    per_feature_token: float
    """TFLOPs of a token through the projectors."""
    beforehand: float
    """TFLOPs before the first step: an untrained student read for the difficulty."""

    @classmethod
    def of(
        cls, student: PreTrainedModel, corpus: Corpus, targets: TeacherTargets, training: Training, vocab_size: int
    ) -> Costs:
        """The costs of one arm on one corpus."""
        store, features, block = targets.store, targets.method.features, training.block
        teacher_width = store.width if store is not None and targets.head_UE is not None else None
        pairs = 0 if features is None else len(features.layers) if features.layers else features.points
        linear = features is not None and features.projector == "linear"
        width = store.width if store is not None and linear else 0
        read_again = looks(targets.method)
        beforehand = 0.0
        if targets.method.needs_difficulty and targets.method.difficulty.of_student:
            whole = block * len(pack(corpus.lengths, block, np.arange(len(corpus))))
            read = teacher_width if targets.method.difficulty.source == "initial_kl" else None
            beforehand = training_tflops(
                student, 0, 0, block, vocab_size, read, scanned_tokens=whole, scanned_positions=corpus.response_tokens
            )
        return cls(
            corpus.response_lengths,
            targets.feature_tokens(len(corpus)),
            block,
            partial(scans, targets.method),
            training.micro_blocks,
            training_tflops(student, 1, 0, block, vocab_size, teacher_width),
            training_tflops(student, 0, 1, block, vocab_size, teacher_width, scanned_positions=read_again),
            training_tflops(student, 0, 0, block, vocab_size, None, scanned_tokens=read_again),
            training_tflops(student, 0, 0, block, vocab_size, None, projected=pairs, projector_width=width),
            beforehand,
        )

    def tokens(self, step: Sequence[Block]) -> int:
        """Response tokens of a step."""
        return sum(int(self.response_lengths[documents].sum()) for documents in step)

    def of_tokens(self, tokens: int, positions: int, features: int, scanned: int) -> float:
        """TFLOPs of steps: tokens through the trunk, response tokens, tokens with a feature loss, tokens scanned."""
        trained = self.per_token * tokens + self.per_position * positions + self.per_feature_token * features
        return trained + self.per_scanned_token * scanned

    def tflops(self, steps: Sequence[Sequence[Block]]) -> float:
        """TFLOPs of steps on the data."""
        blocks = [documents for step in steps for documents in step]
        positions = sum(int(self.response_lengths[documents].sum()) for documents in blocks)
        features = sum(int(self.feature_tokens[documents].sum()) for documents in blocks)
        scanned = sum(len(step) for step in steps if self.scanning(math.ceil(len(step) / self.micro_blocks)))
        return self.of_tokens(self.block * len(blocks), positions, features, self.block * scanned)


def plan_run(corpus: Corpus, training: Training, seed: int, costs: Costs) -> list[list[Block]]:
    """Which blocks each optimizer step sees, for every way to say how long a run is.

    Raises
    ------
    UserError
        If a budget is less than the first step costs, or one of seconds has not been measured yet.
    """
    budget = training.budget
    if budget is None:
        return plan_steps(corpus, training, seed)
    if budget.seconds is not None:
        raise UserError(
            "training.budget.seconds: how many steps that are is measured before training; run `entkd calibrate` and "
            "give its output to `entkd distill --patches`"
        )
    limit = float(budget.tokens or budget.tflops or math.nan)
    spent = 0.0 if budget.tokens is not None else costs.beforehand
    steps: list[list[Block]] = []
    for step in stream_steps(corpus, training, seed):
        spent += costs.tokens(step) if budget.tokens is not None else costs.tflops([step])
        if spent > limit:
            break
        steps.append(step)
    if not steps:
        raise UserError(
            f"training.budget: {budget.words} is less than a run of one step costs, {spent:.3g}; raise it, or lower "
            "training.blocks_per_step"
        )
    return steps

"""The student's responses to the prompts of a step, and their micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entkd import runtime
from entkd.config import Training
from entkd.config.method import OnPolicy
from entkd.data import Corpus
from entkd.data.packing import Batch, collate, pack
from entkd.distill.flops import trunk_flops_per_token
from entkd.generate import generate
from entkd.models import load_model, load_tokenizer
from entkd.onpolicy.buffer import Written


@dataclass
class Writer:
    """The student as a writer, with the weights that it has when it is called."""

    student: PreTrainedModel
    folder: Path
    """Where it is before training, and its tokenizer."""
    settings: OnPolicy
    """Temperature and length of its text."""
    block: int
    """Longest document, prompt included."""
    seed: int
    eos_token_id: int
    device: torch.device
    dtype: torch.dtype
    """Autocast precision of the training; in bf16 a copy of the weights writes."""
    tokenizer: PreTrainedTokenizerBase = field(init=False)
    _copy: PreTrainedModel | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.tokenizer = load_tokenizer(self.folder)

    def __call__(self, prompts: Sequence[list[int]], step: int) -> list[Written]:
        """A sampled response to each prompt, all of them generated together.

        The samples are of a random stream of this seed and step: neither the steps before nor an interruption change
        them. Dropout is off.
        """
        training = self.student.training
        self.student.eval()
        responses = generate(
            self._model(),
            self.tokenizer,
            prompts,
            max_new_tokens=self.settings.max_response_tokens,
            max_length=self.block,
            temperature=self.settings.temperature,
            generator=runtime.torch_stream(self.seed, f"student text {step}"),
            batch=len(prompts),
            eos_token_id=self.eos_token_id,
        )
        self.student.train(training)
        return list(zip(prompts, responses, strict=True))

    @torch.no_grad()
    def _model(self) -> PreTrainedModel:
        """The student, or its copy in bf16: autocast would cast every weight anew for each token, which took three
        times as long where it was measured."""
        if self.dtype != torch.bfloat16:
            return self.student
        if self._copy is None:
            self._copy = load_model(self.folder, dtype=self.dtype)
            self._copy.to(self.device)  # type: ignore[arg-type]  # Transformers' annotation
        for own, weight in zip(self._copy.parameters(), self.student.parameters(), strict=True):
            own.copy_(weight)
        return self._copy

    def flops(self, tokens: int, generated: int) -> float:
        """Of so many tokens through the trunk, so many of them generated; attention as over a whole block."""
        head = 2.0 * int(self.student.config.hidden_size) * len(self.tokenizer)
        return trunk_flops_per_token(self.student, self.block) * tokens + head * generated


def micro_batches(written: Corpus, training: Training, pad_id: int, processes: int) -> list[Batch]:
    """The documents packed into as many blocks as they need, ``micro_blocks`` in a micro-batch.

    Their number is a multiple of the processes; the last ones may hold padding alone.
    """
    blocks = pack(written.lengths, training.block, np.arange(len(written)), open_blocks=16)
    micros = [blocks[start : start + training.micro_blocks] for start in range(0, len(blocks), training.micro_blocks)]
    micros += [[np.empty(0, dtype=np.int64)]] * (-len(micros) % processes)
    return [collate(written, micro, training.block, pad_id) for micro in micros]

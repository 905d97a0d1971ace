"""What the teacher says of a step's tokens, and what the components make of it.

The difficulty of every training token is known before training starts, so weights, temperatures and hard tokens
of a whole optimizer step are formed at once, with the step's own normalisers, and then cut into micro-batches.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from entkd.components import token_plan
from entkd.config import Features, Method
from entkd.config.folders import layer_pairs_problem
from entkd.config.method import TVD
from entkd.config.signals import lacking_distribution
from entkd.data import Corpus
from entkd.data.packing import Batch
from entkd.difficulty import training_difficulty
from entkd.distill.micro_batch import MicroBatch
from entkd.errors import UserError
from entkd.features import select_tokens
from entkd.signals import SignalStore
from entkd.sparse import SparseTarget


def infinite_at_zero(method: Method) -> str | None:
    """Key and name of what trains a KL(q‖p), which is infinite where the teacher gives a token probability 0."""
    divergence, approach = method.divergence, method.approach
    if divergence is None:
        return None
    own = divergence.contains_reverse_kl
    if approach is not None and approach.contains_reverse_kl(own) != own:
        return None if own else f"approach: {approach.name}"
    return f"divergence: {divergence.name}" if own else None


@dataclass(frozen=True)
class Step:
    """One optimizer step: its micro-batches and their global denominators."""

    micro_batches: list[MicroBatch]
    positions: int
    """N, response tokens of the step."""
    hard: int
    """|H|, tokens with a feature loss."""
    tokens: int
    """Tokens through the trunk, padding included."""
    summary: dict[str, float]
    """For the log: mean weight, mean weight × scale, mean temperature, number of tokens with a feature loss."""


def check_same_data(store: SignalStore, data: Path, signals: Path) -> None:
    """Refuse signals of other token ids: their rows would meet the wrong tokens, and nothing would look wrong."""
    manifest = json.loads((data / "manifest.json").read_text(encoding="utf-8"))
    known = store.manifest["content"]["corpus"]
    other = [
        name for name in known if name.startswith("train.") and manifest["files"].get(f"{name}.npy") != known[name]
    ]
    if other or manifest["vocab_size"] != store.vocab_size:
        raise UserError(
            f"{signals}: made for other data than {data} ({', '.join(other) or 'vocab_size'} differ); "
            "prepare the signals again for this data"
        )


class TeacherTargets:
    """The signal store as one arm reads it.

    Raises
    ------
    UserError
        If the method needs something that the store has not got; names the setting to change.
    """

    def __init__(self, method: Method, signals: Path | None, data: Path, corpus: Corpus, seed: int) -> None:
        self.method, self.seed = method, seed
        self.store: SignalStore | None = None
        self.teacher_layers: tuple[int, ...] = ()
        self.difficulty_R: Tensor | None = None
        """(R,) d of every training token; None where no component reads it, or the student has not been asked."""
        if not method.needs_signals:
            return
        if signals is None:
            raise UserError("this method needs the teacher's signals; give --signals")
        self.store = store = SignalStore.open(signals)
        self.split = store.split("train")
        check_same_data(store, data, signals)
        self._corpus = corpus
        infinite = infinite_at_zero(method)
        if infinite and store.has_inf_logits:
            raise UserError(
                f"method.{infinite} contains KL(q‖p), which is infinite for this teacher: "
                "it gives some tokens a logit of -inf; use forward_kl, jsd, skew_kl, alpha_beta or tvd"
            )
        if self.split.is_sparse:
            for key, why in lacking_distribution(method):
                raise UserError(f"{signals}: method.{key}: {why}")
        if method.features is not None:
            self.teacher_layers = self._layers(store, method.features)
        if method.needs_difficulty and not self.waits_for_student:
            self.difficulty_R = training_difficulty(method.difficulty, store, corpus, seed)

    @property
    def waits_for_student(self) -> bool:
        """Whether the difficulty is one of the untrained student; `use_student` then goes before the first step."""
        return self.method.needs_difficulty and self.method.difficulty.of_student and self.difficulty_R is None

    def use_student(self, student_R: Tensor) -> None:
        """Form the difficulty of what the untrained student says of every training token, (R,) in nats."""
        assert self.store is not None
        self.difficulty_R = training_difficulty(self.method.difficulty, self.store, self._corpus, self.seed, student_R)

    @staticmethod
    def _layers(store: SignalStore, settings: Features) -> tuple[int, ...]:
        """The teacher layer of each layer pair: as named, or stored ones at 1/points, 2/points, ... of the depth."""
        if settings.layers is not None:
            problem = layer_pairs_problem(settings.layers, None, store.feature_layers)
            if problem:
                raise UserError(f"method.features.layers: {problem}")
            return tuple(theirs for _, theirs in settings.layers)
        points = settings.points
        stride, rest = divmod(len(store.feature_layers), points)
        if rest or not stride:
            raise UserError(
                f"method.features.points: {points} layer pairs, but the signals hold the teacher's layers "
                f"{list(store.feature_layers)}; their number must be a multiple of it, see signals.features.points"
            )
        return store.feature_layers[stride - 1 :: stride]

    def feature_tokens(self, documents: int) -> NDArray[np.int64]:
        """(documents,) tokens with a feature loss of each document: known before training, as the difficulty is."""
        features = self.method.features
        if features is None:
            return np.zeros(documents, dtype=np.int64)
        assert self.difficulty_R is not None
        tokens_R = torch.arange(len(self.difficulty_R)) if features.tokens == "random" else None
        # A moving θ at its middle: the costs of the steps are summed, and projectors are a small part of them. Under a
        # curriculum that stands still so does θ.
        kind = self.method.curriculum.progress if self.method.curriculum is not None else "lr"
        progress = {"easy": 0.0, "hard": 1.0}.get(kind, 0.5)
        chosen_R = select_tokens(self.difficulty_R, features, tokens_R, self.seed, progress=progress)
        lengths = torch.as_tensor(self._corpus.response_lengths, dtype=torch.long)
        document_R = torch.repeat_interleave(torch.arange(documents), lengths)
        return torch.bincount(document_R[chosen_R], minlength=documents).numpy()

    def step(self, batches: Sequence[Batch], progress: float) -> Step:
        """Targets of one optimizer step.

        Parameters
        ----------
        batches
            Every micro-batch of the step, those of other devices included.
        progress
            u in [0, 1].
        """
        positions = sum(len(batch.tokens_N) for batch in batches)
        tokens = sum(batch.input_ids_BL.numel() for batch in batches)
        if self.store is None:
            return Step([MicroBatch(batch) for batch in batches], positions, 0, tokens, {})
        tokens_N = torch.cat([batch.tokens_N for batch in batches])
        difficulty_N = None if self.difficulty_R is None else self.difficulty_R[tokens_N]
        plan = token_plan(difficulty_N, progress, self.method, tokens_N=tokens_N, seed=self.seed)
        micro_batches, start = [], 0
        for batch in batches:
            cut = slice(start, start := start + len(batch.tokens_N))
            micro_batches.append(self._micro_batch(batch, plan.weight_N, plan.temperature_N, plan.features_N, cut))
        return Step(micro_batches, positions, int(plan.summary["hard"]), tokens, plan.summary)

    def _distribution(self, batch: Batch) -> Tensor | SparseTarget:
        """Sparse targets or log-probabilities where they are stored, else hidden states."""
        if self.split.is_sparse:
            return self.split.sparse(batch.tokens_N)
        return self.split.logprobs(batch.tokens_N) if self._reads_logprobs else self.split.hidden(batch.tokens_N)

    @property
    def _reads_logprobs(self) -> bool:
        """Whether the stored log-probabilities serve the method.

        Total variation has a gradient that jumps where p = q: fp16 moves enough tokens over the jump to change it by
        5 % where student and teacher are close, so that its teacher comes from the hidden states.
        """
        divergence = self.method.divergence
        return self.store is not None and self.store.has_logprobs and not isinstance(divergence, TVD)

    @property
    def head_UE(self) -> Tensor | None:
        """The output projection for the teacher's hidden states, where they need one."""
        if self.store is None or self.method.divergence is None or self._reads_logprobs or self.split.is_sparse:
            return None
        return self.store.head_UE

    def _micro_batch(
        self, batch: Batch, weight_N: Tensor | None, temperature_N: Tensor | None, features_N: Tensor | None, cut: slice
    ) -> MicroBatch:
        hard_H = None if features_N is None else features_N[cut].nonzero().squeeze(1)
        return MicroBatch(
            batch,
            # Read when it is its turn: log-probabilities of a whole step may not fit into memory.
            teacher_NE=partial(self._distribution, batch) if self.method.divergence is not None else None,
            weight_N=None if weight_N is None else weight_N[cut],
            temperature_N=None if temperature_N is None else temperature_N[cut],
            hard_H=hard_H,
            teacher_features=()
            if hard_H is None
            else tuple(self.split.features(batch.tokens_N[hard_H], layer) for layer in self.teacher_layers),
        )

"""The difficulty of every training token: the teacher's entropy, or what stands in for it (docs/method.md, section 1).

Whatever the source, the difficulty of a token is the same in every step, batch and process of a run.

Shapes: R response tokens of the training split.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from entkd.config import Difficulty as DifficultySettings
from entkd.data import Corpus
from entkd.entropy import Difficulty
from entkd.errors import UserError
from entkd.runtime import numpy_stream
from entkd.signals import SignalStore


def training_difficulty(
    settings: DifficultySettings, store: SignalStore, corpus: Corpus, seed: int, student_R: Tensor | None = None
) -> Tensor:
    """d of every response token of the training split.

    Parameters
    ----------
    settings
        Source and scale.
    store, corpus
        The teacher's signals and the data that they were made of.
    seed
        Seed of the run; only the permutations read it.
    student_R
        (R,) what the source says of the untrained student, nats; only sources of the student need it.

    Returns
    -------
    Tensor
        (R,) fp32 in [0, 1], by the global index of the response token.

    Raises
    ------
    UserError
        If the source is infinite or NaN for a token.
    """
    split = store.split("train")
    sequence_R = torch.from_numpy(np.repeat(np.arange(len(corpus)), corpus.response_lengths))
    if settings.source in ("teacher_entropy", "permuted", "permuted_within"):
        difficulty_R = store.difficulty(settings.scale)(split.entropy_R, sequence_R)
        if settings.source == "teacher_entropy":
            return difficulty_R
        return difficulty_R[permutation(sequence_R, seed, within=settings.source == "permuted_within")]
    if settings.source == "unigram":
        value_R = unigram_surprise(torch.from_numpy(corpus.response_ids))
    elif settings.source == "label_nll":
        value_R = -split.target_logprob_R
    elif student_R is None:
        raise ValueError(f"difficulty.source: {settings.source} is one of the untrained student; pass student_R")
    else:
        value_R = student_R
    bad = int((~torch.isfinite(value_R)).sum())
    if bad:
        raise UserError(
            f"difficulty.source: {settings.source} is infinite or NaN for {bad} of {len(value_R)} training tokens, as "
            "where a model gives probability 0 to a token of the data; use another source"
        )
    return Difficulty.fit(value_R, settings.scale, store.vocab_size)(value_R, sequence_R)


def permutation(sequence_R: Tensor, seed: int, within: bool) -> Tensor:
    """(R,) int64 indices that deal values anew to all tokens, or to those of each sequence.

    Parameters
    ----------
    sequence_R
        (R,) sequence of each token, ascending.
    seed
        Each seed has a permutation of its own.
    within
        Every token gets the value of a token of its own sequence.
    """
    stream = numpy_stream(seed, "difficulty within" if within else "difficulty")
    if not within:
        return torch.from_numpy(stream.permutation(len(sequence_R)))
    return torch.from_numpy(np.lexsort((stream.random(len(sequence_R)), sequence_R.numpy())))


def unigram_surprise(labels_R: Tensor) -> Tensor:
    """(R,) fp32 −log of the share that a token's id has of all ids, nats."""
    _, index_R, counts = labels_R.unique(return_inverse=True, return_counts=True)
    share_R: Tensor = counts[index_R].double() / len(labels_R)
    return -share_R.log().float()

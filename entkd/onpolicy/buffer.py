"""Documents that the student wrote, kept for later steps (DistiLLM, arXiv 2402.03898, section 3.2)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from entkd.data import Corpus

Written = tuple[list[int], list[int]]
"""Prompt and response of one document, as token ids."""


def as_corpus(documents: Sequence[Written]) -> Corpus:
    """Documents as a corpus in memory, in their order."""
    lengths = [len(prompt) + len(response) for prompt, response in documents]
    flat = [token for document in documents for part in document for token in part]
    return Corpus.build(
        np.asarray(flat, dtype=np.int32),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.asarray([len(prompt) for prompt, _ in documents], dtype=np.int32),
    )


class ReplayBuffer:
    """At most ``capacity`` documents; the oldest makes room for a new one."""

    def __init__(self, capacity: int) -> None:
        self._documents: deque[Written] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._documents)

    def add(self, documents: Iterable[Written]) -> None:
        """Append documents, the last one the newest."""
        self._documents.extend(documents)

    def draw(self, count: int, generator: np.random.Generator) -> list[Written]:
        """``count`` documents without replacement; raises ValueError where there are fewer."""
        return [self._documents[index] for index in generator.choice(len(self), size=count, replace=False).tolist()]

    def state(self) -> dict[str, Tensor]:
        """Token ids of all documents end to end, their lengths, and the lengths of their prompts; oldest first."""
        corpus = as_corpus(list(self._documents))
        return {
            "ids": torch.from_numpy(corpus.ids),
            "lengths": torch.from_numpy(corpus.lengths),
            "prompt_lengths": torch.from_numpy(corpus.prompt_lengths),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        self._documents.clear()
        documents = state["ids"].split(state["lengths"].tolist())
        for ids, prompt in zip(documents, state["prompt_lengths"].tolist(), strict=True):
            self._documents.append((ids[:prompt].tolist(), ids[prompt:].tolist()))

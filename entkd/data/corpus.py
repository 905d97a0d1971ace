"""The tokenised corpus on disk: three arrays per split, memory-mapped.

A document is prompt tokens followed by response tokens. Response token ``j`` of document ``d`` has the global
index ``response_offsets[d] + j``; everything per token is addressed by it, so nothing depends on packing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entkd.errors import UserError
from entkd.files import replacing

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Corpus:
    """One split: token ids of all documents end to end, where each starts, and how long its prompt is."""

    ids: NDArray[np.int32]
    """(total,) token ids."""
    offsets: NDArray[np.int64]
    """(documents + 1,) start of each document in ``ids``."""
    prompt_lengths: NDArray[np.int32]
    """(documents,) prompt tokens of each document, at least 1."""
    response_offsets: NDArray[np.int64]
    """(documents + 1,) global index of each document's first response token."""

    @classmethod
    def open(cls, folder: str | Path, split: str) -> Corpus:
        """The ``split`` of a prepared data folder, ids memory-mapped.

        Raises
        ------
        UserError
            If the folder holds no finished data (its ``manifest.json`` is written last).
        """
        folder = Path(folder)
        if not (folder / "manifest.json").is_file():
            raise UserError(f"{folder}: no manifest.json here, so no finished data; run `entkd prepare-data` first")
        offsets = np.load(folder / f"{split}.offsets.npy")
        prompt_lengths = np.load(folder / f"{split}.prompt_lengths.npy")
        ids = np.load(folder / f"{split}.ids.npy", mmap_mode="r")
        return cls.build(ids, offsets, prompt_lengths)

    @classmethod
    def build(cls, ids: NDArray[np.int32], offsets: NDArray[np.int64], prompt_lengths: NDArray[np.int32]) -> Corpus:
        """A corpus from its three arrays."""
        response_offsets = np.concatenate([[0], np.cumsum(np.diff(offsets) - prompt_lengths)]).astype(np.int64)
        return cls(ids, offsets, prompt_lengths, response_offsets)

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def document(self, index: int) -> tuple[NDArray[np.int32], int]:
        """Token ids of one document, and its prompt length."""
        ids = np.asarray(self.ids[self.offsets[index] : self.offsets[index + 1]])
        return ids, int(self.prompt_lengths[index])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(documents,) tokens of each document."""
        return np.diff(self.offsets)

    @property
    def response_lengths(self) -> NDArray[np.int64]:
        """(documents,) response tokens of each document, EOS included where there is one."""
        return np.diff(self.response_offsets)

    @property
    def response_ids(self) -> NDArray[np.int32]:
        """(response tokens,) token ids of all responses, by their global index."""
        starts = np.repeat(self.offsets[:-1] + self.prompt_lengths, self.lengths)
        return np.asarray(self.ids)[np.arange(len(self.ids)) >= starts]

    @property
    def response_tokens(self) -> int:
        """Response tokens of the split."""
        return int(self.response_offsets[-1])


@dataclass(frozen=True)
class Document:
    """One tokenised document beside its text."""

    prompt_ids: Sequence[int]
    """Template and request."""
    response_ids: Sequence[int]
    """Response, EOS included unless it was cut."""
    text: dict[str, Any]
    """Its line of the jsonl file: id, prompt, response, user, cut, and references where there are several."""


def write_split(folder: Path, split: str, documents: Sequence[Document]) -> None:
    """Write ``{split}.{ids,offsets,prompt_lengths}.npy`` and ``{split}.jsonl``."""
    lengths = [len(document.prompt_ids) + len(document.response_ids) for document in documents]
    flat = [token for document in documents for ids in (document.prompt_ids, document.response_ids) for token in ids]
    arrays: dict[str, NDArray[Any]] = {
        "ids": np.asarray(flat, dtype=np.int32),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "prompt_lengths": np.asarray([len(document.prompt_ids) for document in documents], dtype=np.int32),
    }
    for name, array in arrays.items():
        with replacing(folder / f"{split}.{name}.npy") as temporary, temporary.open("wb") as stream:
            np.save(stream, array)
    with replacing(folder / f"{split}.jsonl") as temporary, temporary.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(document.text, ensure_ascii=False) + "\n" for document in documents)


def read_texts(folder: str | Path, split: str) -> list[dict[str, Any]]:
    """The lines of ``{split}.jsonl``, in the order of the corpus' documents."""
    # JSON lines end at "\n" alone; str.splitlines would also cut at U+2028 inside a string.
    lines = (Path(folder) / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]

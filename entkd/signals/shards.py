"""Which documents lie in which file of a signal store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entkd.config import Signals
from entkd.data import Corpus
from entkd.runtime import numpy_stream
from entkd.signals.files import read_header
from entkd.signals.split import logprobs_file


@dataclass(frozen=True)
class Shard:
    """A file of the store: some documents of a split."""

    split: str
    index: int
    documents: NDArray[np.int64]
    """Ascending document indices."""
    calibration: bool
    """Whether the difficulty is fitted on these documents."""

    @property
    def file(self) -> str:
        """Name in the store's folder."""
        return f"{self.split}-{self.index:05d}.safetensors"

    def header(self, key: str) -> dict[str, Any]:
        """What its files say of themselves, in a store of this key."""
        return {"key": key, "split": self.split, "index": self.index}

    def is_whole(self, folder: Path, key: str, keep_logprobs: bool) -> bool:
        """Whether it is there. Files get their final name when they are complete, and say what they are."""
        names = [self.file, self.logprobs_file] if keep_logprobs else [self.file]
        headers = [read_header(folder / name) for name in names]
        return all(header is not None and self.header(key).items() <= header.items() for header in headers)

    @property
    def logprobs_file(self) -> str:
        """Name of the file of its log-probabilities, where they are kept."""
        return logprobs_file(self.file)


def plan_shards(settings: Signals, splits: list[str], data: Path) -> list[Shard]:
    """All shards: the calibration documents' first, then each split's in the order of its documents.

    Calibration documents are drawn without replacement until they have ``calibration_tokens`` response tokens.
    """
    shards = []
    for split in splits:
        lengths = Corpus.open(data, split).response_lengths
        order = numpy_stream(0, "calibration").permutation(len(lengths))
        count = int(np.searchsorted(np.cumsum(lengths[order]), settings.calibration_tokens)) + 1
        chosen = np.sort(order[:count] if split == "train" else order[:0])
        rest = np.setdiff1d(np.arange(len(lengths)), chosen)
        index = 0
        for documents, calibration in ((chosen, True), (rest, False)):
            # A shard ends with the document in which the running count passes a multiple of shard_tokens.
            before = np.cumsum(lengths[documents]) - lengths[documents]
            cuts = np.flatnonzero(np.diff(before // settings.shard_tokens)) + 1
            for part in np.split(documents, cuts) if len(documents) else ():
                shards.append(Shard(split, index, part, calibration))
                index += 1
    return sorted(shards, key=lambda shard: not shard.calibration)

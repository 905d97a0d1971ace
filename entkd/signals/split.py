"""What a signal store says of one split, addressed by the global response-token index, never by shard or row.

Shape suffixes: R response tokens of a split, N tokens asked for, E teacher width, U tokens of the vocabulary, K slots
of a sparse target.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from entkd.errors import UserError
from entkd.signals.files import RowReader
from entkd.sparse import SparseTarget, unpack_mass
from entkd.workspace import buffer

if TYPE_CHECKING:
    from entkd.signals.store import SignalStore

SPARSE_SPLIT = "train"
"""The split of which mode sparse keeps sparse targets. Of others it keeps hidden states: scores compare with the exact
distribution, and test splits are small."""


class SplitSignals:
    """The signals of all response tokens of one split."""

    def __init__(self, store: SignalStore, name: str) -> None:
        self.name = name
        self._store = store
        entry = store.manifest["splits"][name]
        self._files = [safe_open(store.folder / shard, "pt") for shard in entry["shards"]]
        self.is_sparse = store.mode == "sparse" and name == SPARSE_SPLIT
        """Whether sparse targets are stored, and no hidden states."""
        if store.mode == "logprobs":
            self._logprobs = [RowReader(store.folder / logprobs_file(shard), "logprobs") for shard in entry["shards"]]
        self._tensors: dict[tuple[int, str], Tensor] = {}
        lengths = np.zeros(entry["documents"], dtype=np.int64)
        self._shard_of_document = np.full(len(lengths), -1, dtype=np.int64)
        self._row_of_document = np.zeros(len(lengths), dtype=np.int64)
        documents = [self._tensor(index, "documents").numpy() for index in range(len(self._files))]
        for index, own in enumerate(documents):
            own_lengths = self._tensor(index, "response_lengths").numpy()
            lengths[own] = own_lengths
            self._shard_of_document[own] = index
            self._row_of_document[own] = np.cumsum(own_lengths) - own_lengths
        self.response_offsets: NDArray[np.int64] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        """(documents + 1,) global index of each document's first response token."""
        self._tokens_of_shard = [response_tokens(self.response_offsets, own) for own in documents]

    def __len__(self) -> int:
        return int(self.response_offsets[-1])

    @cached_property
    def entropy_R(self) -> Tensor:
        """(R,) fp32 entropy of the teacher's distribution at T = 1, nats."""
        return self._statistic("entropy")

    @cached_property
    def logsumexp_R(self) -> Tensor:
        """(R,) fp32 logsumexp of the teacher's logits."""
        return self._statistic("logsumexp")

    @cached_property
    def target_logprob_R(self) -> Tensor:
        """(R,) fp32 log-probability of the data's own token, nats."""
        return self._statistic("target_logprob")

    def hidden(self, tokens_N: Tensor | NDArray[np.int64]) -> Tensor:
        """(N, E) bf16 last hidden states of the tokens with these global indices, in any order, with repeats.

        Raises
        ------
        IndexError
            If an index is outside the split.
        UserError
            If sparse targets are stored instead.
        """
        if self.is_sparse:
            raise self._refusal("hidden states", "hidden")
        shard_N, row_N = self._locate(tokens_N)
        gathered_NE = torch.empty(len(shard_N), self._store.width, dtype=torch.bfloat16)
        return self._gather("hidden", shard_N, row_N, gathered_NE)

    def logprobs(self, tokens_N: Tensor | NDArray[np.int64]) -> Tensor:
        """(N, U) fp16 log-probabilities at T = 1 of the tokens with these global indices, in nats.

        In a buffer that is valid until the next call. Raises IndexError if an index is outside the split, UserError if
        no log-probabilities are stored.
        """
        if self._store.mode != "logprobs":
            raise self._refusal("log-probabilities", "logprobs")
        shard_N, row_N = self._locate(tokens_N)
        shape = (len(shard_N), self._store.vocab_size)
        gathered_NU = buffer("stored log-probabilities", shape, torch.float16, torch.device("cpu"))
        # The response of a document is consecutive rows of one shard.
        breaks = np.flatnonzero((np.diff(shard_N) != 0) | (np.diff(row_N) != 1)) + 1
        for run in np.split(np.arange(len(shard_N)), breaks):
            if len(run):
                self._logprobs[int(shard_N[run[0]])].read(int(row_N[run[0]]), gathered_NU[run[0] : run[-1] + 1])
        return gathered_NU

    def sparse(self, tokens_N: Tensor | NDArray[np.int64]) -> SparseTarget:
        """Sparse targets of the tokens with these global indices, in any order, with repeats.

        Raises IndexError if an index is outside the split, UserError if no sparse targets are stored.
        """
        if not self.is_sparse:
            raise self._refusal("sparse targets", "sparse")
        shard_N, row_N = self._locate(tokens_N)
        shape = (len(shard_N), self._store.slots)
        ids_NK = self._gather("sparse_ids", shard_N, row_N, torch.empty(shape, dtype=torch.int32))
        mass_NK = self._gather("sparse_mass", shard_N, row_N, torch.empty(shape, dtype=torch.float16))
        return SparseTarget(ids_NK, unpack_mass(mass_NK), self.entropy_R[torch.as_tensor(tokens_N)])

    def has_features(self, tokens_N: Tensor | NDArray[np.int64]) -> Tensor:
        """(N,) bool: whether the feature-layer states of these tokens are stored."""
        self._locate(tokens_N)
        return torch.from_numpy(self._feature_row_R[np.asarray(tokens_N)] >= 0)

    def features(self, tokens_N: Tensor | NDArray[np.int64], layer: int) -> Tensor:
        """(N, E) bf16 outputs of the teacher's 0-based ``layer``, before the final norm.

        Raises
        ------
        UserError
            If the layer, or a token's features, are not in the store.
        """
        if layer not in self._store.feature_layers:
            raise UserError(
                f"{self._store.folder}: no states of teacher layer {layer}; stored are {self._store.feature_layers}"
            )
        shard_N, _ = self._locate(tokens_N)
        row_N = self._feature_row_R[np.asarray(tokens_N)]
        missing = int((row_N < 0).sum())
        if missing:
            features = self._store.manifest["content"]["needs"]["features"]
            raise UserError(
                f"{self._store.folder}: {missing} of {len(row_N)} tokens asked for have no features; the store has "
                f"those of tokens: {features['tokens']}, threshold: {features['threshold']}, in split train; "
                "write one with the features that the method needs"
            )
        gathered_NE = torch.empty(len(shard_N), self._store.width, dtype=torch.bfloat16)
        return self._gather(f"feature_{layer}", shard_N, row_N, gathered_NE)

    def _refusal(self, what: str, mode: str) -> UserError:
        kept = f"split {self.name} of mode {self._store.mode}"
        if mode == "sparse" and self._store.mode == "sparse":
            return UserError(f"{self._store.folder}: no {what} of {kept}; only split {SPARSE_SPLIT} has them")
        return UserError(f"{self._store.folder}: no {what} in {kept}; set `signals.mode: {mode}`")

    @cached_property
    def _feature_row_R(self) -> NDArray[np.int64]:
        """(R,) row in the shard's feature tensors; −1 where there are no features."""
        row_R = np.full(len(self), -1, dtype=np.int64)
        for index, tokens in enumerate(self._tokens_of_shard):
            rows = self._tensor(index, "feature_rows").numpy()
            row_R[tokens[rows]] = np.arange(len(rows))
        return row_R

    def _locate(self, tokens_N: Tensor | NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shard of each token, and its row there."""
        tokens = np.asarray(tokens_N, dtype=np.int64)
        if tokens.size and (tokens.min() < 0 or tokens.max() >= len(self)):
            raise IndexError(
                f"split {self.name} has {len(self)} response tokens; asked for {tokens.min()} to {tokens.max()}"
            )
        document_N = np.searchsorted(self.response_offsets, tokens, side="right") - 1
        row_N = self._row_of_document[document_N] + tokens - self.response_offsets[document_N]
        return self._shard_of_document[document_N], row_N

    def _gather(self, name: str, shard_N: NDArray[np.int64], row_N: NDArray[np.int64], out: Tensor) -> Tensor:
        for index in np.unique(shard_N).tolist():
            mine = np.flatnonzero(shard_N == index)
            rows = torch.from_numpy(row_N[mine])
            if len(mine) == len(out):  # all from one shard, as in most steps: no copy in between
                torch.index_select(self._tensor(index, name), 0, rows, out=out)
            else:
                out[torch.from_numpy(mine)] = self._tensor(index, name)[rows]
        return out

    def _statistic(self, name: str) -> Tensor:
        statistic_R = torch.empty(len(self), dtype=torch.float32)
        for index, tokens in enumerate(self._tokens_of_shard):
            statistic_R[torch.from_numpy(tokens)] = self._tensor(index, name)
        return statistic_R

    def _tensor(self, index: int, name: str) -> Tensor:
        """One tensor of one shard. It is mapped, not read: only the rows that are touched come into memory."""
        if (index, name) not in self._tensors:
            self._tensors[index, name] = self._files[index].get_tensor(name)  # type: ignore[no-untyped-call]
        return self._tensors[index, name]


def logprobs_file(shard: str) -> str:
    """The file of the log-probabilities that belong to a shard's file."""
    return f"logprobs-{shard}"


def response_tokens(response_offsets: NDArray[np.int64], documents: NDArray[np.int64]) -> NDArray[np.int64]:
    """Global response-token indices of some documents, in the order of the documents."""
    lengths = np.diff(response_offsets)[documents]
    starts = np.repeat(response_offsets[documents] - (np.cumsum(lengths) - lengths), lengths)
    return starts + np.arange(int(lengths.sum()))

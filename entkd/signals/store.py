"""Reader of the teacher signals, memory-mapped but for the log-probabilities.

A store is a folder of safetensors files and a ``manifest.json``: ``head`` (the teacher's output projection),
``calibration`` (the state of the difficulty), and shards ``{split}-{index}`` that hold some documents each:
``documents`` and ``response_lengths`` (int64), and in the order of these documents, one row per response token,
``entropy``, ``logsumexp``, ``target_logprob`` (fp32, nats) and ``hidden`` (bf16); ``feature_rows`` (int64 rows of
the shard that have features) and ``feature_{layer}`` (bf16). In mode ``logprobs`` each shard has a second file with
``logprobs`` (fp16, all tokens of the vocabulary).

Readers address everything by the global response-token index of the split, never by shard or row. Shape suffixes:
R response tokens of a split, N tokens asked for, E teacher width, U tokens of the vocabulary.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from entkd.entropy import Difficulty, Scale
from entkd.errors import UserError
from entkd.signals.content import FORMAT
from entkd.signals.files import RowReader
from entkd.workspace import buffer

STATISTICS = ("entropy", "logsumexp", "target_logprob")


class SignalStore:
    """The signals of one teacher on one data set. Use `SignalStore.open`."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.vocab_size: int = manifest["vocab_size"]
        """Tokens of the tokenizer, and rows of the head."""
        self.width: int = manifest["width"]
        """E, the teacher's hidden width."""
        self.feature_layers: tuple[int, ...] = tuple(manifest["feature_layers"])
        """0-based teacher layers whose states are stored, shallow to deep; empty if none are."""
        self.has_inf_logits: bool = manifest["has_inf_logits"]
        """Whether a teacher logit is −inf: KL(q‖p) is infinite then, and an arm that contains it cannot be trained."""
        self.has_logprobs: bool = manifest["content"]["settings"]["mode"] == "logprobs"
        """Whether log-probabilities are stored, so that nobody has to project hidden states."""
        self._splits: dict[str, SplitSignals] = {}

    @classmethod
    def open(cls, manifest_path: str | Path) -> SignalStore:
        """The store that the ``manifest.json`` of a signals stage points to.

        Raises
        ------
        UserError
            If the manifest or the store is missing, of another format, or not the one that the manifest names.
        """
        path = Path(manifest_path)
        if not path.is_file():
            raise UserError(f"{path}: no such manifest; run `entkd signals` first")
        pointer = json.loads(path.read_text(encoding="utf-8"))
        folder = path.parent / pointer["store"]
        if not (folder / "manifest.json").is_file():
            raise UserError(
                f"{path}: points to {folder}, where no finished store is; delete {path} and run `entkd signals`"
            )
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if (manifest["format"], manifest["key"]) != (FORMAT, pointer["key"]):
            raise UserError(
                f"{folder}: holds format {manifest['format']}, key {manifest['key'][:16]}; {path} needs format "
                f"{FORMAT}, key {pointer['key'][:16]}; delete both and run `entkd signals`"
            )
        return cls(folder, manifest)

    @cached_property
    def head_UE(self) -> Tensor:
        """(U, E) the teacher's output projection in its own type, memory-mapped. Do not write to it."""
        return load_file(self.folder / "head.safetensors")["weight"]

    def difficulty(self, scale: Scale = "rank") -> Difficulty:
        """Entropy → difficulty on a scale, fitted on the calibration documents."""
        state = load_file(self.folder / "calibration.safetensors")
        return Difficulty.from_state(state, scale=scale, vocab_size=self.vocab_size)

    def split(self, name: str) -> SplitSignals:
        """The signals of one split; raises UserError where the store has none of it."""
        if name not in self.manifest["splits"]:
            raise UserError(
                f"{self.folder}: has no signals of split {name!r}; it has {sorted(self.manifest['splits'])}"
            )
        if name not in self._splits:
            self._splits[name] = SplitSignals(self, name)
        return self._splits[name]


class SplitSignals:
    """The signals of all response tokens of one split."""

    def __init__(self, store: SignalStore, name: str) -> None:
        self.name = name
        self._store = store
        entry = store.manifest["splits"][name]
        self._files = [safe_open(store.folder / shard, "pt") for shard in entry["shards"]]
        if store.has_logprobs:
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
        """
        shard_N, row_N = self._locate(tokens_N)
        gathered_NE = torch.empty(len(shard_N), self._store.width, dtype=torch.bfloat16)
        return self._gather("hidden", shard_N, row_N, gathered_NE)

    def logprobs(self, tokens_N: Tensor | NDArray[np.int64]) -> Tensor:
        """(N, U) fp16 log-probabilities at T = 1 of the tokens with these global indices, in nats.

        In a buffer that is valid until the next call. Raises IndexError if an index is outside the split.
        """
        shard_N, row_N = self._locate(tokens_N)
        shape = (len(shard_N), self._store.vocab_size)
        gathered_NU = buffer("stored log-probabilities", shape, torch.float16, torch.device("cpu"))
        # The response of a document is consecutive rows of one shard.
        breaks = np.flatnonzero((np.diff(shard_N) != 0) | (np.diff(row_N) != 1)) + 1
        for run in np.split(np.arange(len(shard_N)), breaks):
            if len(run):
                self._logprobs[int(shard_N[run[0]])].read(int(row_N[run[0]]), gathered_NU[run[0] : run[-1] + 1])
        return gathered_NU

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

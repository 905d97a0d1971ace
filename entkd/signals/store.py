"""Reader of the teacher signals, memory-mapped but for the log-probabilities.

A store is a folder of safetensors files and a ``manifest.json``: ``head`` (the teacher's output projection),
``calibration`` (the state of the difficulty), and shards ``{split}-{index}`` that hold some documents each:
``documents`` and ``response_lengths`` (int64), and in the order of these documents, one row per response token,
``entropy``, ``logsumexp``, ``target_logprob`` (fp32, nats) and ``hidden`` (bf16); ``feature_rows`` (int64 rows of
the shard that have features) and ``feature_{layer}`` (bf16). In mode ``logprobs`` each shard has a second file with
``logprobs`` (fp16, all tokens of the vocabulary). In mode ``sparse`` the shards of the training split hold
``sparse_ids`` (int32) and ``sparse_mass`` (fp16) instead of ``hidden``, see ``entkd.sparse``.

Shape suffixes: E teacher width, U tokens of the vocabulary.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from entkd.entropy import Difficulty, Scale
from entkd.errors import UserError
from entkd.signals.content import FORMAT
from entkd.signals.split import SplitSignals

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
        settings = manifest["content"]["settings"]
        self.mode: str = settings["mode"]
        """What is stored of the distributions: ``hidden``, ``logprobs`` (with ``hidden``) or ``sparse``."""
        self.slots: int = settings["sparse"]["top_k"] + settings["sparse"]["samples"] if self.mode == "sparse" else 0
        """K, slots of a sparse target."""
        self.has_logprobs: bool = self.mode == "logprobs"
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

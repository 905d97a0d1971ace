"""What a signal store is made of, and the key that names it: equal content gives the same store."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from entkd.config import Signals, canonical_json
from entkd.errors import UserError
from entkd.files import file_sha256
from entkd.models import layer_points
from entkd.models.access import model_folder

FORMAT = 1
"""Version of the files. Bumped when their meaning changes, so that no older store is taken for a new one."""

CORPUS_FILES = ("ids", "offsets", "prompt_lengths")
"""The arrays of a split that decide which token stands where."""


def describe_content(
    settings: Signals, needs: dict[str, Any], teacher: Path, data: Path, dtype: torch.dtype
) -> dict[str, Any]:
    """Everything that the stored numbers depend on, as JSON.

    Parameters
    ----------
    settings
        What is stored and in which portions.
    needs
        ``{"features": null | {"points", "tokens": "hard" | "all", "threshold"}, "splits": [...]}``.
    teacher, data
        Folders of the prepared teacher and of the prepared data.
    dtype
        Precision of the teacher's trunk.

    Raises
    ------
    UserError
        If a manifest is missing, the data lack a split, or another tokenizer than the teacher's made them, or a sparse
        target would have more slots than the vocabulary has tokens.
    """
    teacher_manifest = _manifest(teacher, "entkd prepare-teacher")
    data_manifest = _manifest(data, "entkd prepare-data")
    tokenizer = file_sha256(model_folder(teacher) / "tokenizer.json")
    if tokenizer != data_manifest["tokenizer"]:
        raise UserError(
            f"{data}: tokenised by another tokenizer (tokenizer.json {data_manifest['tokenizer'][:12]}) than that of "
            f"the teacher {teacher} ({tokenizer[:12]}), so its token ids mean other tokens; prepare the data with this "
            "teacher"
        )
    if "train" not in needs["splits"]:
        raise UserError(
            f"needs.splits is {needs['splits']}; `train` must be in it, because difficulty is calibrated there"
        )
    for split in needs["splits"]:
        if split not in data_manifest["splits"]:
            raise UserError(f"{data}: has no split {split!r}; it has {sorted(data_manifest['splits'])}")
    sparse, vocab_size = settings.sparse, data_manifest["vocab_size"]
    if sparse is not None and sparse.top_k + sparse.samples > vocab_size:
        raise UserError(
            f"signals.sparse: top_k {sparse.top_k} and samples {sparse.samples} are together more than the vocabulary "
            f"of {vocab_size} tokens; make them smaller, or set `signals.mode: logprobs`, which keeps all"
        )
    return {
        "format": FORMAT,
        "teacher": teacher_manifest["sha256"],
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "corpus": {
            f"{split}.{name}": data_manifest["files"][f"{split}.{name}.npy"]
            for split in needs["splits"]
            for name in CORPUS_FILES
        },
        "settings": settings.model_dump(mode="json"),
        "needs": needs,
        "precision": str(dtype).removeprefix("torch."),
    }


def content_key(content: dict[str, Any]) -> str:
    """SHA-256 over the content; the store's folder is its first 16 digits."""
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def feature_layers(needs: dict[str, Any], n_layers: int) -> tuple[int, ...]:
    """Teacher layers whose hidden states are stored; empty where no arm needs any."""
    features = needs["features"]
    return () if features is None else layer_points(n_layers, features["points"])


def _manifest(folder: Path, stage: str) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.is_file():
        raise UserError(f"{path}: not found, so this folder is not finished; run `{stage}` first")
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return manifest

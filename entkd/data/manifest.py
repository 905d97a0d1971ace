"""The data folder's manifest, written last: a folder with one is finished."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from entkd.data.corpus import Document


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(
    folder: Path,
    settings: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_folder: Path,
    splits: Mapping[str, Sequence[Document]],
    dropped: Mapping[str, Mapping[str, int]],
) -> dict[str, Any]:
    """Describe a written data folder and return the manifest.

    Parameters
    ----------
    tokenizer_folder
        Where the tokenizer was read from; its ``tokenizer.json`` is identified by hash.
    dropped
        Split → reason → number of rows that were left out.
    """
    manifest = {
        "settings": dict(settings),
        "tokenizer": file_sha256(tokenizer_folder / "tokenizer.json"),
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "splits": {
            split: _summary(documents) | {"dropped": dict(dropped.get(split, {}))}
            for split, documents in splits.items()
        },
        "files": {
            path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.suffix in (".npy", ".jsonl")
        },
    }
    partial = folder / ".manifest.json.partial"
    partial.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, folder / "manifest.json")
    return manifest


def _summary(documents: Sequence[Document]) -> dict[str, Any]:
    responses = [len(document.response_ids) for document in documents]
    cut = sum(bool(document.text["cut"]) for document in documents)
    return {
        "documents": len(documents),
        "tokens": sum(responses) + sum(len(document.prompt_ids) for document in documents),
        "response_tokens": sum(responses),
        "cut_share": cut / len(documents),
    }

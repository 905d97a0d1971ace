"""The data folder's manifest, written last: a folder with one is finished."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from entkd.data.corpus import Document


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def summarise(documents: Sequence[Document], dropped: Mapping[str, int]) -> dict[str, Any]:
    """One split in numbers; ``dropped`` counts the rows left out, by reason."""
    responses = sum(len(document.response_ids) for document in documents)
    cut = sum(bool(document.text["cut"]) for document in documents)
    return {
        "documents": len(documents),
        "tokens": responses + sum(len(document.prompt_ids) for document in documents),
        "response_tokens": responses,
        "cut_share": cut / len(documents),
        "dropped": dict(dropped),
    }


def write_manifest(
    folder: Path,
    settings: Mapping[str, Any],
    tokenizer_folder: Path,
    *,
    vocab_size: int,
    eos_token_id: int,
    splits: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Describe the finished arrays and texts in ``folder`` and return the manifest.

    Parameters
    ----------
    tokenizer_folder
        Where the tokenizer was read from; its ``tokenizer.json`` is identified by hash.
    vocab_size
        Tokens of the tokenizer.
    eos_token_id
        The token that ends a response.
    splits
        Split → `summarise`.
    """
    manifest = {
        "settings": dict(settings),
        "tokenizer": file_sha256(tokenizer_folder / "tokenizer.json"),
        "vocab_size": vocab_size,
        "eos_token_id": eos_token_id,
        "splits": {split: dict(summary) for split, summary in splits.items()},
        "files": {
            path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.suffix in (".npy", ".jsonl")
        },
    }
    partial = folder / ".manifest.json.partial"
    partial.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, folder / "manifest.json")
    return manifest

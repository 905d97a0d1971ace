"""The data folder's manifest, written last: a folder with one is finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from entkd.data.corpus import Document
from entkd.files import file_sha256, write_json


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
    write_json(folder / "manifest.json", manifest)
    return manifest

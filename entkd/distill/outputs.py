"""What a run leaves behind: model, metrics, record. Written last and whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entkd.files import replacing, write_json
from entkd.models import save_model, weights_sha256


def finished(output: Path, identity: str) -> bool:
    """Whether the folder holds the complete outputs of this very run.

    Snakemake removes a job's old outputs before it starts the job, so outputs found here were written since, by a
    process that a killed workflow left behind.
    """
    record = output / "run.json"
    if not record.exists():
        return False
    return bool(json.loads(record.read_text(encoding="utf-8"))["identity"] == identity)


def write_metrics(path: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object a line, replaced atomically."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, sort_keys=True) + "\n" for row in rows)


def write_outputs(
    output: Path,
    kept: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None,
    save_dtype: str,
    metrics: list[dict[str, Any]],
    record: dict[str, Any],
) -> None:
    """Write ``model/`` where the model is kept, ``metrics.jsonl`` and, last, ``run.json``."""
    if kept is not None:
        model, tokenizer = kept
        save_model(model.to(getattr(torch, save_dtype)), tokenizer, output / "model")
        record = record | {"weights_sha256": weights_sha256(output / "model")}
    write_metrics(output / "metrics.jsonl", metrics)
    write_json(output / "run.json", record)

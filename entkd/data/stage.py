"""The stage `entkd prepare-data`: any source to tokenised splits."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from entkd.config import HubData, JsonData, SyntheticData
from entkd.data.corpus import SPLITS, Document, write_split
from entkd.data.manifest import summarise, write_manifest
from entkd.data.sources import Row, read_rows
from entkd.data.synthetic import synthetic_documents
from entkd.data.templates import Formatter
from entkd.errors import UserError
from entkd.models import load_tokenizer, model_folder
from entkd.rows import RowData
from entkd.runtime import numpy_stream


def prepare(
    settings: SyntheticData | JsonData | HubData, teacher: str | Path, output: str | Path, precision: str = "auto"
) -> dict[str, Any]:
    """Write the splits' arrays and texts, then ``manifest.json``; returns the manifest.

    ``precision`` (``auto``, ``bf16``, ``fp32``) is that of a teacher that writes the data; others do not use it.

    Raises
    ------
    UserError
        If the source is missing, empty or malformed, or a split ends up empty.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "manifest.json").unlink(missing_ok=True)  # a rewrite that is interrupted must not look finished
    formatter = Formatter(load_tokenizer(teacher), settings.template, settings.max_tokens)
    if isinstance(settings, SyntheticData):
        splits, dropped = synthetic_documents(settings, formatter, teacher, precision)
    else:
        splits, dropped = _row_documents(settings, formatter)
    for split in SPLITS:
        if not splits[split]:
            raise UserError(f"data: split {split} has no documents left (dropped: {dropped.get(split, {})})")
        write_split(output, split, splits[split])
    summary = {split: summarise(splits[split], dropped.get(split, {})) for split in SPLITS}
    return write_manifest(
        output,
        settings.model_dump(mode="json"),
        model_folder(teacher),
        vocab_size=len(formatter.tokenizer),
        eos_token_id=formatter.end_of_response,
        splits=summary,
    )


def _row_documents(
    settings: RowData, formatter: Formatter
) -> tuple[dict[str, list[Document]], dict[str, dict[str, int]]]:
    dropped: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    rows = separate_splits(read_rows(settings), settings, dropped)
    splits: dict[str, list[Document]] = {}
    for split in SPLITS:
        splits[split] = []
        for row in rows[split]:
            try:
                document = formatter.document(row.identifier, row.messages, row.references)
            except ValueError as error:
                raise UserError(f"{row.where}: {error}") from error
            if document is None:
                dropped[split]["prompt_too_long"] += 1
            else:
                splits[split].append(document)
    return splits, {split: dict(counts) for split, counts in dropped.items()}


def separate_splits(
    rows: dict[str, list[Row]], settings: RowData, dropped: dict[str, Counter[str]]
) -> dict[str, list[Row]]:
    """All three splits, without a prompt in common.

    Dev and test are taken from train, at random, where the source has none. A prompt that is also in test is
    removed from train and dev, one that is also in dev from train; ``dropped`` counts them.
    """
    splits = dict(rows)
    order = numpy_stream(settings.seed, "split").permutation(len(splits["train"])).tolist()
    for split in ("test", "dev"):
        if split not in splits:
            count = getattr(settings, split)
            if count >= len(order):
                raise UserError(
                    f"data.{split}: {count} rows of {split} cannot be taken from train, which has "
                    f"{len(order)} left; lower data.{split}, or name a {split} split"
                )
            chosen, order = order[:count], order[count:]
            splits[split] = [rows["train"][index] for index in sorted(chosen)]
    splits["train"] = [rows["train"][index] for index in sorted(order)]
    splits = {split: splits[split][: settings.limit] for split in SPLITS}
    taken: set[str] = set()
    for split, above in (("test", None), ("dev", "test"), ("train", "dev or test")):
        kept = [row for row in splits[split] if _prompt_key(row.messages) not in taken]
        if above is not None and len(kept) < len(splits[split]):
            dropped[split][f"prompt in {above}"] = len(splits[split]) - len(kept)
        splits[split] = kept
        taken |= {_prompt_key(row.messages) for row in kept}
    return splits


def _prompt_key(messages: Sequence[Any]) -> str:
    return json.dumps([[message["role"], message["content"].strip()] for message in messages])

"""Rows of a hub dataset or of local files: prompt turns and reference responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entkd.config import HubData, JsonData
from entkd.errors import UserError
from entkd.rows import Messages, RowData, check_records, parse_row, read_file


@dataclass(frozen=True)
class Row:
    """One example before templating and tokenisation."""

    identifier: str
    """Split of the source and row number, counted from 1."""
    messages: Messages
    """The turns before the response."""
    references: Sequence[str]
    """Acceptable responses, the one to train on first."""
    where: str
    """File or dataset and row, for error messages."""


def read_rows(settings: RowData) -> dict[str, list[Row]]:
    """The rows of every split that the settings name.

    Raises
    ------
    UserError
        If a file or dataset is missing, empty or malformed, a column is unknown, or a row lacks its prompt or
        response.
    """
    splits: dict[str, list[Row]] = {}
    names: Mapping[Any, Any] = settings.files if isinstance(settings, JsonData) else settings.splits
    for split, name in names.items():
        if isinstance(settings, JsonData):
            what, records = str(name), read_file(Path(name))
        else:
            what, records = f"{settings.repo} split {name}", _read_hub(settings, name)
        check_records(settings, records, what)
        splits[split] = [
            Row(f"{split}-{number}", *parse_row(settings, record, f"{what}: row {number}"), f"{what}: row {number}")
            for number, record in enumerate(records, start=1)
        ]
    return splits


def _read_hub(settings: HubData, split: str) -> list[dict[str, Any]]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(settings.repo, settings.config, split=split, revision=settings.revision)
    except (ValueError, OSError, RuntimeError) as error:  # unknown config or split; unknown repository, no network
        raise UserError(
            f"data.repo {settings.repo} ({settings.config}, {split}, {settings.revision}): {error}"
        ) from error
    return [dict(record) for record in dataset]

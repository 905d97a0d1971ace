"""Rows of a hub dataset or of local files: prompt turns and reference responses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entkd.config import HubData, JsonData
from entkd.config.errors import unknown_name
from entkd.data.templates import Messages
from entkd.errors import UserError

RowData = HubData | JsonData
"""Settings of the sources that are read row by row."""


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
            what, records = str(name), _read_file(Path(name))
        else:
            what, records = f"{settings.repo} split {name}", _read_hub(settings, name)
        if not records:
            raise UserError(f"{what}: no rows; an empty dataset cannot be used")
        _check_columns(settings, records, what)
        splits[split] = [
            Row(f"{split}-{number}", *_parse(settings, record, f"{what}: row {number}"), f"{what}: row {number}")
            for number, record in enumerate(records, start=1)
        ]
    return splits


def _read_file(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"data.files: {path} does not exist")
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{path}: not a parquet file: {error}") from error
        rows: list[dict[str, Any]] = table.to_pylist()
        return rows
    if path.suffix == ".json":
        records = _parse_json(path.read_text(encoding="utf-8"), str(path))
    elif path.suffix == ".jsonl":
        lines = path.read_text(encoding="utf-8").split("\n")
        records = [_parse_json(line, f"{path}: line {n}") for n, line in enumerate(lines, start=1) if line.strip()]
    else:
        raise UserError(f"data.files: {path} ends in `{path.suffix}`; known: .json, .jsonl, .parquet")
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{path}: expected JSON objects, one for each row (a list of them in a .json file)")
    return records


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error}") from error


def _read_hub(settings: HubData, split: str) -> list[dict[str, Any]]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(settings.repo, settings.config, split=split, revision=settings.revision)
    except (ValueError, OSError, RuntimeError) as error:  # unknown config or split; unknown repository, no network
        raise UserError(
            f"data.repo {settings.repo} ({settings.config}, {split}, {settings.revision}): {error}"
        ) from error
    return [dict(record) for record in dataset]


def _check_columns(settings: RowData, records: Sequence[Mapping[str, Any]], what: str) -> None:
    columns = {column for record in records for column in record}
    keys = ("messages",) if settings.messages is not None else ("prompt", "response")
    for key in keys:
        column = getattr(settings, key)
        if column not in columns:
            raise UserError(f"{what}: " + unknown_name(f"data.{key}", column, columns))


def _parse(settings: RowData, record: Mapping[str, Any], where: str) -> tuple[Messages, list[str]]:
    if settings.messages is not None:
        return _parse_messages(record.get(settings.messages), settings.messages, where)
    prompt, response = record.get(settings.prompt), record.get(settings.response)
    references = response if isinstance(response, list) else [response]
    for column, values, problem in (
        (settings.prompt, [prompt], "row without prompt"),
        (settings.response, references, "prompt without response"),
    ):
        if not values or any(value is None or (isinstance(value, str) and not value.strip()) for value in values):
            raise UserError(f"{where}: {problem}: column `{column}` is empty; fill it or remove the row")
        for value in values:
            if not isinstance(value, str):
                raise UserError(f"{where}: column `{column}` holds {type(value).__name__}, expected text")
    return [{"role": "user", "content": str(prompt)}], [str(reference) for reference in references]


def _parse_messages(turns: Any, column: str, where: str) -> tuple[Messages, list[str]]:
    """The turns before the last assistant turn, and that turn; what follows it is no part of the example."""
    if not turns:
        raise UserError(f"{where}: column `{column}` is empty; fill it or remove the row")
    for turn in turns:
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise UserError(f"{where}: column `{column}` needs turns with text `role` and `content`: {turn!r}")
    last = max((index for index, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
    if last is None or not turns[last]["content"].strip():
        raise UserError(f"{where}: prompt without response: column `{column}` has no filled assistant turn")
    before = [{"role": turn["role"], "content": turn["content"]} for turn in turns[:last]]
    if not any(turn["role"] == "user" and turn["content"].strip() for turn in before):
        raise UserError(f"{where}: row without prompt: column `{column}` has no filled user turn before the response")
    return before, [turns[last]["content"]]

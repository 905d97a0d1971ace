"""Rows of local files and of datasets: read and checked without torch, so that an experiment can be refused early."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from entkd.config.errors import unknown_name
from entkd.config.stages import HubData, JsonData
from entkd.errors import UserError

Messages = list[dict[str, str]]
"""Chat turns, each with ``role`` and ``content``."""
RowData = HubData | JsonData
"""Settings of the sources that are read row by row."""
_CHECKED_BYTES = 16 * 2**20
"""How much of a file `check_file` reads: every call of Snakemake checks it again, and this much takes a fifth of a
second. What lies behind it is checked by the job that reads the whole file."""


def check_file(settings: JsonData, path: Path) -> None:
    """Refuse a data file whose beginning shows that it cannot be used.

    Raises
    ------
    UserError
        If the file is empty or malformed, lacks a column, or a row lacks its prompt or response. Of parquet files only
        the columns and the number of rows are looked at.
    """
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            file = pyarrow.parquet.ParquetFile(path)
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise UserError(f"{path}: not a parquet file: {error}") from error
        records: list[dict[str, Any]] = [dict.fromkeys(file.schema_arrow.names)] if file.metadata.num_rows else []
    elif path.suffix == ".json" and path.stat().st_size > _CHECKED_BYTES:
        return  # JSON has no beginning that means something by itself
    else:
        records = read_file(path, most=_CHECKED_BYTES)
    check_records(settings, records, str(path))
    if path.suffix != ".parquet":
        for number, record in enumerate(records, start=1):
            parse_row(settings, record, f"{path}: row {number}")


def check_records(settings: RowData, records: Sequence[Mapping[str, Any]], what: str) -> None:
    """Refuse no rows, and rows without the columns that the settings name."""
    if not records:
        raise UserError(f"{what}: no rows; an empty dataset cannot be used")
    columns = {column for record in records for column in record}
    keys = ("messages",) if settings.messages is not None else ("prompt", "response")
    for key in keys:
        column = getattr(settings, key)
        if column not in columns:
            raise UserError(f"{what}: " + unknown_name(f"data.{key}", column, columns))


def read_file(path: Path, most: int | None = None) -> list[dict[str, Any]]:
    """The rows of a json, jsonl or parquet file; ``most`` bytes of a jsonl file, to the end of a line, if given.

    Raises
    ------
    UserError
        If the file is missing or malformed, or of another kind.
    """
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
        records = _parse_json(_read_text(path), str(path))
    elif path.suffix == ".jsonl":
        lines = _read_text(path, most).split("\n")
        records = [_parse_json(line, f"{path}: line {n}") for n, line in enumerate(lines, start=1) if line.strip()]
    else:
        raise UserError(f"data.files: {path} ends in `{path.suffix}`; known: .json, .jsonl, .parquet")
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{path}: expected JSON objects, one for each row (a list of them in a .json file)")
    return records


def _read_text(path: Path, most: int | None = None) -> str:
    try:
        with path.open("rb") as stream:
            content = stream.read() if most is None else stream.read(most)
            if most is not None and len(content) == most:
                content += stream.readline()
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error}") from error


def parse_row(settings: RowData, record: Mapping[str, Any], where: str) -> tuple[Messages, list[str]]:
    """The turns before the response, and the acceptable responses, the one to train on first.

    Raises
    ------
    UserError
        If a column is empty or of another type; ``where`` names the row.
    """
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

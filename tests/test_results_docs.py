"""results/README.md names the columns of every file, as many as there are and in their order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from entkd.collect import CURVE_COLUMNS, RUN_COLUMNS
from entkd.score.items import ITEM_COLUMNS, SCORE_COLUMNS
from entkd.tables.arms import COLUMNS
from entkd.tables.effects import COLUMNS as EFFECT_COLUMNS

TEXT = (Path(__file__).parents[1] / "results" / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """What stands under a heading that begins with ``title``."""
    return TEXT.split(f"\n## {title}")[1].split("\n## ")[0]


def named(cell: str) -> list[str]:
    """The columns that a cell lists: what it says of them, in brackets or behind a semicolon, left out."""
    return re.findall(r"`([^`]+)`", re.sub(r"\([^)]*\)", "", cell).partition(";")[0])


@pytest.mark.parametrize(("title", "columns"), [("`ablation_table.csv`", COLUMNS), ("`effects.csv`", EFFECT_COLUMNS)])
def test_columns_of_a_table_are_described(title: str, columns: list[str]) -> None:
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", section(title), re.M)
    assert [name for cell, _ in rows for name in named(cell)] == columns


@pytest.mark.parametrize(
    ("file", "columns"),
    [
        ("scores.csv", SCORE_COLUMNS),
        ("items.parquet", ITEM_COLUMNS),
        ("runs.csv", RUN_COLUMNS),
        ("curves.csv", CURVE_COLUMNS),
    ],
)
def test_columns_of_a_file_are_listed(file: str, columns: list[str]) -> None:
    (cell,) = re.findall(rf"^\| `{re.escape(file)}` \| (.*) \|$", section("Scores, runs, curves"), re.M)
    assert named(cell) == columns


def test_costs_of_a_run_are_explained() -> None:
    """What a name alone does not say."""
    prose = TEXT.partition("In `runs.csv`, ")[2].partition("\n\n")[0]
    for column in ("tokens", "positions", "teacher_tokens", "teacher_tokens_online", "generated_tokens", "resumed"):
        assert f"`{column}`" in prose

"""Tables of arms that lack a seed, on one task or on all, or that diverged in one."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
from fake_results import fake_items, fake_results, fake_scores
from test_tables import row, settings_of, tables, values


def write_without(folder: Path, arm: str, seed: int, metric: str | None = None) -> None:
    """Results in which an arm has no scores of a seed, on one task or on any."""
    fake_results(folder, n_items=6)
    items = fake_items(6)
    lost = (items["arm"] == arm) & (items["seed"] == seed)
    items = items[~(lost & (items["metric"] == metric) if metric else lost)]
    items.to_parquet(folder / "items.parquet", index=False)
    fake_scores(items).to_csv(folder / "scores.csv", index=False)


def test_gap_closed_is_of_the_seeds_that_every_task_has(tmp_path: Path) -> None:
    write_without(tmp_path, "sft", 2, "rougeL")
    table, _ = tables(tmp_path, settings_of("bits_per_byte", "rougeL"))
    found = row(table, "sft", "ratio")
    assert found["n"] == 2
    closed, gap = 0.0, 0.0
    for metric, sign in (("bits_per_byte", -1), ("rougeL", 1)):
        untrained = values(tmp_path, "untrained", metric)
        closed += sign * (values(tmp_path, "sft", metric)[:2] - untrained).mean()
        gap += sign * (values(tmp_path, "teacher", metric) - untrained).mean()
    assert found["mean"] == pytest.approx(closed / gap, rel=1e-6)
    assert row(table, "sft", "rougeL")["n"] == 2
    assert row(table, "sft", "bits_per_byte")["n"] == row(table, "seqkd", "ratio")["n"] == 3


def test_gap_closed_is_blank_without_a_seed_that_every_task_has(tmp_path: Path) -> None:
    fake_results(tmp_path, n_items=6)
    scores = pd.read_csv(tmp_path / "scores.csv")
    ours = scores["arm"] == "sft"
    keep = ~ours | ((scores["metric"] == "rougeL") == (scores["seed"] == 2))
    scores[keep].to_csv(tmp_path / "scores.csv", index=False)
    table, _ = tables(tmp_path, settings_of("bits_per_byte", "rougeL"), items=False)
    assert math.isnan(row(table, "sft", "ratio")["mean"])
    assert row(table, "sft", "ratio")["n"] == 0

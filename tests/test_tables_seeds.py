"""Tables of arms that lack a seed, on one task or on all, or that diverged in one."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
from fake_results import fake_items, fake_results, fake_scores
from test_tables import row, settings_of, tables, values

from entkd.errors import UserError


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


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_student_that_diverged_is_named_with_what_helps(tmp_path: Path, value: float) -> None:
    fake_results(tmp_path, n_items=6)
    scores = pd.read_csv(tmp_path / "scores.csv")
    ours = (scores["arm"] == "sft") & (scores["seed"] == 2) & (scores["metric"] == "bits_per_byte")
    scores.assign(value=scores["value"].mask(ours, value)).to_csv(tmp_path / "scores.csv", index=False)
    with pytest.raises(UserError) as caught:
        tables(tmp_path, settings_of("bits_per_byte", "rougeL"), items=False)
    said = str(caught.value)
    assert said.startswith(f"scores of entkd_heldout bits_per_byte: value `{value}` of arm `sft`, seed 2, is no finite")
    for remedy in ("training.lr", "training.clip", "take arm `sft` out of the arms", "2 out of the seeds"):
        assert remedy in said
    assert "score it again" not in said


def test_seeds_of_a_comparison_are_those_of_both_arms(tmp_path: Path) -> None:
    write_without(tmp_path, "kd", 2)
    table, _ = tables(tmp_path, settings_of("bits_per_byte", "rougeL"))
    found = row(table, "sft", "rougeL")
    assert (found["n"], found["n_paired"]) == (3, 2)
    assert row(table, "teacher", "rougeL")["n_paired"] == 2
    assert row(table, "kd", "rougeL")["n"] == 2
    assert table.loc[(table["arm"] == "kd") | (table["metric"] == "ratio"), "n_paired"].isna().all()
    note = "both have, fewer than are behind the arm's mean ± sd: 2 of 3 seeds of sft, seqkd, curriculum,"
    assert note in (tmp_path / "out" / "ablation_table.md").read_text()
    assert "2 of 3 seeds of sft, seqkd, curriculum," in (tmp_path / "out" / "ablation_table.tex").read_text()


def test_a_task_on_which_fewer_seeds_are_paired_is_named(tmp_path: Path) -> None:
    write_without(tmp_path, "kd", 2, "rougeL")
    tables(tmp_path, settings_of("bits_per_byte", "rougeL"))
    text = (tmp_path / "out" / "ablation_table.md").read_text()
    assert "2 of 3 seeds of sft on entkd_rouge rougeL, seqkd on entkd_rouge rougeL," in text


def test_no_word_of_paired_seeds_where_all_arms_have_the_same(tmp_path: Path) -> None:
    write_without(tmp_path, "sft", 2)
    table, _ = tables(tmp_path, settings_of("bits_per_byte"))
    assert row(table, "sft", "bits_per_byte")["n_paired"] == row(table, "sft", "bits_per_byte")["n"] == 2
    assert row(table, "seqkd", "bits_per_byte")["n_paired"] == 3
    assert "fewer than are behind" not in (tmp_path / "out" / "ablation_table.md").read_text()

"""Decimals of the tables for people: by the errors of ordinary arms, whatever one model's scores are."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from fake_results import fake_items, fake_results, fake_scores
from test_tables import row, settings_of, tables


def shown(folder: Path, scale: float, changes: dict[tuple[str, int | None], float]) -> dict[str, list[str]]:
    """Cells of `bits_per_byte` by row of the Markdown, with all values times ``scale``, some replaced."""
    fake_results(folder, n_items=12)
    items = fake_items(12)
    ours = items["metric"] == "bits_per_byte"
    items.loc[ours, "value"] *= scale
    for (arm, seed), value in changes.items():
        items.loc[ours & (items["arm"] == arm) & ((items["seed"] == seed) | (seed is None)), "value"] = value
    items.to_parquet(folder / "items.parquet", index=False)
    fake_scores(items).to_csv(folder / "scores.csv", index=False)
    tables(folder, settings_of("bits_per_byte"))
    text = (folder / "out" / "ablation_table.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    arms = {cells[0]: cells[5:7] for cells in lines if len(cells) > 5}
    return arms | {f"effect {cells[0]}": cells[2:] for cells in lines if len(cells) == 3}


@pytest.mark.parametrize(
    ("scale", "changes"),
    [
        (10.0, {("untrained", None): 3e6}),
        (1.0, {("sft", 2): 400.0}),
        (1.0, {("sft", None): 1e9}),
        (1.0, {("untrained", None): 3e6, ("sft", 0): 1e4, ("seqkd", 1): 1e5}),
    ],
)
def test_a_huge_mean_takes_no_decimals_from_the_others(
    tmp_path: Path, scale: float, changes: dict[tuple[str, int | None], float]
) -> None:
    plain = shown(tmp_path / "plain", scale, {})
    changed = shown(tmp_path / "changed", scale, changes)
    assert "▲" in plain["full"][1]
    untouched = {key: cells for key, cells in changed.items() if key not in {arm for arm, _ in changes}}
    for key in ("kd", "full", "effect features", "effect full − kd"):
        assert untouched[key] == plain[key]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_claims_and_intervals_keep_digits_at_any_size(tmp_path: Path, scale: float) -> None:
    cells = shown(tmp_path, scale, {("untrained", None): 1e7})
    table = pd.read_csv(tmp_path / "out" / "ablation_table.csv")
    found = row(table, "full", "bits_per_byte")
    number = cells["full"][1].partition(" [")[0].replace("−", "-")
    assert float(number) == pytest.approx(found["delta"], rel=0.05)
    claims = [cell for key, (*_, cell) in cells.items() if "▲" in cell or "▼" in cell]
    assert len(claims) >= 3
    for cell in claims:
        numbers = [part.strip("−+[],▲▼ ") for part in cell.split()][:3]
        assert all(float(number) != 0 for number in numbers), cell


def test_a_claim_smaller_than_its_column_has_decimals_of_its_own(tmp_path: Path) -> None:
    """All arms but one vary by about 1; that one is 0.004 above the reference, seed by seed and item by item."""
    fake_results(tmp_path, n_items=12)
    items = fake_items(12)
    noise = items["seed"].map({0: -1.0, 1: 0.2, 2: 0.9}) * items["arm"].map(hash_of)
    items["value"] += noise.where(~items["arm"].isin(["kd", "sft", "teacher", "untrained"]), 0.0)
    kd = items[items["arm"] == "kd"].set_index(["metric", "seed", "item"])["value"]
    ours = items["arm"] == "sft"
    own = items[ours].set_index(["metric", "seed", "item"]).index
    items.loc[ours, "value"] = kd.loc[own].to_numpy() + 0.004 + 1e-6 * items.loc[ours, "seed"]
    items.to_parquet(tmp_path / "items.parquet", index=False)
    fake_scores(items).to_csv(tmp_path / "scores.csv", index=False)
    tables(tmp_path, settings_of("bits_per_byte"))
    text = (tmp_path / "out" / "ablation_table.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("| sft ")]
    assert "+0.004" in line
    assert "▼" in line
    other = next(line for line in text.splitlines() if line.startswith("| features "))
    assert len(other.split("|")[6].split(" ± ")[1].strip().partition(".")[2]) < 3


def hash_of(arm: str) -> float:
    """A number from 0.5 to 1.5 that is an arm's own."""
    return 0.5 + sum(map(ord, arm)) % 11 / 10


def test_without_errors_decimals_follow_the_size_of_ordinary_means(tmp_path: Path) -> None:
    settings = fake_results(tmp_path, n_items=6, seeds=(0,))
    settings["tasks"] = [task for task in settings["tasks"] if task["metric"] == "bits_per_byte"]
    scores = pd.read_csv(tmp_path / "scores.csv")
    scores["value"] = scores["value"].mask(scores["arm"] == "untrained", 1e6)
    scores.to_csv(tmp_path / "scores.csv", index=False)
    table, _ = tables(tmp_path, settings, items=False)
    found = row(table, "kd", "bits_per_byte")["mean"]
    assert f"| {found:.3f} |" in (tmp_path / "out" / "ablation_table.md").read_text()

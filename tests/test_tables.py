"""entkd.tables on fake results: every number recomputed here from the raw rows."""

from __future__ import annotations

import itertools
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fake_results import FACTORIAL, fake_items, fake_results, fake_scores, fake_settings
from scipy import stats

from entkd.errors import UserError
from entkd.tables import arms, make_tables
from entkd.tables.latex import latex_escape

COLUMNS = [
    "arm", "role", "curriculum", "temperature", "features", "divergence", "task", "metric", "direction", "n",
    "n_paired", "mean", "sd", "delta", "low", "high", "p_holm", "claim", "mdd", "seed_low", "seed_high", "item_se",
    "gap_closed", "tokens", "seconds", "tflops", "peak_gib",
]  # fmt: skip
EFFECT_COLUMNS = [
    "task", "metric", "effect", "estimate", "low", "high", "df", "p", "p_holm", "family", "claim", "mdd",
    "seeds_needed",
]  # fmt: skip
ORDER = [
    "teacher", "untrained", "sft", "seqkd", "kd", "curriculum", "temperature", "features", "curriculum_temperature",
    "curriculum_features", "temperature_features", "full", "reverse_kl", "reverse_kl_full",
]  # fmt: skip


def tables(folder: Path, settings: dict[str, Any], items: bool = True, runs: bool = True) -> tuple[pd.DataFrame, ...]:
    make_tables(
        settings,
        folder / "scores.csv",
        folder / "items.parquet" if items else None,
        folder / "runs.csv" if runs else None,
        folder / "out" / "ablation_table.csv",
        folder / "out" / "ablation_table.md",
        folder / "out" / "ablation_table.tex",
        folder / "out" / "effects.csv",
    )
    return tuple(
        pd.read_csv(folder / "out" / f"{name}.csv", keep_default_na=False, na_values=[""])
        for name in ("ablation_table", "effects")
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame, pd.DataFrame]:
    folder = tmp_path_factory.mktemp("results")
    return folder, *tables(folder, fake_results(folder))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    fake_results(folder, n_items=6)
    return folder


@pytest.fixture
def rewritten(small: Path, tmp_path: Path) -> tuple[Path, pd.DataFrame]:
    """A folder of results and its scores, to change and write again."""
    shutil.copytree(small, tmp_path, dirs_exist_ok=True)
    return tmp_path, pd.read_csv(tmp_path / "scores.csv")


def settings_of(*metrics: str) -> dict[str, Any]:
    """Settings with these tasks alone."""
    settings = fake_settings()
    settings["tasks"] = [task for task in settings["tasks"] if task["metric"] in metrics]
    return settings


def row(table: pd.DataFrame, arm: str, metric: str) -> pd.Series:
    return table[(table["arm"] == arm) & (table["metric"] == metric)].iloc[0]


def values(folder: Path, arm: str, metric: str) -> np.ndarray:
    scores = pd.read_csv(folder / "scores.csv")
    return scores[(scores["arm"] == arm) & (scores["metric"] == metric)].sort_values("seed")["value"].to_numpy()


def item_matrix(folder: Path, arm: str, metric: str) -> np.ndarray:
    items = pd.read_parquet(folder / "items.parquet")
    items = items[(items["arm"] == arm) & (items["metric"] == metric)].sort_values(["seed", "item"])
    return items["value"].to_numpy().reshape(items["seed"].nunique(), -1)


def crossed(difference: np.ndarray) -> tuple[float, float]:
    """Variance of the mean and df by sums of squares, written with loops."""
    n_seeds, n_items = difference.shape
    grand = difference.mean()
    seed = sum((difference[s].mean() - grand) ** 2 for s in range(n_seeds)) * n_items
    item = sum((difference[:, i].mean() - grand) ** 2 for i in range(n_items)) * n_seeds
    rest = ((difference - grand) ** 2).sum() - seed - item
    df = np.array([n_seeds - 1, n_items - 1, (n_seeds - 1) * (n_items - 1)])
    seed, item, rest = np.array([seed, item, rest]) / df
    total = seed + item - rest
    if total < max(seed, item):
        return max(seed, item) / difference.size, df[0] if seed > item else df[1]
    return total / difference.size, total**2 / (seed**2 / df[0] + item**2 / df[1] + rest**2 / df[2])


def test_shape(results: tuple[Path, pd.DataFrame, pd.DataFrame]) -> None:
    _, table, effects = results
    assert list(table.columns) == COLUMNS
    assert list(effects.columns) == EFFECT_COLUMNS
    assert list(table["arm"].unique()) == ORDER
    assert len(table) == len(ORDER) * 6  # five metrics and gap_closed
    assert len(effects) == 5 * 8
    assert not table["metric"].str.startswith("kl_decile").any()


@pytest.mark.parametrize("metric", ["bits_per_byte", "rougeL", "acc", "kl"])
@pytest.mark.parametrize("arm", ["sft", "features", "reverse_kl_full", "teacher"])
def test_row_from_the_raw_items(results: tuple[Path, pd.DataFrame, pd.DataFrame], arm: str, metric: str) -> None:
    folder, table, _ = results
    found = row(table, arm, metric)
    own = values(folder, arm, metric)
    difference = item_matrix(folder, arm, metric) - item_matrix(folder, "kd", metric)  # one teacher row broadcasts
    variance, df = crossed(difference)
    half = stats.t.ppf(0.975, df) * math.sqrt(variance)
    assert found["n"] == own.size
    assert found["mean"] == pytest.approx(own.mean(), rel=1e-6)
    assert found["delta"] == pytest.approx(difference.mean(), rel=1e-6)
    assert found["low"] == pytest.approx(difference.mean() - half, rel=1e-6)
    assert found["high"] == pytest.approx(difference.mean() + half, rel=1e-6)
    seeds = stats.ttest_1samp(difference.mean(1), 0).confidence_interval(0.95)
    assert (found["seed_low"], found["seed_high"]) == pytest.approx((seeds.low, seeds.high), rel=1e-6)
    assert found["item_se"] == pytest.approx(stats.sem(difference.mean(0)), rel=1e-6)
    if arm != "teacher":
        assert found["sd"] == pytest.approx(np.std(own, ddof=1), rel=1e-6)


def test_exploratory_family_is_corrected_over_the_whole_table(
    results: tuple[Path, pd.DataFrame, pd.DataFrame],
) -> None:
    folder, table, _ = results
    p = {}
    for arm, metric in itertools.product(ORDER[2:], ["bits_per_byte", "rougeL", "acc", "kl", "top1_agreement"]):
        if arm not in ("kd", "full"):
            difference = item_matrix(folder, arm, metric) - item_matrix(folder, "kd", metric)
            variance, df = crossed(difference)
            over_both = 2 * stats.t.sf(abs(difference.mean()) / math.sqrt(variance), df)
            p[arm, metric] = max(over_both, stats.ttest_1samp(difference.mean(1), 0).pvalue)
    assert len(p) == 50
    highest = 0.0
    for position, key in enumerate(sorted(p, key=lambda key: p[key])):
        highest = max(highest, min(1.0, p[key] * (50 - position)))
        found = row(table, *key)
        assert found["p_holm"] == pytest.approx(highest, rel=1e-5)
        if highest >= 0.05:
            assert found["claim"] == "not shown"
        else:
            assert found["claim"] == ("better" if (found["delta"] > 0) == (found["direction"] == "higher") else "worse")
    assert set(table["claim"].dropna()) == {"better", "worse", "not shown"}


def test_a_claim_beside_an_interval_around_zero_is_explained(rewritten: tuple[Path, pd.DataFrame]) -> None:
    """The factorial claims `full - kd` for these items; items that differ widely make the row's own interval wide."""
    folder, _ = rewritten
    items = pd.read_parquet(folder / "items.parquet")
    chosen = (items["metric"] == "kl") & (items["arm"] == "full")
    items.loc[chosen, "value"] += items.loc[chosen, "item"].map({0: 30, 1: -30}).fillna(0)
    items.to_parquet(folder / "items.parquet", index=False)
    table, _ = tables(folder, settings_of("kl"))
    found = row(table, "full", "kl")
    assert found["low"] < 0 < found["high"]
    assert found["claim"] == "better"
    text = (folder / "out" / "ablation_table.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("| full |")]
    assert "] ▲† |" in line
    assert text.count("†") == 2
    assert "- † claimed by the declared contrast, for other seeds on these items;" in text
    assert "\\blacktriangle$$\\dagger$" in (folder / "out" / "ablation_table.tex").read_text()
    tables(folder, settings_of("rougeL"))
    assert "†" not in (folder / "out" / "ablation_table.md").read_text()


def test_the_declared_contrast_has_one_answer(results: tuple[Path, pd.DataFrame, pd.DataFrame]) -> None:
    _, table, effects = results
    for _, effect in effects[effects["effect"] == "full-kd"].iterrows():
        found = row(table, "full", effect["metric"])
        assert found["delta"] == pytest.approx(effect["estimate"], rel=1e-6)
        assert (found["p_holm"], found["claim"], found["mdd"]) == (effect["p_holm"], effect["claim"], effect["mdd"])


@pytest.mark.parametrize("metric", ["kl", "acc"])
def test_effects_from_the_raw_scores(results: tuple[Path, pd.DataFrame, pd.DataFrame], metric: str) -> None:
    folder, _, effects = results
    own = effects[effects["metric"] == metric].set_index("effect")
    scores = {arm: values(folder, arm, metric) for arm in FACTORIAL}
    on = np.mean([v for arm, v in scores.items() if "features" in FACTORIAL[arm]])
    off = np.mean([v for arm, v in scores.items() if "features" not in FACTORIAL[arm]])
    assert own.loc["features", "estimate"] == pytest.approx(on - off, rel=1e-6)
    matrix = np.array(list(scores.values()))
    error = ((matrix - matrix.mean(0) - matrix.mean(1, keepdims=True) + matrix.mean()) ** 2).sum() / 14
    se = math.sqrt(error * 2 / 12)  # two means of 4 arms × 3 seeds
    assert set(own["df"]) == {14}
    assert own.loc["features", "p"] == pytest.approx(2 * stats.t.sf(abs(on - off) / se, 14), rel=1e-5)
    primary = own[own["family"] == "primary"]
    assert list(primary.index) == ["curriculum", "temperature", "features", "full-kd"]
    ordered = primary.sort_values("p")
    adjusted = np.maximum.accumulate(np.minimum(1, ordered["p"] * [4, 3, 2, 1]))
    assert ordered["p_holm"].to_numpy() == pytest.approx(adjusted.to_numpy(), rel=1e-5)
    critical = stats.t.isf(0.05 / 4 / 2, 14)
    shift = own.loc["features", "mdd"] / se
    assert stats.nct.sf(critical, 14, shift) == pytest.approx(0.8, abs=1e-4)


def test_effects_that_are_not_declared_are_one_family(results: tuple[Path, pd.DataFrame, pd.DataFrame]) -> None:
    others = results[2][lambda e: e["family"] == "exploratory"].sort_values("p")
    assert len(others) == 20
    assert others["p_holm"].iloc[0] == pytest.approx(min(1, others["p"].iloc[0] * 20), rel=1e-6)


def test_gap_closed(results: tuple[Path, pd.DataFrame, pd.DataFrame]) -> None:
    folder, table, _ = results
    metrics = {"bits_per_byte": -1, "rougeL": 1, "acc": 1}  # fidelity is left out
    teacher, untrained, kd = (
        np.sum([sign * values(folder, arm, m) for m, sign in metrics.items()], axis=0)
        for arm in ("teacher", "untrained", "kd")
    )
    share = (kd - untrained) / (teacher - untrained)
    found = row(table, "kd", "ratio")
    assert found["task"] == "gap_closed"
    assert found["mean"] == found["gap_closed"] == pytest.approx(share.mean(), rel=1e-6)
    interval = stats.ttest_1samp(share, 0).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high), rel=1e-6)
    assert pd.isna(found["p_holm"])
    assert pd.isna(found["claim"])
    assert row(table, "teacher", "ratio")["mean"] == 1
    assert row(table, "untrained", "ratio")["mean"] == 0
    kl = {arm: values(folder, arm, "kl").mean() for arm in ("teacher", "untrained", "kd")}
    expected = (kl["kd"] - kl["untrained"]) / (kl["teacher"] - kl["untrained"])
    assert row(table, "kd", "kl")["gap_closed"] == pytest.approx(expected, rel=1e-6)


def test_gap_closed_of_each_suite(rewritten: tuple[Path, pd.DataFrame]) -> None:
    folder, scores = rewritten
    alone, _ = tables(folder, settings_of("rougeL"), items=False)
    pd.concat([scores, scores.assign(suite="other")]).to_csv(folder / "scores.csv", index=False)
    settings = settings_of("acc", "rougeL")
    settings["tasks"][0] |= {"suite": "other"}
    table, _ = tables(folder, settings, items=False)
    ratios = table[(table["arm"] == "sft") & (table["metric"] == "ratio")].set_index("task")["mean"]
    assert set(ratios.index) == {"demo/gap_closed", "other/gap_closed"}
    assert ratios["demo/gap_closed"] == pytest.approx(row(table, "sft", "acc")["gap_closed"], rel=1e-6)
    assert ratios["other/gap_closed"] == pytest.approx(row(alone, "sft", "ratio")["mean"], rel=1e-6)
    text = (folder / "out" / "ablation_table.md").read_text()
    assert "| demo gap closed |" in text
    assert "| other gap closed |" in text


def test_gap_below_the_minimum_is_blank_and_left_out(small: Path) -> None:
    settings = settings_of("bits_per_byte", "rougeL")
    settings["tasks"][1]["min_gap"] = 10.0
    table, _ = tables(small, settings)
    assert pd.isna(row(table, "kd", "rougeL")["gap_closed"])
    assert row(table, "kd", "ratio")["mean"] == pytest.approx(row(table, "kd", "bits_per_byte")["gap_closed"], rel=1e-6)
    settings["tasks"][0]["min_gap"] = 10.0
    table, _ = tables(small, settings)
    assert table["gap_closed"].isna().all()
    assert "gap closed is" not in (small / "out" / "ablation_table.md").read_text()


def test_scale_of_a_task_decides_its_part_of_the_gap(small: Path) -> None:
    settings = settings_of("rougeL", "acc")
    settings["tasks"] = [task | {"scale": 1e9 if task["metric"] != "acc" else 1.0} for task in settings["tasks"]]
    table, _ = tables(small, settings)
    assert row(table, "sft", "ratio")["mean"] == pytest.approx(row(table, "sft", "acc")["gap_closed"], rel=1e-6)


def test_costs(results: tuple[Path, pd.DataFrame, pd.DataFrame]) -> None:
    folder, table, _ = results
    runs = pd.read_csv(folder / "runs.csv")
    own = runs[runs["arm"] == "full"]
    assert row(table, "full", "kl")["seconds"] == pytest.approx(own["seconds"].mean())
    assert row(table, "full", "kl")["tokens"] == own["positions"].mean() == 9810  # prompts and padding left out
    text = (folder / "out" / "ablation_table.md").read_text()
    for words in ("trained response tokens", "the teacher's pass", "wall time"):
        assert words in text
    assert table[table["arm"] == "teacher"]["tokens"].isna().all()


def test_references_and_the_reference_arm_make_no_claim(
    results: tuple[Path, pd.DataFrame, pd.DataFrame],
) -> None:
    _, table, _ = results
    untested = table[table["arm"].isin(["teacher", "untrained", "kd"])]
    assert untested[["p_holm", "claim", "mdd"]].isna().all(axis=None)
    assert table[table["arm"] == "kd"]["delta"].isna().all()
    assert set(untested[untested["arm"] != "kd"]["role"]) == {"reference"}


def test_scores_alone_give_the_t_test_over_seeds(
    results: tuple[Path, pd.DataFrame, pd.DataFrame], tmp_path: Path
) -> None:
    folder = tmp_path
    shutil.copy(results[0] / "scores.csv", folder)
    table, effects = tables(folder, fake_settings(), items=False, runs=False)
    found = row(table, "sft", "kl")
    expected = stats.ttest_rel(values(folder, "sft", "kl"), values(folder, "kd", "kl")).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), rel=1e-6)
    assert table[["item_se", "tokens", "seconds", "tflops", "peak_gib"]].isna().all(axis=None)
    pd.testing.assert_frame_equal(effects, results[2])


def test_same_input_same_bytes(rewritten: tuple[Path, pd.DataFrame]) -> None:
    folder, scores = rewritten
    settings = settings_of("kl", "acc")
    written = []
    for _ in range(2):
        tables(folder, settings)
        written.append({path.name: path.read_bytes() for path in (folder / "out").iterdir()})
        scores.sample(frac=1, random_state=0).to_csv(folder / "scores.csv", index=False)  # the order of rows is free
        items = pd.read_parquet(folder / "items.parquet").sample(frac=1, random_state=0)
        items.to_parquet(folder / "items.parquet", index=False)
    assert written[0] == written[1]
    assert len(written[0]) == 4


def test_constant_added_to_every_arm_changes_no_difference(rewritten: tuple[Path, pd.DataFrame]) -> None:
    folder, scores = rewritten
    settings = settings_of("kl", "acc")
    before = tables(folder, settings)
    items = pd.read_parquet(folder / "items.parquet")
    scores.assign(value=scores["value"] + 3).to_csv(folder / "scores.csv", index=False)
    items.assign(value=items["value"] + 3).to_parquet(folder / "items.parquet", index=False)
    after = tables(folder, settings)
    columns = ["delta", "low", "high", "p_holm", "claim", "mdd", "seed_low", "item_se", "gap_closed"]
    scored = before[0]["task"] != "gap_closed"
    pd.testing.assert_frame_equal(before[0].loc[scored, columns], after[0].loc[scored, columns], rtol=1e-5, atol=1e-9)
    pd.testing.assert_frame_equal(before[1], after[1], rtol=1e-5, atol=1e-9)


def test_other_direction_flips_claims_and_nothing_else(small: Path) -> None:
    settings = settings_of("kl", "top1_agreement")
    before = tables(small, settings)
    for task in settings["tasks"]:
        task["direction"] = {"higher": "lower", "lower": "higher"}[task["direction"]]
    flip = {"better": "worse", "worse": "better"}
    for ours, flipped in zip(before, tables(small, settings), strict=True):
        assert {"better", "not shown"} <= set(ours["claim"])
        assert flipped["claim"].to_list() == ours["claim"].replace(flip).to_list()
        pd.testing.assert_series_equal(flipped["p_holm"], ours["p_holm"])


def test_unequal_seeds_are_paired_on_the_common_ones(rewritten: tuple[Path, pd.DataFrame]) -> None:
    folder, scores = rewritten
    scores = scores[~((scores["arm"] == "sft") & (scores["seed"] == 1))]
    scores.to_csv(folder / "scores.csv", index=False)
    table, _ = tables(folder, settings_of("kl"))
    found = row(table, "sft", "kl")
    kd = values(folder, "kd", "kl")[[0, 2]]
    assert found["n"] == 2
    assert found["delta"] == pytest.approx((values(folder, "sft", "kl") - kd).mean(), rel=1e-6)
    assert "n = 2 to 3 seeds" in (folder / "out" / "ablation_table.md").read_text()


def test_one_seed_and_no_factorial(tmp_path: Path) -> None:
    settings = fake_results(tmp_path, seeds=(4,))
    settings["arms"] = [arm for arm in settings["arms"] if arm["name"] in ("sft", "kd", "full")]
    settings["primary"] = []
    table, effects = tables(tmp_path, settings)
    assert effects.empty
    assert list(effects.columns) == EFFECT_COLUMNS
    found = row(table, "full", "kl")
    assert found["claim"] == "not shown"
    assert pd.isna(found["p_holm"])
    assert pd.isna(found["mdd"])
    assert found["low"] < found["delta"] < found["high"]  # over items
    text = (tmp_path / "out" / "ablation_table.md").read_text()
    assert "With one seed no claim" in text
    assert "Effects" not in text


def test_factorial_with_one_seed_claims_nothing(tmp_path: Path) -> None:
    settings = fake_results(tmp_path, n_items=6, seeds=(0,))
    table, effects = tables(tmp_path, settings)
    assert set(effects["claim"]) == {"not shown"}
    assert effects[["low", "p", "p_holm", "mdd", "seeds_needed"]].isna().all(axis=None)
    assert set(table["claim"].dropna()) == {"not shown"}


def test_untrained_students_of_every_seed_are_paired(tmp_path: Path) -> None:
    fake_results(tmp_path, n_items=4)
    items = fake_items(4)
    first = items[items["arm"] == "untrained"]
    more = [first.assign(seed=seed, value=first["value"] + 0.1 * seed) for seed in (1, 2)]
    items = pd.concat([items, *more])
    items.to_parquet(tmp_path / "items.parquet", index=False)
    fake_scores(items).to_csv(tmp_path / "scores.csv", index=False)
    table, _ = tables(tmp_path, settings_of("kl"))
    found = row(table, "untrained", "kl")
    assert found["n"] == 3
    difference = values(tmp_path, "untrained", "kl") - values(tmp_path, "kd", "kl")
    interval = stats.ttest_1samp(difference, 0).confidence_interval(0.95)
    assert found["seed_high"] == pytest.approx(interval.high, rel=1e-6)


def test_task_of_two_suites_is_named_with_its_suite(rewritten: tuple[Path, pd.DataFrame]) -> None:
    folder, scores = rewritten
    pd.concat([scores, scores.assign(suite="other")]).to_csv(folder / "scores.csv", index=False)
    settings = settings_of("kl", "acc")
    settings["tasks"].append(settings["tasks"][1] | {"suite": "other"})
    table, effects = tables(folder, settings, items=False)
    assert set(table[table["metric"] == "kl"]["task"]) == {"demo/entkd_fidelity", "other/entkd_fidelity"}
    assert len(effects) == 3 * 8


def test_reference_of_its_own_choice(rewritten: tuple[Path, pd.DataFrame]) -> None:
    folder, _ = rewritten
    settings = settings_of("kl")
    settings["analysis"] |= {"reference": "sft"}
    table, effects = tables(folder, settings)
    difference = values(folder, "full", "kl") - values(folder, "sft", "kl")
    assert row(table, "full", "kl")["delta"] == pytest.approx(difference.mean(), rel=1e-6)
    declared = effects[(effects["effect"] == "full-kd") & (effects["metric"] == "kl")].iloc[0]
    assert row(table, "full", "kl")["p_holm"] != declared["p_holm"]
    assert "full − kd, which is" not in (folder / "out" / "ablation_table.md").read_text()


def drop_arm(scores: pd.DataFrame) -> pd.DataFrame:
    return scores[~((scores["arm"] == "curriculum_features") & (scores["metric"] == "acc"))]


def no_number(scores: pd.DataFrame) -> pd.DataFrame:
    chosen = (scores["arm"] == "full") & (scores["metric"] == "rougeL") & (scores["seed"] == 2)
    return scores.assign(value=scores["value"].where(~chosen))


def other_seeds(scores: pd.DataFrame) -> pd.DataFrame:
    return scores.assign(seed=scores["seed"].where(scores["arm"] != "sft", scores["seed"] + 10))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_arm, r"entkd_minimal_pairs acc: none of arm `curriculum_features`.*score it"),
        (no_number, r"entkd_rouge rougeL: value `nan` of arm `full`, seed 2,"),
        (other_seeds, r"no seed in common \(sft: \[10, 11, 12\]; kd: \[0, 1, 2\]\)"),
        (lambda scores: pd.concat([scores, scores]), r"has seed 0 twice"),
        (lambda scores: scores.drop(columns="suite"), r"scores\.csv: column suite is missing"),
        (lambda scores: scores[scores["task"] != "entkd_rouge"], r"entkd_rouge in suite demo: there are none"),
        (
            lambda scores: scores.replace({"metric": {"acc": "acc_norm"}}),
            r"unknown name `acc`.*acc_norm",
        ),
    ],
)
def test_bad_scores(rewritten: tuple[Path, pd.DataFrame], change: Any, message: str) -> None:
    folder, scores = rewritten
    change(scores).to_csv(folder / "scores.csv", index=False)
    with pytest.raises(UserError, match=message):
        tables(folder, fake_settings(), items=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.assign(value=i["value"].where(i["arm"] != "sft", i["value"] + 0.01)), r"of arm sft average to"),
        (lambda i: i[~((i["arm"] == "sft") & (i["item"] == 3))], r"arms sft and kd were scored on different items"),
        (lambda i: i[~((i["arm"] == "sft") & (i["seed"] == 1))], r"arm sft lacks seed 1"),
        (lambda i: i[~((i["arm"] == "sft") & (i["seed"] == 1) & (i["item"] == 0))], r"arm sft lacks some items"),
    ],
)
def test_bad_items(rewritten: tuple[Path, pd.DataFrame], change: Any, message: str) -> None:
    folder, _ = rewritten
    change(pd.read_parquet(folder / "items.parquet")).to_parquet(folder / "items.parquet", index=False)
    with pytest.raises(UserError, match=message):
        tables(folder, fake_settings())


def test_unknown_primary_effect(rewritten: tuple[Path, pd.DataFrame]) -> None:
    settings = fake_settings() | {"primary": ["curiculum"]}
    with pytest.raises(UserError, match=r"primary: unknown name `curiculum`; did you mean `curriculum`"):
        tables(rewritten[0], settings)


def test_markdown(results: tuple[Path, pd.DataFrame, pd.DataFrame]) -> None:
    folder, table, _ = results
    text = (folder / "out" / "ablation_table.md").read_text()
    blocks = [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", text, re.M)]
    assert [len(block) for block in blocks] == [2 + len(ORDER), 2 + 8]
    for block in blocks:
        assert len({line.count("|") for line in block}) == 1
    names = [line.split("|")[1].strip() for line in blocks[0][2:]]
    assert names == ORDER
    header, full = ([cell.strip() for cell in blocks[0][line].split("|")] for line in (0, 2 + ORDER.index("full")))
    cells = dict(zip(header, full, strict=True))
    assert (cells["curriculum"], cells["divergence"]) == ("✓", "forward_kl")
    found = row(table, "full", "kl")
    assert cells["entkd_fidelity kl ↓ mean ± sd"] == f"{found['mean']:.3f} ± {found['sd']:.3f}"
    interval = ", ".join(f"{x:+.3f}" for x in (found["low"], found["high"]))
    assert cells["entkd_fidelity kl ↓ Δ"] == f"{found['delta']:+.3f} [{interval}] ▲".replace("-", "−")
    for words in ("n = 3 seeds", "exploratory", "mdd is the smallest", "p < 0.05", "not tested", "the larger of"):
        assert words in text


def test_other_setting_of_a_component_is_written_out(rewritten: tuple[Path, pd.DataFrame]) -> None:
    folder, _ = rewritten
    settings = settings_of("kl")
    settings["arms"][-1]["temperature"] = "c=-0.5"
    tables(folder, settings)
    last = [
        line for line in (folder / "out" / "ablation_table.md").read_text().splitlines() if "| reverse_kl_full" in line
    ]
    assert "| ✓ | c=-0.5 | ✓ |" in last[0]


def test_latex(results: tuple[Path, pd.DataFrame, pd.DataFrame]) -> None:
    folder = results[0]
    text = (folder / "out" / "ablation_table.tex").read_text()
    assert text.isascii()
    for rule in ("\\toprule", "\\midrule", "\\bottomrule", "\\begin{table*}", "\\end{table*}"):
        assert text.count(rule) == 2
    plain = re.sub(r"\\[\\&%$#_{}]", "", text)
    assert plain.count("{") == plain.count("}")
    assert plain.count("$") % 2 == 0
    assert "_" not in plain.replace("% \\usepackage{booktabs,amssymb,graphicx}", "")
    rows = [line for line in text.splitlines() if line.endswith("\\\\") and "multicolumn" not in line]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in rows[:15]} == {19}
    assert "curriculum\\_temperature & $\\checkmark$ & $\\checkmark$ &" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a_b & 50 %", "a\\_b \\& 50 \\%"),
        ("κ=0.8 ± 1", "$\\kappa$=0.8 $\\pm$ 1"),
        ("\\x{y}~^", "\\textbackslash{}x\\{y\\}\\textasciitilde{}\\textasciicircum{}"),
        ("é 漢", "e ?"),
        ("−0.1 <", "$-$0.1 $<$"),
    ],
)
def test_latex_escape(text: str, expected: str) -> None:
    assert latex_escape(text) == expected


def test_imports_no_torch() -> None:
    heavy = ("torch", "transformers", "datasets", "lm_eval")
    code = f"import sys, entkd.tables; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_arm_that_diverges_says_nothing_of_what_the_others_could_show() -> None:
    def of(variances: list[float]) -> float:
        found = [Namespace(n_seeds=3, seed_variance=variance) for variance in variances]
        return arms._pooled_variance(pd.Series(found))

    ordinary = list(np.random.default_rng(0).chisquare(2, 25) / 2)
    assert of(ordinary) == pytest.approx(1.0, rel=0.5)  # it estimates the variance, 1
    many = list(np.random.default_rng(1).chisquare(2, 100_001) / 2)
    assert of(many) == pytest.approx(1.0, rel=0.02)
    assert of([*ordinary, 1e4]) < 1.2 * of(ordinary)
    assert math.isnan(arms._pooled_variance(pd.Series([Namespace(n_seeds=1, seed_variance=math.nan)])))

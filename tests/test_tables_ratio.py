"""Intervals of a ratio Σx/Σy over items, such as bits per byte: the size of an item is no noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from test_tables import crossed, row, settings_of, tables

from entkd.errors import UserError
from entkd.stats import compare
from entkd.tables.measured import Measured


def write_ratios(folder: Path, numerator_ASI: np.ndarray, length_I: np.ndarray, weights: bool = True) -> None:
    """Results in which task `lm` is Σ numerator / Σ length over its items, for arms `kd` and `sft`."""
    rows = []
    for arm, numerator_SI in zip(("kd", "sft"), numerator_ASI, strict=True):
        for (seed, item), value in np.ndenumerate(numerator_SI / length_I.mean()):
            rows.append(
                ("entkd_heldout", "bits_per_byte", arm, seed, str(item), value, length_I[item] / length_I.mean())
            )
    items = pd.DataFrame(rows, columns=["task", "metric", "arm", "seed", "item", "value", "weight"]).assign(
        suite="demo"
    )
    scores = items.groupby(["arm", "seed", "suite", "task", "metric"])["value"].mean().reset_index()
    scores.to_csv(folder / "scores.csv", index=False)
    (items if weights else items.drop(columns="weight")).to_parquet(folder / "items.parquet", index=False)


def ratio_settings() -> dict:
    settings = settings_of("bits_per_byte")
    settings["arms"] = [arm for arm in settings["arms"] if arm["name"] in ("kd", "sft")]
    settings["primary"] = []
    return settings


def test_length_of_an_item_is_no_noise_of_a_ratio(tmp_path: Path) -> None:
    """`sft` costs half a bit more on every byte of every document: nothing varies but lengths, which are no error."""
    rng = np.random.default_rng(5)
    length_I = rng.integers(100, 900, 12).astype(float)
    rate_SI = 2 + rng.normal(0, 0.1, (3, 12))
    noise_SI = rng.normal(0, 1e-3, (3, 12))
    write_ratios(tmp_path, np.stack([rate_SI * length_I, (rate_SI + 0.5 + noise_SI) * length_I]), length_I)
    found = row(tables(tmp_path, ratio_settings(), runs=False)[0], "sft", "bits_per_byte")
    assert found["delta"] == pytest.approx(0.5, abs=1e-3)
    assert 0 < found["high"] - found["low"] < 0.01
    assert found["item_se"] < 0.001
    # the interval is that of the linearised ratio, seed by seed
    excess_SI = (0.5 + noise_SI) * length_I / length_I.mean()
    linear_SI = excess_SI - excess_SI.mean(1, keepdims=True) * (length_I / length_I.mean() - 1)
    variance, df = crossed(linear_SI)
    assert found["high"] - found["delta"] == pytest.approx(stats.t.ppf(0.975, df) * variance**0.5, abs=1e-7)
    # a file that has no weights says nothing of lengths: its items are those of a plain mean
    write_ratios(tmp_path, np.stack([rate_SI * length_I, (rate_SI + 0.5 + noise_SI) * length_I]), length_I, False)
    plain = row(tables(tmp_path, ratio_settings(), runs=False)[0], "sft", "bits_per_byte")
    assert plain["delta"] == pytest.approx(found["delta"], rel=1e-9)
    assert plain["high"] - plain["low"] > 0.2


@pytest.mark.parametrize("effect", [0.0, 0.3, 2.0])
def test_intervals_of_a_ratio_cover_whatever_the_effect(effect: float) -> None:
    """95 % of them hold the true difference, for documents whose lengths vary by half."""
    rng = np.random.default_rng(11)
    covered = []
    for _ in range(400):
        length_I = np.exp(rng.normal(0, 0.5, 12))
        difference_SI = effect + rng.normal(0, 0.05, (3, 1)) + rng.normal(0, 0.1, 12) + rng.normal(0, 0.1, (3, 12))
        index = pd.Index([str(i) for i in range(12)])
        frames = [
            pd.DataFrame(x * length_I / length_I.mean(), columns=index) for x in (difference_SI, 0 * difference_SI)
        ]
        items = dict(zip(("arm", "ref"), frames, strict=True))
        values = {name: frame.mean(axis=1) for name, frame in items.items()}
        weights = pd.Series(length_I / length_I.mean(), index=index)
        m = Measured("s", "t", "t", "m", "lower", 0, 1, values, items, weights)
        d = compare(m.by_seed("arm", [0, 1, 2]) - m.by_seed("ref", [0, 1, 2]), m.by_item("arm", "ref", [0, 1, 2]))
        covered.append(d.low < effect < d.high)
    assert 0.91 < np.mean(covered) < 0.99


def test_weights_that_cannot_be_are_refused(tmp_path: Path) -> None:
    length_I = np.array([100.0, 300.0])
    write_ratios(tmp_path, np.ones((2, 3, 2)) * length_I, length_I)
    items = pd.read_parquet(tmp_path / "items.parquet")
    odd = items.assign(weight=items["weight"].where(items["seed"] > 0))
    odd.to_parquet(tmp_path / "items.parquet", index=False)
    with pytest.raises(UserError, match="items of entkd_heldout bits_per_byte: item 0 has no weight, or another"):
        tables(tmp_path, ratio_settings(), runs=False)
    items.assign(weight=2 * items["weight"]).to_parquet(tmp_path / "items.parquet", index=False)
    with pytest.raises(UserError, match="weights have the mean 2, not 1; score it again"):
        tables(tmp_path, ratio_settings(), runs=False)

"""entkd.stats.joint against experiments that are simulated in full and compared by `compare`'s own two tests."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import pytest

from entkd.stats import compare, jointly_detectable, smallest_detectable
from entkd.stats.paired import crossed_variance, mean_squares
from entkd.tables import arms

LEVELS = (0.05, 0.05 / 50)
SEED, ITEM, BOTH = (0.5, 0.01), (0.01, 1.0), (0.1, 1.0)
"""Variances of seeds and of items; that of a single value is 1."""


def experiment(rng: np.random.Generator, n_S: int, n_I: int, seed: float, item: float) -> np.ndarray:
    """Differences of two equal arms, seeds × items."""
    return (
        rng.normal(0, seed**0.5, (n_S, 1)) + rng.normal(0, item**0.5, (1, n_I)) + rng.normal(0, 1, (n_S, n_I))
    )  # fmt: skip


def stated(n_S: int, n_I: int, variances: tuple[float, float], alpha: float, target: float = 0.8) -> float:
    seed, item = variances
    squares = (n_I * seed + 1, n_S * item + 1, 1.0)
    return jointly_detectable(*(square / (n_S * n_I) for square in squares), n_S, n_I, alpha, target)


@pytest.mark.parametrize("variances", [SEED, ITEM, BOTH])
@pytest.mark.parametrize("n_S", [3, 5, 10])
def test_power_at_the_stated_difference(n_S: int, variances: tuple[float, float]) -> None:
    rng = np.random.default_rng(8)
    noise = [experiment(rng, n_S, 12, *variances) for _ in range(1500)]
    for alpha in LEVELS:
        effect = stated(n_S, 12, variances, alpha)
        p = np.array([compare(one.mean(1) + effect, one + effect).p for one in noise])
        assert 0.76 < (p < alpha).mean() < 0.84


def test_mdd_of_the_table_is_claimed_as_often_as_it_says() -> None:
    """Where items vary most, the larger of what either test detects would be found in too few experiments."""
    rng = np.random.default_rng(4)
    noise = [experiment(rng, 3, 12, *ITEM) for _ in range(1500)]
    typical = replace(compare(noise[0].mean(1), noise[0]), item_variance=1 / 12, item_se=(1 / 12 + 1 / 36) ** 0.5)
    for alpha in LEVELS:
        mdd = arms._detectable(typical, 0.01 + 1 / 12, alpha, 0.8)
        p = np.array([compare(one.mean(1) + mdd, one + mdd).p for one in noise])
        assert 0.76 < (p < alpha).mean() < 0.84


def test_mdd_needs_an_error_over_seeds() -> None:
    one_seed = compare(np.ones(1), np.arange(4.0)[None])
    assert math.isnan(arms._detectable(one_seed, 1.0, 0.05, 0.8))
    two = compare(np.array([1.0, 2.0]), np.array([[0.5, 1.5], [2.0, 2.0]]))
    assert math.isnan(arms._detectable(two, 0.0, 0.05, 0.8))
    assert arms._detectable(two, 1e-6, 0.05, 0.8) > 0  # typical arms vary less than this one within a seed


@pytest.mark.parametrize("n_S", [3, 10])
@pytest.mark.parametrize("alpha", LEVELS)
def test_seeds_alone_decide_where_items_do_not_vary(n_S: int, alpha: float) -> None:
    """The paired t over seeds is then the stricter test almost always."""
    seed = 1 / n_S
    found = jointly_detectable(seed, 1e-9, 1e-9, n_S, 50, alpha, 0.8)
    assert found == pytest.approx(smallest_detectable(seed**0.5, n_S - 1, alpha, 0.8), rel=0.02)


def test_more_seeds_more_items_and_less_power_need_smaller_differences() -> None:
    base = stated(3, 12, BOTH, 0.05)
    assert stated(5, 12, BOTH, 0.05) < base
    assert stated(3, 40, BOTH, 0.05) < base
    assert stated(3, 12, BOTH, 0.05, 0.5) < base < stated(3, 12, BOTH, 0.01)


def test_it_scales_with_the_unit() -> None:
    assert jointly_detectable(2e-8, 3e-8, 1e-8, 3, 12, 0.01, 0.8) == pytest.approx(
        1e-4 * jointly_detectable(2.0, 3.0, 1.0, 3, 12, 0.01, 0.8), rel=1e-4
    )


def test_a_table_of_many_arms_waits_for_it_no_longer_than_seconds() -> None:
    began = time.process_time()
    for n in range(100):
        stated(3, 12, (0.1 + n / 100, 1.0), 0.05 / 100)
    assert time.process_time() - began < 5


def test_variance_and_df_of_one_layout_are_those_of_many() -> None:
    rng = np.random.default_rng(2)
    for _ in range(30):
        layout = experiment(rng, 3, 5, 0.02, 0.02)
        seed, item, rest = mean_squares(layout)
        total = seed + item - rest
        variance, df = crossed_variance(layout)
        assert variance == pytest.approx(max(total, seed, item) / 15)
        if total > max(seed, item):
            assert df == pytest.approx(total**2 / (seed**2 / 2 + item**2 / 4 + rest**2 / 8))
        else:
            assert df == (2 if seed > item else 4)

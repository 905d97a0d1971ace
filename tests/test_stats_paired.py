"""entkd.stats.paired against dummy-variable regression, hand-computed numbers, scipy and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from entkd.stats import compare
from entkd.stats.paired import crossed_variance, mean_squares

# By hand: grand mean 4, seed means 2, 4, 6, item means 3, 5 → SS_seed = 2·(4+0+4) = 16, SS_item = 3·(1+1) = 6,
# residuals ±(0, 1, −1) → SS_residual = 2·(0+1+1) = 4.
SMALL_SI = np.array([[1.0, 3.0], [4.0, 4.0], [4.0, 8.0]])


def sample(rng: np.random.Generator, n_S: int, n_I: int, seed_sd: float, item_sd: float) -> np.ndarray:
    seed_S1, item_1I = rng.normal(0, seed_sd, (n_S, 1)), rng.normal(0, item_sd, (1, n_I))
    return seed_S1 + item_1I + rng.normal(0, 1, (n_S, n_I))


def residual_squares(y_N: np.ndarray, *columns: np.ndarray) -> float:
    design = np.column_stack([np.ones(y_N.size), *columns])
    return float(((y_N - design @ np.linalg.lstsq(design, y_N, rcond=None)[0]) ** 2).sum())


def test_mean_squares_by_hand() -> None:
    assert mean_squares(SMALL_SI) == pytest.approx((16 / 2, 6 / 1, 4 / 2))


def test_crossed_variance_by_hand() -> None:
    variance, df = crossed_variance(SMALL_SI)
    assert variance == pytest.approx((8 + 6 - 2) / 6)
    assert df == pytest.approx(12**2 / (8**2 / 2 + 6**2 / 1 + 2**2 / 2))


def test_mean_squares_equal_regression_on_dummies() -> None:
    values_SI = sample(np.random.default_rng(0), 4, 7, 0.5, 2.0)
    seed, item = (np.repeat(np.arange(4), 7), np.tile(np.arange(7), 4))
    seed_dummies, item_dummies = np.eye(4)[seed][:, 1:], np.eye(7)[item][:, 1:]
    y = values_SI.ravel()
    both = residual_squares(y, seed_dummies, item_dummies)
    expected = (
        (residual_squares(y, item_dummies) - both) / 3,
        (residual_squares(y, seed_dummies) - both) / 6,
        both / 18,
    )
    assert mean_squares(values_SI) == pytest.approx(expected)


def test_interval_and_p_follow_from_variance_and_df() -> None:
    values_SI = sample(np.random.default_rng(1), 3, 20, 0.3, 1.0) + 0.8
    variance, df = crossed_variance(values_SI)
    difference = compare(values_SI.mean(1), values_SI)
    low, high = stats.t.interval(0.95, df, values_SI.mean(), math.sqrt(variance))
    assert (difference.low, difference.high) == pytest.approx((low, high))
    crossed_p = 2 * stats.t.cdf(-abs(values_SI.mean()) / math.sqrt(variance), df)
    assert difference.p == pytest.approx(max(crossed_p, stats.ttest_1samp(values_SI.mean(1), 0).pvalue))


@pytest.mark.parametrize(("along", "df"), [("items", 2), ("seeds", 4)])
def test_negative_component_falls_back_to_the_larger_mean_square(along: str, df: int) -> None:
    # Residuals that cancel along one direction leave its mean square near zero, below MS_residual.
    rng = np.random.default_rng(2)
    noise_SI = rng.normal(0, 1, (3, 5))
    noise_SI -= noise_SI.mean(0 if along == "items" else 1, keepdims=True)
    noise_SI = noise_SI + (0.1 * rng.normal(0, 1, (1, 5)) if along == "items" else 0.1 * rng.normal(0, 1, (3, 1)))
    ms_seed, ms_item, ms_residual = mean_squares(noise_SI)
    assert min(ms_seed, ms_item) < ms_residual
    variance, found = crossed_variance(noise_SI)
    assert variance == pytest.approx(max(ms_seed, ms_item) / 15)
    assert found == df


def test_without_items_it_is_the_paired_t_test() -> None:
    arm, reference = np.array([1.2, 1.9, 1.4]), np.array([1.0, 1.1, 1.3])
    expected = stats.ttest_rel(arm, reference)
    difference = compare(arm - reference)
    interval = expected.confidence_interval(0.95)
    assert difference.p == pytest.approx(expected.pvalue)
    assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high))
    assert (difference.seed_low, difference.seed_high) == (difference.low, difference.high)
    assert difference.n_items == 0


def test_diagnostics() -> None:
    values_SI = sample(np.random.default_rng(3), 3, 30, 0.2, 1.0)
    difference = compare(values_SI.mean(1), values_SI)
    interval = stats.ttest_1samp(values_SI.mean(1), 0).confidence_interval(0.95)
    assert (difference.seed_low, difference.seed_high) == pytest.approx((interval.low, interval.high))
    assert difference.item_se == pytest.approx(stats.sem(values_SI.mean(0)))


def test_one_seed_has_an_interval_over_items_and_no_p() -> None:
    values_SI = sample(np.random.default_rng(4), 1, 30, 0.0, 1.0) + 5
    difference = compare(values_SI.mean(1), values_SI)
    interval = stats.ttest_1samp(values_SI[0], 0).confidence_interval(0.95)
    assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high))
    assert math.isnan(difference.p)
    assert math.isnan(difference.seed_low)


def test_one_seed_without_items_says_nothing() -> None:
    difference = compare(np.array([0.3]))
    assert difference.estimate == 0.3
    assert all(math.isnan(x) for x in (difference.low, difference.high, difference.p))


def test_identical_results_differ_by_zero() -> None:
    difference = compare(np.zeros(3), np.zeros((3, 8)))
    assert (difference.estimate, difference.low, difference.high, difference.p) == (0, 0, 0, 1)


def test_no_spread_is_no_evidence() -> None:
    difference = compare(np.array([0.1 + 0.2, 0.3, 0.3]))  # 0.1 + 0.2 is not 0.3 in floating point
    assert math.isnan(difference.p)
    assert math.isnan(difference.low)


@given(
    arrays(float, (3, 6), elements=st.floats(-10, 10).map(lambda x: round(x, 3))),
    st.floats(0.1, 10),
)
def test_scale_and_sign(values_SI: np.ndarray, factor: float) -> None:
    plain, scaled = compare(values_SI.mean(1), values_SI), compare(-factor * values_SI.mean(1), -factor * values_SI)
    assert scaled.estimate == pytest.approx(-factor * plain.estimate, abs=1e-9)
    assert scaled.low == pytest.approx(-factor * plain.high, abs=1e-6, nan_ok=True)
    assert scaled.p == pytest.approx(plain.p, abs=1e-6, nan_ok=True)


@given(st.permutations(range(4)), st.permutations(range(6)))
def test_order_of_seeds_and_items_does_not_matter(seeds: list[int], items: list[int]) -> None:
    values_SI = sample(np.random.default_rng(5), 4, 6, 1.0, 1.0)
    shuffled_SI = values_SI[seeds][:, items]
    plain, shuffled = compare(values_SI.mean(1), values_SI), compare(shuffled_SI.mean(1), shuffled_SI)
    assert shuffled.p == pytest.approx(plain.p)
    assert shuffled.high == pytest.approx(plain.high)


def test_coverage_where_items_alone_undercover() -> None:
    """3 seeds × 50 items, 500 experiments without an effect: the interval must hold 0 in about 95 % of them."""
    rng = np.random.default_rng(6)
    crossed = items_only = bootstrap = 0
    for _ in range(500):
        values_SI = sample(rng, 3, 50, 0.4, 0.8)
        difference = compare(values_SI.mean(1), values_SI)
        crossed += difference.low <= 0 <= difference.high
        items_only += abs(difference.estimate) <= stats.t.isf(0.025, 49) * difference.item_se
        resampled = values_SI.mean(1)[rng.integers(0, 3, (400, 3))].mean(1)
        low, high = np.quantile(resampled, [0.025, 0.975])
        bootstrap += low <= 0 <= high
    assert 0.90 <= crossed / 500 <= 0.99
    assert items_only / 500 < 0.85
    assert bootstrap / 500 < 0.85


@pytest.mark.parametrize(("seed_sd", "item_sd"), [(0.0, 0.0), (0.3, 0.0), (0.1, 1.0), (1.0, 1.0)])
def test_p_keeps_its_level_in_the_tail_that_holm_reaches(seed_sd: float, item_sd: float) -> None:
    """A true null is rejected at 0.005 in 0.5 % of experiments; the crossed test alone does it in up to 3 %."""
    rng = np.random.default_rng(7)
    rejected = 0
    for _ in range(2000):
        values_SI = sample(rng, 3, 50, seed_sd, item_sd)
        rejected += compare(values_SI.mean(1), values_SI).p < 0.005
    assert rejected <= stats.binom.isf(1e-4, 2000, 0.005)

"""entkd.stats.gap against Fieller's closed form, the t interval and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from entkd.stats import fieller


def closed_form(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Fieller (1954) in the form with g = t² v_yy / Ȳ²."""
    n, t = len(x), stats.t.ppf(0.975, len(x) - 1)
    v11, v22 = x.var(ddof=1) / n, y.var(ddof=1) / n
    v12 = ((x - x.mean()) * (y - y.mean())).sum() / (n - 1) / n
    ratio, g = x.mean() / y.mean(), t**2 * v22 / y.mean() ** 2
    root = math.sqrt(v11 - 2 * ratio * v12 + ratio**2 * v22 - g * (v11 - v12**2 / v22))
    centre, half = ratio - g * v12 / v22, t / y.mean() * root
    return (centre - half) / (1 - g), (centre + half) / (1 - g)


@pytest.mark.parametrize("n", [3, 5, 12])
def test_equals_the_closed_form(n: int) -> None:
    rng = np.random.default_rng(n)
    common = rng.normal(0, 0.1, n)
    x, y = 1.2 + common + rng.normal(0, 0.1, n), 2.5 + common + rng.normal(0, 0.1, n)
    ratio, low, high = fieller(x, y)
    assert ratio == pytest.approx(x.mean() / y.mean())
    assert (low, high) == pytest.approx(closed_form(x, y))


def test_constant_gap_gives_the_t_interval() -> None:
    x = np.array([0.3, 0.5, 0.45])
    interval = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert fieller(x, np.full(3, 2.0)) == pytest.approx((x.mean() / 2, interval.low / 2, interval.high / 2))


def test_gap_that_may_be_zero_and_one_seed_have_no_interval() -> None:
    assert np.isnan(fieller(np.array([1.0, 2.0, 1.5]), np.array([2.0, -1.0, 0.5]))[1:]).all()
    ratio, low, high = fieller(np.array([1.0]), np.array([4.0]))
    assert ratio == 0.25
    assert math.isnan(low)
    assert math.isnan(high)


def test_coverage() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        common = rng.normal(0, 0.3, 4)
        _, low, high = fieller(1.0 + common + rng.normal(0, 0.2, 4), 4.0 + common + rng.normal(0, 0.3, 4))
        held += low <= 0.25 <= high
    assert held / 1000 == pytest.approx(0.95, abs=0.025)

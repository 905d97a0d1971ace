"""entkd.stats.power against integration over the sample sd, and against simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, stats

from entkd.stats import power, seeds_needed, smallest_detectable


def integrated_power(shift: float, df: float, alpha: float) -> float:
    """P(|Z + shift| > c·s), integrating over the normal Z; s² is χ²/df."""
    critical = stats.t.ppf(1 - alpha / 2, df)

    def rejects(z: float) -> float:
        return stats.norm.pdf(z) * stats.chi2.cdf(df * ((z + shift) / critical) ** 2, df)

    return integrate.quad(rejects, -10, 10, points=[-shift] if shift < 10 else None, limit=200)[0]


@pytest.mark.parametrize("df", [1, 2, 3.7, 14, 200])
@pytest.mark.parametrize("alpha", [0.05, 0.0125, 0.001])
@pytest.mark.parametrize("shift", [0.0, 0.5, 4.0, 60.0])
def test_power_equals_integration(df: float, alpha: float, shift: float) -> None:
    assert power(shift, df, alpha) == pytest.approx(integrated_power(shift, df, alpha), abs=1e-6)


def test_smallest_detectable_by_simulation() -> None:
    """Paired t over 3 seeds, sd 0.7: an effect of the stated size is found in 80 % of experiments."""
    rng = np.random.default_rng(0)
    effect = smallest_detectable(0.7 / math.sqrt(3), 2, 0.05, 0.8)
    differences = rng.normal(effect, 0.7, (40000, 3))
    found = stats.ttest_1samp(differences, 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.01)


def test_smallest_detectable_is_unknown_without_an_error() -> None:
    assert math.isnan(smallest_detectable(math.nan, 2, 0.05, 0.8))
    assert math.isnan(smallest_detectable(0.0, 2, 0.05, 0.8))
    assert math.isnan(smallest_detectable(0.1, 0, 0.05, 0.8))


@pytest.mark.parametrize(("estimate", "variance"), [(1.0, 1.0), (0.5, 0.5), (3.0, 0.4)])
def test_seeds_needed_is_the_first_number_that_suffices(estimate: float, variance: float) -> None:
    expected = 2
    while integrated_power(estimate / math.sqrt(variance / expected), 7 * (expected - 1), 0.0125) < 0.8:
        expected += 1
    assert seeds_needed(estimate, variance, lambda n: 7 * (n - 1), 0.0125, 0.8) == expected


def test_seeds_needed_is_blank_where_no_number_helps() -> None:
    assert math.isnan(seeds_needed(1e-6, 1.0, lambda n: n - 1, 0.05, 0.8))
    assert math.isnan(seeds_needed(0.0, 1.0, lambda n: n - 1, 0.05, 0.8))
    assert math.isnan(seeds_needed(1.0, math.nan, lambda n: n - 1, 0.05, 0.8))

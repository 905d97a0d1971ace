"""entkd.stats.families by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entkd.stats import claim, holm


def test_holm_by_hand() -> None:
    # sorted: 0.005·4 = 0.02, 0.011·3 = 0.033, 0.02·2 = 0.04, 0.04·1 = 0.04
    assert holm([0.02, 0.005, 0.04, 0.011]) == pytest.approx([0.04, 0.02, 0.04, 0.033])


def test_holm_is_monotone_and_capped() -> None:
    # sorted: 0.01·3 = 0.03, 0.4·2 = 0.8, 0.7·1 = 0.7 → not below 0.8
    assert holm([0.7, 0.01, 0.4]) == pytest.approx([0.8, 0.03, 0.8])
    assert holm([0.6, 0.9]) == pytest.approx([1.0, 1.0])


def test_holm_leaves_out_what_was_not_tested() -> None:
    assert holm([np.nan, 0.02, 0.03]) == pytest.approx([np.nan, 0.04, 0.04], nan_ok=True)
    assert holm([]).size == 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.2))
def test_holm_rejects_as_the_step_down_procedure(p: list[float], alpha: float) -> None:
    rejected, remaining = set(), sorted(range(len(p)), key=lambda k: p[k])
    while remaining and p[remaining[0]] * len(remaining) < alpha:
        rejected.add(remaining.pop(0))
    assert {k for k, adjusted in enumerate(holm(p)) if adjusted < alpha} == rejected


def test_claims() -> None:
    assert claim(0.049, 0.1, "higher", 0.05) == "better"
    assert claim(0.049, 0.1, "lower", 0.05) == "worse"
    assert claim(0.05, 0.1, "higher", 0.05) == "not shown"
    assert claim(math.nan, 0.1, "higher", 0.05) == "not shown"


@given(st.floats(0, 1), st.floats(-1, 1).filter(lambda x: x != 0))
def test_the_other_direction_flips_the_claim(p: float, estimate: float) -> None:
    flipped = {"better": "worse", "worse": "better", "not shown": "not shown"}
    higher = claim(p, estimate, "higher", 0.05)
    assert claim(p, estimate, "lower", 0.05) == flipped[higher] == claim(p, -estimate, "higher", 0.05)

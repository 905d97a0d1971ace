"""Token temperatures (method limits 4, 7, 12)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entkd.config import Temperature
from entkd.temperature import loss_scale, token_temperature


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=30), st.floats(-3, 3), st.floats(0.1, 10))
def test_monotone_between_its_bounds(values, c, base):
    d = torch.tensor(sorted(values))
    t = token_temperature(d, Temperature(c=c, base=base)).double()
    steps = t.diff()
    assert (steps >= 0).all() if c >= 0 else (steps <= 0).all()
    assert t.min().item() >= base * math.exp(-abs(c)) * (1 - 1e-6)
    assert t.max().item() <= base * math.exp(abs(c)) * (1 + 1e-6)


def test_by_hand():
    d = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    expected = [2 * math.exp(-0.5), 2 * math.exp(-0.25), 2.0, 2 * math.exp(0.5)]
    assert token_temperature(d, Temperature(base=2.0, c=0.5)).tolist() == pytest.approx(expected)
    assert token_temperature(d, Temperature(base=2.0, c=-0.5)).tolist() == pytest.approx(
        [2 * math.exp(0.5), 2 * math.exp(0.25), 2.0, 2 * math.exp(-0.5)]
    )
    assert token_temperature(d, Temperature(base=3.0, c=0.0)).tolist() == [3.0] * 4


def test_scales():
    t = torch.tensor([0.5, 1.0, 3.0])
    assert loss_scale(t, "per_token").tolist() == [0.25, 1.0, 9.0]
    assert loss_scale(t, "linear").tolist() == [0.5, 1.0, 3.0]
    assert loss_scale(t, "off").tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="per_token, linear and off"):
        loss_scale(t, "square")


def test_no_gradient():
    d = torch.rand(4, requires_grad=True)
    assert not token_temperature(d, Temperature()).requires_grad
    for t2 in ("per_token", "linear", "off"):
        assert not loss_scale(torch.rand(4, requires_grad=True), t2).requires_grad

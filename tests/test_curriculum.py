"""Curriculum weights and progress (method limits 2, 3, 7, 12)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import formulas

from entkd.config import Curriculum
from entkd.curriculum import progress_schedule, raw_weights, token_weights

DIFFICULTIES = st.lists(st.floats(0, 1), min_size=1, max_size=40).map(lambda d: torch.tensor(d, dtype=torch.float32))
GRID = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000


@settings(max_examples=80, deadline=None)
@given(DIFFICULTIES, st.floats(0, 1), st.floats(-0.95, 0.95))
def test_soft_follows_the_formula_and_has_mean_one(d, u, kappa):
    weights = token_weights(d, u, Curriculum(kappa=kappa))
    raw = np.array([formulas.soft_weight(x, u, kappa) for x in d.double().tolist()])
    np.testing.assert_allclose(weights.numpy(), raw / raw.mean(), rtol=2e-5, atol=1e-6)
    assert weights.double().mean().item() == pytest.approx(1, abs=1e-6)


@settings(max_examples=80, deadline=None)
@given(DIFFICULTIES, st.floats(0, 1), st.floats(-5, 5))
def test_exp_follows_the_formula_and_has_mean_one(d, u, kappa):
    weights = token_weights(d, u, Curriculum(shape="exp", kappa=kappa))
    raw = np.array([math.exp(kappa * (2 * u - 1) * (2 * x - 1)) for x in d.double().tolist()])
    np.testing.assert_allclose(weights.numpy(), raw / raw.mean(), rtol=2e-5)
    assert weights.double().mean().item() == pytest.approx(1, abs=1e-5)


@settings(max_examples=80, deadline=None)
@given(DIFFICULTIES, st.floats(0, 1), st.floats(0.05, 1))
def test_window_has_mean_one_or_is_empty(d, u, width):
    weights = token_weights(d, u, Curriculum(shape="window", window=width))
    low = u * (1 - width)
    inside = (d.double() > low + 1e-6) & (d.double() < low + width - 1e-6)
    outside = (d.double() < low - 1e-6) | (d.double() > low + width + 1e-6)
    assert (weights[outside] == 0).all()
    if inside.any():
        assert (weights[inside] > 0).all()
    if weights.any():
        assert weights.double().mean().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("u", [0.0, 0.37, 1.0])
def test_window_keeps_its_share_of_a_uniform_difficulty(u):
    raw = raw_weights(GRID, u, Curriculum(shape="window", window=0.3))
    assert set(raw.tolist()) == {0.0, 1 / 0.3}
    assert raw.mean().item() == pytest.approx(1, abs=0.01)
    kept = GRID[raw > 0]
    assert kept.min().item() == pytest.approx(0.7 * u, abs=2e-3)
    assert kept.max().item() == pytest.approx(0.7 * u + 0.3, abs=2e-3)


def test_window_holds_both_ends_of_the_difficulty():
    settings_ = Curriculum(shape="window", window=0.3)
    assert raw_weights(torch.tensor([0.0, 1.0]), 0.0, settings_).tolist() == pytest.approx([1 / 0.3, 0.0])
    assert raw_weights(torch.tensor([0.0, 1.0]), 1.0, settings_).tolist() == pytest.approx([0.0, 1 / 0.3])


def test_an_empty_window_gives_zero_not_nan():
    weights = token_weights(torch.tensor([0.1, 0.2]), 1.0, Curriculum(shape="window", window=0.2))
    assert weights.tolist() == [0.0, 0.0]
    assert token_weights(torch.zeros(0), 0.3, Curriculum()).shape == (0,)


@pytest.mark.parametrize("shape", ["soft", "exp"])
def test_half_way_and_kappa_zero_are_vanilla(shape):
    d = torch.rand(30, generator=torch.Generator().manual_seed(0))
    assert (token_weights(d, 0.5, Curriculum(shape=shape)) == 1).all()
    assert (token_weights(d, 0.9, Curriculum(shape=shape, kappa=0)) == 1).all()
    assert (token_weights(torch.full((5,), 0.5), 0.1, Curriculum(shape=shape)) == 1).all()


def test_the_mean_moves_from_low_to_high_entropy():
    for u, sign in ((0.0, -1), (1.0, 1)):
        w = token_weights(GRID, u, Curriculum(kappa=0.8))
        # Population mean of w·d for uniform d: 1/2 ± κ/6.
        assert (w * GRID).mean().item() == pytest.approx(0.5 + sign * 0.8 / 6, abs=1e-4)
    anti = token_weights(GRID, 0.2, Curriculum(kappa=-0.8))
    torch.testing.assert_close(anti, token_weights(GRID, 0.8, Curriculum(kappa=0.8)))


def test_a_global_normaliser_makes_micro_batches_add_up():
    d = torch.rand(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = token_weights(d, 0.9, Curriculum())
    normaliser = raw_weights(d, 0.9, Curriculum()).mean()
    parts = torch.cat([token_weights(part, 0.9, Curriculum(), normaliser) for part in d.split([3, 17, 20])])
    torch.testing.assert_close(parts, whole)


def test_weights_carry_no_gradient():
    d = torch.rand(5, requires_grad=True)
    for shape in ("soft", "exp", "window"):
        assert not token_weights(d, 0.2, Curriculum(shape=shape)).requires_grad


def test_progress_by_hand():
    assert progress_schedule([1.0, 1.0, 2.0], "lr") == pytest.approx([0.125, 0.375, 0.75])
    assert progress_schedule([1.0, 1.0, 2.0, 9.0], "step") == pytest.approx([0.125, 0.375, 0.625, 0.875])
    assert progress_schedule([1.0, 2.0], "easy") == [0.0, 0.0]
    assert progress_schedule([1.0, 2.0], "hard") == [1.0, 1.0]
    assert progress_schedule([3e-4] * 5, "lr") == pytest.approx(progress_schedule([3e-4] * 5, "step"))


def test_under_a_cosine_schedule_only_lr_progress_is_balanced():
    steps = 2000
    lrs = [0.5 * (1 + math.cos(math.pi * (s + 0.5) / steps)) for s in range(steps)]
    means = {}
    for kind in ("lr", "step"):
        u = np.array(progress_schedule(lrs, kind))
        means[kind] = float((np.array(lrs) * (2 * u - 1)).sum() / sum(lrs))
    assert means["lr"] == pytest.approx(0, abs=1e-9)
    assert means["step"] == pytest.approx(-4 / math.pi**2, abs=1e-4)


def test_bad_progress_is_refused():
    with pytest.raises(ValueError, match="learning rate above 0"):
        progress_schedule([0.0, 0.0], "lr")
    with pytest.raises(ValueError, match="lr, step, easy and hard"):
        progress_schedule([1.0], "linear")

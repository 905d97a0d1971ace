"""The plan of a step: what the three components say of a global batch (method limits 1, 2, 12)."""

from __future__ import annotations

import math

import pytest
import torch

from entkd.components import token_plan
from entkd.config import Method

GRID = (torch.arange(4000) + 0.5) / 4000  # a uniform difficulty


def method(**components):
    return Method(divergence="forward_kl", **components)


def test_vanilla_needs_and_gives_nothing():
    plan = token_plan(None, 0.3, method())
    assert (plan.weight_N, plan.temperature_N, plan.features_N) == (None, None, None)
    assert plan.summary == {"weight_mean": 1.0, "weight_scale_mean": 1.0, "temperature_mean": 1.0, "hard": 0}


@pytest.mark.parametrize(("u", "sign"), [(0.0, -1), (1.0, 1)])
def test_the_drift_of_weight_times_scale_is_logged(u, sign):
    """For uniform d, κ = 0.8 and c = ½: ½∫ eˣ(1 ± 0.8x) dx over [-1, 1] = sinh 1 ± 0.8/e, i.e. 0.88 and 1.47."""
    plan = token_plan(GRID, u, method(curriculum={}, temperature={}))
    assert plan.summary["weight_scale_mean"] == pytest.approx(math.sinh(1) + sign * 0.8 / math.e, abs=1e-4)
    assert plan.summary["weight_mean"] == pytest.approx(1, abs=1e-6)
    assert plan.summary["temperature_mean"] == pytest.approx(math.sinh(0.5) / 0.5, abs=1e-4)


@pytest.mark.parametrize("shape", ["soft", "exp"])
def test_weights_have_mean_one_over_a_batch_of_easy_tokens(shape):
    plan = token_plan(GRID**3, 0.9, method(curriculum={"shape": shape}))
    assert plan.weight_N.double().mean().item() == pytest.approx(1, abs=1e-6)
    assert plan.summary["weight_scale_mean"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("t2", ["per_token", "linear", "off"])
@pytest.mark.parametrize("curriculum", [None, {}])
def test_joint_normalisation_makes_the_mean_of_weight_times_scale_one(t2, curriculum):
    temperature = {"t2": t2, "normalise": "joint", "base": 2.0}
    plan = token_plan(GRID, 0.9, method(curriculum=curriculum, temperature=temperature))
    scale = {"per_token": plan.temperature_N**2, "linear": plan.temperature_N, "off": torch.ones(4000)}[t2]
    assert (plan.weight_N * scale).double().mean().item() == pytest.approx(1, abs=1e-5)
    free = token_plan(GRID, 0.9, method(curriculum=curriculum, temperature=temperature | {"normalise": "none"}))
    base = torch.ones(4000) if free.weight_N is None else free.weight_N
    ratio = plan.weight_N / base
    assert ratio.std().item() == pytest.approx(0, abs=1e-6)
    assert ratio[0].item() == pytest.approx(1 / plan.summary["weight_scale_mean"], rel=1e-5)


def test_features_are_chosen_and_counted():
    plan = token_plan(GRID, 0.1, method(features={}))
    assert plan.weight_N is None
    assert plan.temperature_N is None
    assert plan.summary["hard"] == int(plan.features_N.sum()) == 800
    seeded = method(features={"tokens": "random"})
    a, b = (token_plan(GRID, 0.1, seeded, torch.arange(4000), seed=seed).features_N for seed in (0, 1))
    assert not torch.equal(a, b)


def test_an_empty_window_zeroes_the_loss_even_jointly():
    d = torch.full((6,), 0.5)
    arm = method(curriculum={"shape": "window", "window": 0.2}, temperature={"normalise": "joint"})
    plan = token_plan(d, 0.0, arm)
    assert plan.weight_N.tolist() == [0.0] * 6
    assert plan.summary["weight_scale_mean"] == 0


def test_a_batch_without_tokens():
    arm = method(curriculum={}, temperature={"normalise": "joint"}, features={})
    plan = token_plan(torch.zeros(0), 0.5, arm)
    assert len(plan.weight_N) == len(plan.temperature_N) == len(plan.features_N) == 0


def test_a_missing_difficulty_is_named():
    with pytest.raises(ValueError, match="difficulty_N"):
        token_plan(None, 0.5, method(curriculum={}))

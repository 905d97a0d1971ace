"""Limits of the method across its parts: plan, features and fused divergence together (docs/method.md, section 10)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import formulas

from entkd.components import token_plan
from entkd.config import DIVERGENCE_NAMES, Method
from entkd.divergences import DIVERGENCES
from entkd.entropy import Difficulty, token_entropy
from entkd.features import Projectors, feature_loss
from entkd.fused import linear_divergence

N, D, E, V = 12, 5, 7, 15
FULL = {"curriculum": {}, "temperature": {"base": 1.3}, "features": {"threshold": 0.5}}
KINK = ("tvd",)
FINITE = [name for name in DIVERGENCE_NAMES if not Method(divergence=name).divergence.contains_reverse_kl]
"""Where a teacher excludes a token."""


def problem(seed=0, n=N):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n, D), (V, D), (n, E), (V, E))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def difficulty(teacher_hidden, teacher_weight):
    entropy = token_entropy(teacher_hidden @ teacher_weight.T)
    return Difficulty.fit(entropy)(entropy)


def run(method, tensors, progress=0.8, micro_batches=1, d=None, projector=None):
    """Total of section 5 over one global batch cut into micro-batches, with dh and dW."""
    h, w = (tensor.clone().requires_grad_() for tensor in tensors[:2])
    d = difficulty(*tensors[2:]) if d is None else d
    plan = token_plan(d, progress, method)
    n, hard, total = len(h), plan.summary["hard"], 0.0
    for rows in torch.arange(n).tensor_split(micro_batches):
        loss = linear_divergence(
            h[rows],
            w,
            tensors[2][rows],
            tensors[3],
            divergence=method.divergence.name,
            settings=method.divergence.parameters(),
            weight_N=None if plan.weight_N is None else plan.weight_N[rows],
            temperature_N=None if plan.temperature_N is None else plan.temperature_N[rows],
            t2=method.temperature.t2 if method.temperature else "per_token",
        ) / max(1, n)
        if projector is not None:
            chosen = rows[plan.features_N[rows]]
            term = feature_loss(h[chosen], tensors[2][chosen], projector, method.features.loss)
            loss = loss + method.features.weight * term / max(1, hard)
        loss.backward()
        total += loss.item()
    return total, h.grad, w.grad


def vanilla(name, tensors):
    """(1/N) Σ D and its gradients at T = 1, from the formulas."""
    h, w, th, tw = (tensor.numpy() for tensor in tensors)
    value, dh, dw = 0.0, np.zeros_like(h), np.zeros_like(w)
    for i in range(len(h)):
        z, teacher = w @ h[i], tw @ th[i]
        value += formulas.divergence(name, z, teacher) / len(h)
        dz = formulas.gradient(name, z, teacher) / len(h)
        dh[i] = dz @ w
        dw += np.outer(dz, h[i])
    return value, dh, dw


def assert_equal(result, expected, tolerance):
    for got, want in zip(result, expected, strict=True):
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", DIVERGENCE_NAMES)
@pytest.mark.parametrize(
    "components",
    [
        {},
        {"curriculum": {"kappa": 0}, "temperature": {"c": 0}},
        {"curriculum": {"kappa": 0, "shape": "exp"}},
        {"curriculum": {"kappa": 0}, "temperature": {"c": 0, "normalise": "joint"}},
    ],
)
def test_1_neutral_components_are_vanilla_distillation(name, components):
    tensors = problem()
    assert_equal(run(Method(divergence=name, **components), tensors), vanilla(name, tensors), 1e-6)


@pytest.mark.parametrize("shape", ["soft", "exp"])
def test_3_half_way_is_vanilla(shape):
    tensors = problem()
    method = Method(divergence="forward_kl", curriculum={"shape": shape})
    assert_equal(run(method, tensors, progress=0.5), vanilla("forward_kl", tensors), 1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_5_the_gradient_of_a_token_is_t_times_q_minus_p(temperature):
    """Through an identity projection dh is d ℓ / d z, the factor T² included."""
    generator = torch.Generator().manual_seed(3)
    z, teacher = (torch.randn(4, V, generator=generator, dtype=torch.float64) for _ in range(2))
    eye, temperatures = torch.eye(V, dtype=torch.float64), torch.full((4,), temperature, dtype=torch.float64)

    def loss(logits):
        return linear_divergence(logits, eye, teacher, eye, divergence="forward_kl", temperature_N=temperatures)

    z.requires_grad_()
    loss(z).backward()
    for row in range(4):
        q = formulas.softmax(z[row].detach().numpy(), temperature)
        p = formulas.softmax(teacher[row].numpy(), temperature)
        np.testing.assert_allclose(z.grad[row].numpy(), temperature * (q - p), atol=1e-12)
    step = 1e-6
    for row, column in ((0, 0), (1, 7), (3, 14)):
        shift = torch.zeros_like(z)
        shift[row, column] = step
        with torch.no_grad():
            slope = (loss(z + shift) - loss(z - shift)).item() / (2 * step)
        assert z.grad[row, column].item() == pytest.approx(slope, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", DIVERGENCE_NAMES)
def test_7_equal_entropies_are_vanilla_at_the_base_temperature(name):
    h, w, _, tw = problem()
    th = torch.randn(1, E, generator=torch.Generator().manual_seed(4), dtype=torch.float64).expand(N, E)
    tensors = [h, w, th.contiguous(), tw]
    method = Method(divergence=name, curriculum={}, temperature={})
    assert_equal(run(method, tensors), vanilla(name, tensors), 1e-6)


@pytest.mark.parametrize("name", FINITE)
@pytest.mark.parametrize("low", [-math.inf, -1e4])
def test_7_one_hot_teachers_have_no_entropy_and_finite_losses(name, low):
    logits = torch.full((N, V), low)
    logits[torch.arange(N), torch.arange(N)] = 0.0
    entropy = token_entropy(logits)
    assert (entropy == 0).all()
    d = Difficulty.fit(entropy)(entropy)
    assert (d == 0.5).all()
    h, w, _, _ = problem()
    plan = token_plan(d, 0.9, Method(divergence=name, curriculum={}, temperature={"base": 2.0}))
    z = (h @ w.T).float().requires_grad_()
    value = DIVERGENCES[name](z, logits, plan.temperature_N)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(z.grad).all()
    # Fused: a teacher of width 1 whose projection holds one row of logits.
    h, w = h.requires_grad_(), w.requires_grad_()
    one, column = torch.ones(N, 1), logits[:1].T
    total = linear_divergence(h, w, one, column, divergence=name, temperature_N=plan.temperature_N)
    total.backward()
    student = (h @ w.T).detach().numpy()
    expected = sum(4 * formulas.divergence(name, row, logits[0].numpy(), 2.0) for row in student)
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert torch.isfinite(h.grad).all()
    assert torch.isfinite(w.grad).all()


@pytest.mark.parametrize("name", DIVERGENCE_NAMES)
def test_8_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(name):
    h, w, _, _ = problem()
    method = Method(divergence=name, curriculum={}, temperature={"c": -0.5})
    value, dh, dw = run(method, [h, w, h.clone(), w.clone()])
    assert value == pytest.approx(0, abs=1e-12)
    if name not in KINK:
        assert dh.abs().max() < 1e-12
        assert dw.abs().max() < 1e-12


def test_9_a_batch_without_hard_tokens_has_zero_projector_gradients():
    (projector,) = Projectors(D, E, pairs=1)
    method = Method(divergence="forward_kl", **FULL)
    run(method, problem(), d=torch.zeros(N), projector=projector.double())
    assert projector.weight.grad is not None
    assert (projector.weight.grad == 0).all()


@pytest.mark.parametrize("name", ["forward_kl", "adaptive_kl", "alpha_beta"])
@pytest.mark.parametrize(
    "components",
    [
        FULL,
        {"curriculum": {"shape": "window"}, "temperature": {"normalise": "joint"}, "features": {"threshold": 0.9}},
    ],
)
def test_11_micro_batches_change_neither_loss_nor_gradient(name, components):
    method = Method(divergence=name, **components)
    results = []
    for micro_batches in (1, 3, 5, N, N + 4):  # the last has micro-batches without a token
        (projector,) = Projectors(D, E, pairs=1, generator=torch.Generator().manual_seed(0))
        projector = projector.double()
        result = run(method, problem(), micro_batches=micro_batches, projector=projector)
        results.append((*result, projector.weight.grad))
    for result in results[1:]:
        assert_equal(result, results[0], 1e-12)


def test_12_the_gradient_takes_weights_and_temperatures_as_constants():
    """Differentiating the loss with w and T held fixed, by finite differences in the student's weight."""
    tensors, method = problem(), Method(divergence="jsd", curriculum={}, temperature={})
    _, _, dw = run(method, tensors)
    h, w, th, tw = (tensor.numpy() for tensor in tensors)
    d = difficulty(*tensors[2:]).double().numpy()
    weights = np.array([formulas.soft_weight(x, 0.8, 0.8) for x in d])
    temperatures = np.exp(0.5 * (2 * d - 1))
    expected = np.zeros_like(w)
    for i in range(N):
        factor = weights[i] / weights.mean() * temperatures[i] ** 2 / N
        expected += factor * np.outer(formulas.gradient("jsd", w @ h[i], tw @ th[i], temperatures[i]), h[i])
    assert_equal([dw], [expected], 1e-6)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(DIVERGENCE_NAMES), st.integers(0, 1000), st.floats(0, 1))
def test_14_order_of_tokens_and_vocabulary_change_nothing(name, seed, progress):
    h, w, th, tw = problem(seed)
    method = Method(divergence=name, curriculum={}, temperature={})
    value, dh, dw = run(method, [h, w, th, tw], progress=progress)
    generator = torch.Generator().manual_seed(seed)
    tokens, entries = torch.randperm(N, generator=generator), torch.randperm(V, generator=generator)
    shuffled = run(method, [h[tokens], w[entries], th[tokens], tw[entries]], progress=progress)
    assert_equal(shuffled, (value, dh[tokens], dw[entries]), 1e-6)


@pytest.mark.parametrize(("name", "parameters"), formulas.OTHER_SETTINGS)
def test_17_settings_reach_the_formula(name, parameters):
    tensors = problem()
    value, _, _ = run(Method(divergence={"name": name} | parameters), tensors)
    h, w, th, tw = (tensor.numpy() for tensor in tensors)
    expected = np.mean([formulas.divergence(name, w @ h[i], tw @ th[i], **parameters) for i in range(N)])
    default = np.mean([formulas.divergence(name, w @ h[i], tw @ th[i]) for i in range(N)])
    assert value == pytest.approx(expected, rel=1e-9)
    assert abs(default - expected) > 1e-4 * expected

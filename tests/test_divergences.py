"""The nine dense divergences against a second implementation in fp64 (method limits 5, 7, 8, 14, 17)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from references import formulas

from entkd.config import DIVERGENCE_NAMES
from entkd.config.method import Divergence
from entkd.divergences import DIVERGENCES

CASES = [(name, {}) for name in DIVERGENCE_NAMES] + formulas.OTHER_SETTINGS
STUDENT = [1.0, 0.0, -1.0, 0.5]
TEACHER = [2.0, 0.0, 0.0, -1.0]
GOLDEN = {
    ("forward_kl", 1): 0.163992056129,
    ("reverse_kl", 1): 0.21082428691,
    ("jsd", 1): 0.0447659683788,
    ("skew_kl", 1): 0.13666258887,
    ("skew_reverse_kl", 1): 0.157131427866,
    ("adaptive_kl", 1): 0.192292972867,
    ("alpha_beta", 1): 0.229920777577,
    ("todi", 1): 0.374816343039,
    ("tvd", 1): 0.253297753903,
}
"""By name and version of the formula, at T = 1.5; computed by ``references.formulas``."""


def contains_reverse_kl(name, **parameters):
    return TypeAdapter(Divergence).validate_python({"name": name} | parameters).contains_reverse_kl


def logits(n, vocab, seed, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(n, vocab, generator=generator, dtype=torch.float64) for _ in range(2))


def value_and_gradient(name, student, teacher, temperature=None, **settings_):
    student = student.clone().requires_grad_()
    value = DIVERGENCES[name](student, teacher, temperature, **settings_)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient


def test_every_name_of_the_settings_has_a_function_that_takes_its_parameters():
    assert set(DIVERGENCES) == set(DIVERGENCE_NAMES)
    student, teacher = logits(2, 6, 0)
    for name in DIVERGENCE_NAMES:
        parameters = TypeAdapter(Divergence).validate_python({"name": name}).parameters()
        assert parameters == formulas.SETTINGS[name]  # the defaults are the method's
        assert torch.equal(DIVERGENCES[name](student, teacher, **parameters), DIVERGENCES[name](student, teacher))


@pytest.mark.parametrize(("name", "settings_"), CASES)
@pytest.mark.parametrize("temperature", [None, 0.5, 1.0, 2.0, 4.0])
def test_value_and_gradient(name, settings_, temperature):
    student, teacher = logits(3, 11, 1)
    t = 1.0 if temperature is None else temperature
    temperatures = None if temperature is None else torch.full((3,), temperature, dtype=torch.float64)
    value, gradient = value_and_gradient(name, student, teacher, temperatures, **settings_)
    for row, (s, z) in enumerate(zip(student.numpy(), teacher.numpy(), strict=True)):
        assert value[row].item() == pytest.approx(formulas.divergence(name, s, z, t, **settings_), rel=1e-10, abs=1e-12)
        expected = formulas.gradient(name, s, z, t, **settings_)
        np.testing.assert_allclose(gradient[row].numpy(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("name", "settings_"), CASES)
def test_each_token_has_its_own_temperature(name, settings_):
    student, teacher = logits(4, 9, 2)
    temperatures = torch.tensor([0.6, 1.0, 1.7, 3.0], dtype=torch.float64)
    value = DIVERGENCES[name](student, teacher, temperatures, **settings_)
    expected = [
        formulas.divergence(name, s, z, t, **settings_)
        for s, z, t in zip(student.numpy(), teacher.numpy(), temperatures.tolist(), strict=True)
    ]
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("name", DIVERGENCE_NAMES)
def test_low_precision_inputs_are_computed_in_fp32(name):
    student, teacher = (z.bfloat16() for z in logits(5, 150, 3))
    value = DIVERGENCES[name](student, teacher)
    assert value.dtype == torch.float32
    expected = [formulas.divergence(name, s, z) for s, z in zip(student.double(), teacher.double(), strict=True)]
    np.testing.assert_allclose(value.numpy(), expected, rtol=2e-5)
    assert DIVERGENCES[name](student.double(), teacher).dtype == torch.float64


@pytest.mark.parametrize(("name", "settings_"), CASES)
def test_identical_distributions_give_zero(name, settings_):
    _, teacher = logits(4, 30, 4)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        z = teacher.to(dtype)
        value, gradient = value_and_gradient(name, z, z + 2.5, torch.full((4,), 1.5, dtype=dtype), **settings_)
        assert value.abs().max() < tolerance
        assert torch.isfinite(gradient).all()
        if name != "tvd":  # at its kink any subgradient will do
            assert gradient.abs().max() < tolerance
    same, at_kink = value_and_gradient("tvd", teacher, teacher)
    assert (same == 0).all()
    assert (at_kink == 0).all()


@pytest.mark.parametrize(("name", "settings_"), CASES)
def test_a_one_hot_teacher(name, settings_):
    student, _ = logits(2, 6, 5)
    teacher = torch.full((2, 6), -math.inf, dtype=torch.float64)
    teacher[0, 2] = teacher[1, 5] = 1.0
    temperatures = torch.tensor([1.0, 2.0], dtype=torch.float64)
    value, gradient = value_and_gradient(name, student, teacher, temperatures, **settings_)
    if contains_reverse_kl(name, **settings_):
        assert torch.isinf(value).all()
        assert (value > 0).all()
    else:
        expected = [
            formulas.divergence(name, s, z, t, **settings_)
            for s, z, t in zip(student.numpy(), teacher.numpy(), temperatures.tolist(), strict=True)
        ]
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-10)
        assert torch.isfinite(gradient).all()
        assert gradient.abs().sum() > 0
    near = teacher.clamp_min(-1e4)
    for dtype in (torch.float32, torch.float64):
        value, gradient = value_and_gradient(name, student.to(dtype), near.to(dtype), temperatures, **settings_)
        assert torch.isfinite(value).all()
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(("name", "settings_"), CASES)
def test_extreme_logits_stay_finite(name, settings_):
    teacher = torch.tensor([[0.0, -1e4, 30.0], [1e4, 0.0, -1e4], [0.0, 0.0, 0.0]])
    for student in (teacher.flip(-1), teacher.flip(0), -teacher, teacher):
        value, gradient = value_and_gradient(name, student, teacher, **settings_)
        assert torch.isfinite(value).all()
        assert torch.isfinite(gradient).all()
        assert (value > -1e-5).all()


@pytest.mark.parametrize("name", [name for name in DIVERGENCE_NAMES if not contains_reverse_kl(name)])
def test_entries_that_both_exclude_do_not_exist(name):
    student, teacher = logits(2, 5, 6)
    excluded = torch.full((2, 2), -math.inf, dtype=torch.float64)
    value, gradient = value_and_gradient(name, torch.cat([student, excluded], 1), torch.cat([teacher, excluded], 1))
    alone, gradient_alone = value_and_gradient(name, student, teacher)
    torch.testing.assert_close(value, alone)
    torch.testing.assert_close(gradient, torch.cat([gradient_alone, torch.zeros(2, 2, dtype=torch.float64)], 1))


def test_jsd_tends_to_both_kls_by_its_quotients():
    student, teacher = logits(5, 20, 7, scale=1.0)
    beta = 1e-6
    for end, name in ((beta, "forward_kl"), (1 - beta, "reverse_kl")):
        limit = [formulas.divergence(name, s, z) for s, z in zip(student.numpy(), teacher.numpy(), strict=True)]
        value = DIVERGENCES["jsd"](student, teacher, beta=end)
        np.testing.assert_allclose((value / beta).numpy(), limit, rtol=1e-4)
        assert value.max() < 1e-4  # itself it vanishes


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name.startswith("skew_")])
def test_skew_tends_to_kl(name):
    end = "reverse_kl" if "reverse" in name else "forward_kl"
    student, teacher = logits(5, 20, 11, scale=1.0)
    limit = np.array([formulas.divergence(end, s, z) for s, z in zip(student.numpy(), teacher.numpy(), strict=True)])
    gaps = [(limit - DIVERGENCES[name](student, teacher, alpha=alpha).numpy()) / limit for alpha in (1e-2, 1e-4, 1e-6)]
    assert (np.diff(gaps, axis=0) < 0).all()
    assert np.abs(gaps[-1]).max() < 1e-5


def test_alpha_beta_tends_to_both_kls():
    student, teacher = logits(5, 20, 8, scale=1.0)
    for name, alpha, beta in (("forward_kl", 1.0, 1e-6), ("reverse_kl", 1e-6, 1.0)):
        limit = [formulas.divergence(name, s, z) for s, z in zip(student.numpy(), teacher.numpy(), strict=True)]
        value = DIVERGENCES["alpha_beta"](student, teacher, alpha=alpha, beta=beta)
        np.testing.assert_allclose(value.numpy(), limit, rtol=1e-4)


def test_todi_has_the_value_of_both_kls_and_another_gradient():
    student, teacher = logits(3, 10, 9)
    value, gradient = value_and_gradient("todi", student, teacher)
    forward, g_forward = value_and_gradient("forward_kl", student, teacher)
    reverse, g_reverse = value_and_gradient("reverse_kl", student, teacher)
    torch.testing.assert_close(value, forward + reverse)  # Jeffreys' divergence
    torch.testing.assert_close(DIVERGENCES["todi"](teacher, student), value)
    assert (DIVERGENCES["forward_kl"](teacher, student) - forward).abs().max() > 0.01  # which is not symmetric itself
    assert (gradient - g_forward - g_reverse).abs().max() > 0.01


def test_adaptive_heads_by_hand():
    """p = (.4, .3, .2, .1), μ = ½: the authors' head is {.4}, the covering head {.4, .3}."""
    teacher = torch.tensor([[0.1, 0.4, 0.2, 0.3]], dtype=torch.float64).log()
    student = torch.tensor([[0.3, 0.2, 0.25, 0.25]], dtype=torch.float64).log()
    p, q = (z.exp().numpy()[0] for z in (teacher, student))
    forward, reverse = formulas.kl(p, q), formulas.kl(q, p)
    # |p - q| = .2, .2, .05, .05 in vocabulary order; total .5.
    for variant, head_gap in (("authors", 0.2), ("cover", 0.25)):
        share = head_gap / 0.5
        value = DIVERGENCES["adaptive_kl"](student, teacher, variant=variant).item()
        assert value == pytest.approx(share * forward + (1 - share) * reverse, rel=1e-12)
    flat = torch.zeros(1, 4, dtype=torch.float64)
    assert DIVERGENCES["adaptive_kl"](flat, flat).item() == 0


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(CASES),
    st.integers(2, 12),
    st.integers(0, 10_000),
    st.floats(0.3, 4),
    st.floats(-50, 50),
    st.floats(-50, 50),
)
def test_shifts_and_order_of_the_vocabulary_change_nothing(case, vocab, seed, t, shift, other_shift):
    name, settings_ = case
    student, teacher = logits(2, vocab, seed)
    temperatures = torch.full((2,), t, dtype=torch.float64)
    order = torch.randperm(vocab, generator=torch.Generator().manual_seed(seed))
    value = DIVERGENCES[name](student, teacher, temperatures, **settings_)
    changed = DIVERGENCES[name](student[:, order] + shift, teacher[:, order] + other_shift, temperatures, **settings_)
    torch.testing.assert_close(changed, value, rtol=1e-8, atol=1e-10)
    assert (value > -1e-12).all()


@pytest.mark.parametrize("name", DIVERGENCE_NAMES)
def test_only_the_student_gets_a_gradient(name):
    student, teacher = (z.requires_grad_() for z in logits(2, 5, 10))
    temperatures = torch.ones(2, dtype=torch.float64, requires_grad=True)
    DIVERGENCES[name](student, teacher, temperatures).sum().backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert temperatures.grad is None


@pytest.mark.parametrize("name", DIVERGENCE_NAMES)
def test_golden_values(name):
    """A changed number needs a new version in the settings, so that results of two formulas are never mixed."""
    version = TypeAdapter(Divergence).validate_python({"name": name}).version
    student, teacher = torch.tensor([STUDENT], dtype=torch.float64), torch.tensor([TEACHER], dtype=torch.float64)
    temperature = torch.tensor([1.5], dtype=torch.float64)
    line = f'("{name}", {version}): {formulas.divergence(name, STUDENT, TEACHER, 1.5):.12g},'
    assert (name, version) in GOLDEN, f"GOLDEN has no value of this version; the reference says {line}"
    assert DIVERGENCES[name](student, teacher, temperature).item() == pytest.approx(GOLDEN[name, version], rel=1e-9)

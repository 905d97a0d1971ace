"""The closed forms of value and gradient against autograd of the readable definitions, in fp64."""

from __future__ import annotations

import pytest
import torch
from references import formulas

from entkd.config import DIVERGENCE_NAMES, Method
from entkd.divergences import DIVERGENCES
from entkd.kernels import TERMS, _out_of_place, value_and_gradient
from entkd.methods import APPROACHES
from entkd.softmax import cross_entropy

CLOSED = [name for name in DIVERGENCE_NAMES if name in TERMS]
CASES = [(name, {}) for name in CLOSED] + [case for case in formulas.OTHER_SETTINGS if case[0] in TERMS]
FINITE = [name for name in CLOSED if not Method(divergence=name).divergence.contains_reverse_kl]
"""Where a teacher excludes a token."""


def logits(rows=7, vocab=50):
    generator = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    return student, student + torch.randn(rows, vocab, generator=generator, dtype=torch.float64)


def with_gradient(student, *arguments, **keywords):
    gradient = torch.full_like(student, torch.nan)
    return value_and_gradient(student, *arguments, gradient_RV=gradient, **keywords), gradient


def expected_of(name, student, teacher, temperatures, settings):
    student = student.clone().requires_grad_()
    value = DIVERGENCES[name](student, teacher, temperatures, **settings)
    return value.detach(), torch.autograd.grad(value.sum(), student)[0]


@pytest.mark.parametrize(("name", "settings"), CASES)
@pytest.mark.parametrize("tempered", [False, True])
def test_value_and_gradient_follow_the_definition(name, settings, tempered):
    student, teacher = logits()
    temperatures = torch.linspace(0.5, 4, len(student), dtype=torch.float64) if tempered else None
    expected = expected_of(name, student, teacher, temperatures, settings)
    column = None if temperatures is None else temperatures.unsqueeze(-1)
    plain = _out_of_place(student, teacher, column, TERMS[name], settings)
    chosen = with_gradient(student.clone(), teacher.clone(), column, name, settings)
    for value, gradient in (plain, chosen):
        torch.testing.assert_close(value.squeeze(-1), expected[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradient, expected[1], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", FINITE)
def test_a_teacher_of_exact_zeros_gives_finite_numbers(name):
    student, _ = logits()
    teacher = torch.full_like(student, -torch.inf)
    teacher[torch.arange(len(student)), torch.arange(len(student))] = 0
    expected = expected_of(name, student, teacher, None, {})
    value, gradient = _out_of_place(student, teacher, None, TERMS[name], {})
    assert torch.isfinite(gradient).all()
    torch.testing.assert_close(value.squeeze(-1), expected[0])
    torch.testing.assert_close(gradient, expected[1], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", CLOSED)
def test_extreme_logits_give_finite_gradients(name):
    student, teacher = (1e3 * tensor.float() for tensor in logits())
    value, gradient = _out_of_place(student, teacher, None, TERMS[name], {})
    assert torch.isfinite(gradient).all()
    assert torch.isfinite(value).all()


def test_closed_forms_are_of_divergences_and_of_approaches_that_are_one():
    """Not of every divergence: a new one may do without."""
    own = {name for name, approach in APPROACHES.items() if approach.own_terms is not None}
    assert set(TERMS) - set(DIVERGENCES) == own >= {"bdkd"}


def test_one_without_a_closed_form_is_differentiated(monkeypatch):
    monkeypatch.delitem(TERMS, "jsd")
    student, teacher = logits()
    temperatures = torch.linspace(0.5, 4, len(student), dtype=torch.float64)
    with torch.no_grad():
        value, gradient = with_gradient(student, teacher, temperatures.unsqueeze(-1), "jsd", {"beta": 0.3})
    expected = expected_of("jsd", student, teacher, temperatures, {"beta": 0.3})
    torch.testing.assert_close(value.squeeze(-1), expected[0])
    torch.testing.assert_close(gradient, expected[1])
    assert not value.requires_grad


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_scale_0_give_0_whatever_is_in_them(name, dtype):
    student, teacher = (tensor.to(dtype) for tensor in logits())
    scale = torch.linspace(-1, 2.5, len(student), dtype=dtype).unsqueeze(-1)
    scale[3] = 0
    expected = expected_of(name, student, teacher, None, {})
    student[3], teacher[3] = torch.nan, torch.inf
    value, gradient = with_gradient(student, teacher, None, name, {}, scale_R1=scale)
    assert value[3] == 0
    assert (gradient[3] == 0).all()
    kept = torch.arange(len(student)) != 3
    rtol = 1e-4 if dtype == torch.float32 else 1e-7
    torch.testing.assert_close(value[kept, 0], expected[0][kept], rtol=rtol, atol=rtol)
    torch.testing.assert_close(gradient[kept], (scale * expected[1])[kept], rtol=rtol, atol=rtol / 10)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CLOSED)
def test_half_precision_is_read_and_left_alone(name, half):
    student, teacher = (tensor.to(half) for tensor in logits())
    given = student.clone(), teacher.clone()
    expected = expected_of(name, student.double(), teacher.double(), None, {})
    gradient = torch.empty(student.shape)
    value = value_and_gradient(student, teacher, None, name, {}, gradient_RV=gradient)
    torch.testing.assert_close(value.double().squeeze(-1), expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected[1], rtol=1e-4, atol=1e-6)
    assert torch.equal(student, given[0])
    assert torch.equal(teacher, given[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_cross_entropy_of_rows(dtype):
    student = logits(9, 70)[0].to(dtype)
    labels = torch.tensor([0, 69, 15, 16, 17, 31, 32, 63, 64])
    scale = torch.linspace(-1, 2, 9, dtype=torch.promote_types(dtype, torch.float32)).unsqueeze(-1)
    exact = student.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    (slope,) = torch.autograd.grad((expected * scale.double().squeeze(-1)).sum(), exact)
    before, gradient = student.clone(), torch.empty(student.shape, dtype=scale.dtype)
    with torch.no_grad():
        value = cross_entropy(student, labels, scale, gradient)
    rtol = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(value.double().squeeze(-1), expected.detach(), rtol=rtol, atol=rtol)
    torch.testing.assert_close(gradient.double(), slope, rtol=rtol, atol=rtol / 10)
    assert torch.equal(student, before)
    assert torch.equal(cross_entropy(student, labels), value)

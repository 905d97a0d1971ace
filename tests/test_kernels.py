"""The closed forms of value and gradient against autograd of the readable definitions, in fp64."""

from __future__ import annotations

import pytest
import torch
from references import formulas

from entkd.config import DIVERGENCE_NAMES
from entkd.divergences import DIVERGENCES
from entkd.kernels import TERMS, _out_of_place, value_and_gradient

CLOSED = [name for name in DIVERGENCE_NAMES if name in TERMS]
CASES = [(name, {}) for name in CLOSED] + [case for case in formulas.OTHER_SETTINGS if case[0] in TERMS]


def logits(rows=7, vocab=50):
    generator = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    return student, student + torch.randn(rows, vocab, generator=generator, dtype=torch.float64)


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
    chosen = value_and_gradient(student.clone(), teacher.clone(), column, name, settings)
    for value, gradient in (plain, chosen):
        torch.testing.assert_close(value.squeeze(-1), expected[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradient, expected[1], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in CLOSED if name not in ("reverse_kl", "todi", "adaptive_kl")])
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


def test_closed_forms_are_of_divergences_and_bdkd():
    """Not of every divergence: a new one may do without."""
    assert set(TERMS) - set(DIVERGENCES) == {"bdkd"}


def test_one_without_a_closed_form_is_differentiated(monkeypatch):
    monkeypatch.delitem(TERMS, "jsd")
    student, teacher = logits()
    temperatures = torch.linspace(0.5, 4, len(student), dtype=torch.float64)
    with torch.no_grad():
        value, gradient = value_and_gradient(student, teacher, temperatures.unsqueeze(-1), "jsd", {"beta": 0.3})
    expected = expected_of("jsd", student, teacher, temperatures, {"beta": 0.3})
    torch.testing.assert_close(value.squeeze(-1), expected[0])
    torch.testing.assert_close(gradient, expected[1])
    assert not value.requires_grad

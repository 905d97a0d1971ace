"""The Hellinger distance and its gradient, beside autograd of the definition and the independent reference."""

from __future__ import annotations

import pytest
import torch
from references import methods as ref

from entkd import hellinger


def draw(seed: int, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(6, 13, dtype=torch.float64, generator=generator) for _ in range(2))
    return student, teacher


@pytest.mark.parametrize("scale", [0.1, 2.0, 20.0])
def test_distance_and_gradient(scale: float) -> None:
    student, teacher = draw(0, scale)
    expected = [ref.hellinger(a.numpy(), b.numpy()) for a, b in zip(student, teacher, strict=True)]
    torch.testing.assert_close(hellinger.distance(student, teacher), torch.tensor(expected, dtype=torch.float64))
    student.requires_grad_()
    roots = (torch.softmax(student, -1).sqrt() - torch.softmax(teacher, -1).sqrt()).square().sum(-1)
    (by_autograd,) = torch.autograd.grad((roots / 2).sqrt().sum(), student)
    torch.testing.assert_close(hellinger.gradient(student.detach(), teacher), by_autograd, rtol=1e-6, atol=1e-12)


def test_equal_distributions_have_no_gradient() -> None:
    student, _ = draw(1)
    student[0] = 0  # whose √(pq) sum to 1 exactly or a little more
    found = hellinger.gradient(student, student)
    assert torch.isfinite(found).all()
    assert found[hellinger.distance(student, student) == 0].abs().max() == 0

"""Learning rates, parameter groups, clipping."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from entkd.config import Training
from entkd.distill.optim import build_optimizer, clip_gradients, learning_rates, set_learning_rate


def test_constant_schedule_by_hand() -> None:
    rates = learning_rates(Training(steps=10, lr=1.0, warmup=0.3), 10)
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1, 1])


def test_cosine_has_half_the_peak_on_average_and_ends_low() -> None:
    rates = learning_rates(Training(steps=50, lr=2.0, schedule="cosine", warmup=0.0), 50)
    assert sum(rates) / 50 == pytest.approx(1.0)  # the midpoint rule is exact for a half period
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 0.01


def test_weight_decay_only_on_matrices_and_projectors_keep_their_rate() -> None:
    student, projectors = nn.Linear(3, 2), nn.Linear(2, 2, bias=False)
    settings = Training(steps=1, lr=0.1, weight_decay=0.5)
    optimizer = build_optimizer(student, projectors, settings, projector_lr=0.03)
    by_shape = {tuple(p.shape): g for g in optimizer.param_groups for p in g["params"]}
    assert by_shape[(2, 3)]["weight_decay"] == 0.5
    assert by_shape[(2,)]["weight_decay"] == 0.0
    set_learning_rate(optimizer, 0.05, settings)  # half of the peak, for every group
    assert by_shape[(2, 3)]["lr"] == pytest.approx(0.05)
    assert by_shape[(2, 2)]["lr"] == pytest.approx(0.015)


def test_adamw_step_by_hand() -> None:
    student = nn.Linear(1, 1, bias=False)
    start = student.weight.item()
    settings = Training(steps=1, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer = build_optimizer(student, None, settings, None)
    student.weight.grad = torch.tensor([[2.0]])
    optimizer.step()
    # first step of Adam: the bias-corrected moments are g and g², so the update is lr · sign(g)
    assert student.weight.item() == pytest.approx(start * (1 - 0.01 * 0.1) - 0.01, rel=1e-5)


def test_projectors_do_not_shrink_the_students_step() -> None:
    student, projectors = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    student.weight.grad = torch.tensor([[0.3, 0.4]])
    projectors.weight.grad = torch.tensor([[30.0, 40.0]])
    norm = clip_gradients(student, projectors, clip=1.0)
    assert norm.item() == pytest.approx(0.5)
    assert torch.allclose(student.weight.grad, torch.tensor([[0.3, 0.4]]))
    assert projectors.weight.grad.norm().item() == pytest.approx(1.0, rel=1e-4)


def test_no_clip_returns_the_norm_and_leaves_gradients() -> None:
    student = nn.Linear(2, 1, bias=False)
    student.weight.grad = torch.tensor([[30.0, 40.0]])
    assert clip_gradients(student, None, clip=None).item() == pytest.approx(50.0)
    assert math.isclose(student.weight.grad.norm().item(), 50.0, rel_tol=1e-6)

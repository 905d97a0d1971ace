"""Learning rates, parameter groups, clipping."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from entkd import native
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


needs_library = pytest.mark.skipif(not native.available(), reason="no compiled kernels here")


@needs_library
def test_one_pass_is_pytorchs_clipping_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Training(steps=1, lr=0.02, clip=0.5, weight_decay=0.1)
    runs = []
    for one_pass in (True, False):
        torch.manual_seed(0)
        student, projectors = nn.Linear(7, 5), nn.Linear(5, 5)
        optimizer = build_optimizer(student, projectors, settings, projector_lr=0.03)
        if not one_pass:
            monkeypatch.setattr(native, "available", lambda: False)
        assert optimizer.in_one_pass == one_pass
        norms = []
        for scale in (100.0, 1e-3, 1.0):  # clipped, not clipped, clipped
            for p in (*student.parameters(), *projectors.parameters()):
                p.grad = scale * torch.randn(p.shape)
            norms.append(clip_gradients(student, projectors, settings.clip, optimizer))
            optimizer.step()
        runs.append((student, projectors, torch.stack(norms), optimizer.state_dict()["state"]))
    (student, projectors, norms, state), (expected, expected_projectors, expected_norms, expected_state) = runs
    torch.testing.assert_close(norms, expected_norms)
    for own, other in ((student, expected), (projectors, expected_projectors)):
        torch.testing.assert_close(list(own.parameters()), list(other.parameters()), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(state, expected_state, rtol=1e-5, atol=1e-7)  # either goes on with the other's


@needs_library
def test_a_step_that_the_kernels_refuse_is_an_error() -> None:
    student = nn.Linear(2, 1, bias=False)
    optimizer = build_optimizer(student, None, Training(steps=1, lr=0.01), None)
    student.weight.grad = torch.ones(1, 2)
    optimizer.step()
    optimizer.state[student.weight]["exp_avg"] = torch.zeros(1, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="refuse a moment or gradient"):
        optimizer.step()


@needs_library
def test_factors_hold_for_one_step() -> None:
    student = nn.Linear(1, 1, bias=False)
    settings = Training(steps=1, lr=0.01, weight_decay=0.0)
    optimizer = build_optimizer(student, None, settings, None)
    for scale in (0.0, 1.0):
        before = student.weight.item()
        student.weight.grad = torch.ones(1, 1)
        if scale == 0:
            optimizer.scale_gradients(student.parameters(), 0.0)
        optimizer.step()
        assert (student.weight.item() != before) == (scale == 1.0)


def test_a_nan_gradient_is_not_clipped_into_a_number() -> None:
    student = nn.Linear(2, 1, bias=False)
    optimizer = build_optimizer(student, None, Training(steps=1), None)
    student.weight.grad = torch.tensor([[torch.nan, 1.0]])
    assert clip_gradients(student, None, 1.0, optimizer).isnan()
    optimizer.step()
    assert student.weight.isnan().all()

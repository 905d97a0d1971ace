"""Feature tokens, projectors and loss (method limits 9, 10, 12)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from references import formulas

from entkd.config import Features
from entkd.errors import UserError
from entkd.features import Projectors, feature_loss, select_tokens


def hidden(n, width, seed, dtype=torch.float32):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("loss", ["cosine", "mse"])
def test_the_loss_is_a_sum_over_tokens_of_the_formula(loss):
    student, teacher = hidden(6, 5, 0), hidden(6, 7, 1)
    (projector,) = Projectors(5, 7, pairs=1, generator=torch.Generator().manual_seed(2))
    projected = student.double().numpy() @ projector.weight.detach().double().numpy().T
    expected = formulas.feature_terms(projected, teacher, loss).sum()
    assert feature_loss(student, teacher, projector, loss).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", ["cosine", "mse"])
def test_bf16_hidden_states_under_autocast_are_computed_in_fp32(loss):
    student, teacher = hidden(6, 5, 0, torch.bfloat16), hidden(6, 7, 1, torch.bfloat16)
    (projector,) = Projectors(5, 7, pairs=1)
    projected = student.double().numpy() @ projector.weight.detach().double().numpy().T
    expected = formulas.feature_terms(projected, teacher.double(), loss).sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = feature_loss(student, teacher, projector, loss)
    assert result.item() == pytest.approx(expected, rel=1e-5)


def test_identity_compares_the_states_themselves():
    student, teacher = hidden(4, 5, 0), hidden(4, 5, 1)
    projectors = Projectors(5, 5, pairs=2, kind="identity")
    assert len(projectors) == 2
    assert not list(projectors.parameters())
    expected = formulas.feature_terms(student, teacher, "cosine").sum()
    assert feature_loss(student, teacher, projectors[1], "cosine").item() == pytest.approx(expected, rel=1e-5)
    assert feature_loss(student, 3 * student, projectors[0], "cosine").item() == pytest.approx(0, abs=1e-5)
    with pytest.raises(UserError, match=r"student has 5 and the teacher 7"):
        Projectors(5, 7, pairs=1, kind="identity")


@pytest.mark.parametrize("loss", ["cosine", "mse"])
def test_no_token_gives_zero_and_zero_gradients(loss):
    (projector,) = Projectors(5, 7, pairs=1)
    student = torch.zeros(0, 5, requires_grad=True)
    value = feature_loss(student, torch.zeros(0, 7), projector, loss)
    value.backward()
    assert value.item() == 0
    assert projector.weight.grad is not None
    assert (projector.weight.grad == 0).all()
    assert student.grad is not None


def test_gradients_reach_student_and_projector_but_not_the_teacher():
    (projector,) = Projectors(5, 7, pairs=1)
    student, teacher = hidden(4, 5, 0).requires_grad_(), hidden(4, 7, 1).requires_grad_()
    feature_loss(student, teacher, projector, "cosine").backward()
    assert student.grad.abs().sum() > 0
    assert projector.weight.grad.abs().sum() > 0
    assert teacher.grad is None


def test_gather_then_project_equals_project_then_mask():
    (projector,) = Projectors(5, 7, pairs=1, generator=torch.Generator().manual_seed(3))
    student, teacher = hidden(9, 5, 0).double(), hidden(9, 7, 1).double()
    projector = projector.double()
    hard = torch.tensor([0, 1, 0, 0, 1, 1, 0, 0, 1], dtype=torch.bool)
    gathered = feature_loss(student[hard], teacher[hard], projector, "cosine")
    terms = formulas.feature_terms(projector(student).detach(), teacher, "cosine")
    assert gathered.item() == pytest.approx((terms * hard.numpy()).sum(), rel=1e-10)


def test_initial_projectors_follow_their_own_stream():
    first = Projectors(64, 32, 3, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(123)
    again = Projectors(64, 32, 3, generator=torch.Generator().manual_seed(5))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.weight, b.weight)
    assert first[0].weight.std().item() == pytest.approx(1 / 8, rel=0.1)
    assert not torch.equal(first[0].weight, first[1].weight)


def test_selection_by_difficulty():
    d = torch.tensor([0.0, 0.2, 0.21, 0.8, 0.81, 1.0], dtype=torch.float64)
    assert select_tokens(d, Features()).tolist() == [False] * 4 + [True] * 2
    assert select_tokens(d, Features(tokens="all")).all()
    assert select_tokens(d, Features(tokens="easy", threshold=0.75)).tolist() == [True] * 3 + [False] * 3


def test_random_selection_depends_on_token_and_seed_alone():
    n = 50_000
    tokens, d = torch.arange(n), torch.rand(n)
    chosen = select_tokens(d, Features(tokens="random"), tokens, seed=1)
    share = chosen.double().mean().item()
    assert share == pytest.approx(0.2, abs=4 * (0.2 * 0.8 / n) ** 0.5)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    assert torch.equal(select_tokens(torch.rand(n), Features(tokens="random"), tokens[order], seed=1), chosen[order])
    other = select_tokens(d, Features(tokens="random"), tokens, seed=2)
    assert (chosen & other).double().mean().item() == pytest.approx(0.04, abs=4 * (0.04 * 0.96 / n) ** 0.5)
    # Neighbours are independent too.
    assert np.corrcoef(chosen[1:].numpy(), chosen[:-1].numpy())[0, 1] == pytest.approx(0, abs=4 / n**0.5)
    with pytest.raises(ValueError, match="tokens_N"):
        select_tokens(d, Features(tokens="random"))

"""Sparse targets: an exact head, an unbiased tail, and the loss made of them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entkd.divergences import forward_kl
from entkd.sparse import SparseTarget, densify, draw_target, pack, sparse_forward_kl, unpack_mass


def uniforms(rows: int, samples: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def target_of(logits_NU: torch.Tensor, top_k: int, samples: int, seed: int = 0) -> SparseTarget:
    ids_NK, mass_NK = draw_target(logits_NU, top_k, uniforms(len(logits_NU), samples, seed))
    return SparseTarget(ids_NK, mass_NK, torch.special.entr(logits_NU.softmax(-1)).sum(-1))


def every_draw() -> tuple[torch.Tensor, torch.Tensor]:
    """p over 6 tokens, one of them impossible, and the masses of all 8^4 equally probable outcomes of 4 draws.

    Probabilities are multiples of 1/16 and the head has half, so that a grid of 8 numbers in each stratum is exact.
    """
    p_U = torch.tensor([1.0, 2.0, 8.0, 0.0, 4.0, 1.0]) / 16
    grid = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    uniform_NS = torch.tensor(list(itertools.product(grid.tolist(), repeat=4)), dtype=torch.float64)
    ids_NK, mass_NK = draw_target(p_U.log().expand(len(uniform_NS), -1), 1, uniform_NS)
    return p_U, densify(SparseTarget(ids_NK, mass_NK, torch.zeros(len(ids_NK))), 6)


def test_the_mean_over_every_possible_draw_is_the_distribution() -> None:
    p_U, mass_NU = every_draw()
    torch.testing.assert_close(mass_NU.mean(0), p_U, atol=1e-6, rtol=0)
    assert (mass_NU[:, 2] - 0.5).abs().max() < 1e-6  # the head has no sampling noise
    assert (mass_NU[:, 3] == 0).all()  # an impossible token is never drawn
    assert mass_NU.std(0)[[0, 1, 5]].min() > 0.05  # the tail has


def test_stratified_draws_vary_no_more_than_independent_ones() -> None:
    """Var Σ m f ≤ τ²/S · Var f over the tail, whatever f."""
    p_U, mass_NU = every_draw()
    tail_U = p_U.clone()
    tail_U[2] = 0
    share_U = tail_U / tail_U.sum()
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(50):
        f_U = torch.randn(6, generator=generator)
        independent = 0.25 / 4 * ((share_U * f_U**2).sum() - (share_U * f_U).sum() ** 2)
        ratios.append(float((mass_NU @ f_U).var(correction=0) / independent))
    assert max(ratios) <= 1 + 1e-5
    assert min(ratios) < 0.9


def test_loss_and_gradient_are_unbiased_and_the_renormalised_head_is_not() -> None:
    """Means over 20,000 draws, within the statistical error; pitfall 16 beside it."""
    generator = torch.Generator().manual_seed(1)
    teacher_V = torch.randn(60, generator=generator) * 1.5
    student_V = teacher_V + 0.5 * torch.randn(60, generator=generator)
    draws = 20_000
    target = target_of(teacher_V.expand(draws, -1), 6, 5)
    student_NV = student_V.expand(draws, -1).clone().requires_grad_()
    value_N = sparse_forward_kl(student_NV, target)
    (grad_NV,) = torch.autograd.grad(value_N.sum(), student_NV)
    exact_V = student_V.double().clone().requires_grad_()
    exact = forward_kl(exact_V[None], teacher_V.double()[None]).sum()
    (exact_grad_V,) = torch.autograd.grad(exact, exact_V)
    stderr = value_N.detach().double().std() / draws**0.5
    assert abs(value_N.detach().double().mean() - exact.detach()) < 4 * stderr
    assert value_N.min() < 0 < exact < 0.3  # single estimates may be negative
    stderr_V = grad_NV.double().std(0) / draws**0.5
    assert ((grad_NV.double().mean(0) - exact_grad_V).abs() <= 4.5 * stderr_V + 1e-7).all()

    top, ids = teacher_V.softmax(-1).topk(11)
    share = (top / top.sum())[None]
    renormalised = SparseTarget(ids[None].int(), share, torch.special.entr(share).sum(-1))
    biased_V = student_V.softmax(-1) - densify(renormalised, 60)[0]
    assert (biased_V - exact_grad_V).norm() > 10 * (grad_NV.double().mean(0) - exact_grad_V).norm()
    assert abs(float(sparse_forward_kl(student_V[None], renormalised)) - float(exact.detach())) > 20 * float(stderr)


def test_reference_value_and_gradient_by_hand() -> None:
    target = SparseTarget(
        torch.tensor([[2, 0, 0]], dtype=torch.int32), torch.tensor([[0.75, 0.25, 0.0]]), torch.tensor([0.5])
    )
    logits = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    q = logits.detach().softmax(-1)[0]
    value = sparse_forward_kl(logits, target)
    assert value.item() == pytest.approx(-0.5 - 0.75 * math.log(q[2]) - 0.25 * math.log(q[0]), abs=1e-6)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    torch.testing.assert_close(gradient[0], q - torch.tensor([0.25, 0.0, 0.75]))
    # an unused slot points at token 0, which the student may hold impossible
    impossible = torch.tensor([[-math.inf, 2.0, 3.0]], requires_grad=True)
    unused = SparseTarget(target.ids_NK, torch.tensor([[1.0, 0.0, 0.0]]), torch.zeros(1))
    value = sparse_forward_kl(impossible, unused)
    assert value.item() == pytest.approx(math.log1p(math.exp(-1)), abs=1e-6)
    assert torch.autograd.grad(value.sum(), impossible)[0][0].tolist() == pytest.approx(
        [0, 0.26894, -0.26894], abs=1e-4
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**16), st.floats(0.1, 20))
def test_rows_are_distributions_with_an_exact_head(vocabulary, top_k, samples, seed, scale) -> None:
    """Also where the vocabulary is smaller than the slots."""
    logits_NU = scale * torch.randn(7, vocabulary, generator=torch.Generator().manual_seed(seed))
    logits_NU[:, vocabulary // 2] = -math.inf
    p_NU = logits_NU.softmax(-1)
    target = target_of(logits_NU, top_k, samples, seed)
    assert target.ids_NK.dtype == torch.int32
    assert target.ids_NK.shape == (7, top_k + samples)
    torch.testing.assert_close(target.mass_NK.sum(-1), torch.ones(7), atol=1e-6, rtol=0)
    assert (target.mass_NK >= 0).all()
    assert (target.ids_NK[target.mass_NK == 0] == 0).all()
    head = min(top_k, vocabulary)
    torch.testing.assert_close(target.mass_NK[:, :head], p_NU.topk(head).values, atol=1e-6, rtol=1e-5)
    for ids_K, mass_K, p_U in zip(target.ids_NK, target.mass_NK, p_NU, strict=True):
        used = ids_K[mass_K > 0].tolist()
        assert len(used) == len(set(used))
        assert all(p_U[token] > 0 for token in used)
    if vocabulary <= top_k:
        torch.testing.assert_close(densify(target, vocabulary), p_NU, atol=1e-6, rtol=1e-5)


def test_a_one_hot_teacher_draws_nothing() -> None:
    logits = torch.full((2, 9), -math.inf)
    logits[0, 4] = logits[1, 8] = 3.0
    target = target_of(logits, 2, 5)
    assert target.ids_NK[:, 0].tolist() == [4, 8]
    assert target.mass_NK.tolist() == [[1.0] + [0.0] * 6] * 2
    assert (target.ids_NK[:, 1:] == 0).all()
    assert target.entropy_N.tolist() == [0, 0]
    student = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    expected = -student.log_softmax(-1)[[0, 1], [4, 8]]
    torch.testing.assert_close(sparse_forward_kl(student, target), expected)


def test_ends_of_the_unit_interval_draw_possible_tokens() -> None:
    logits_U = torch.tensor([-math.inf, 0.0, 1.0, 0.5, -math.inf])
    for edge in (0.0, math.nextafter(1, 0)):
        ids_NK, mass_NK = draw_target(logits_U[None], 1, torch.full((1, 3), edge, dtype=torch.float64))
        assert set(ids_NK[0][mass_NK[0] > 0].tolist()) == {1, 2, 3}


def test_ids_beyond_17_and_18_bits() -> None:
    """Pitfall 14: 131,072, 151,935 and 262,143 in the head, and in the tail, keep their number."""
    ids = [131072, 151935, 262143]
    logits = torch.full((2, 262144), -60.0)
    logits[:, 7] = 5.0
    logits[:, ids] = torch.tensor([4.0, 3.0, 2.0])
    head = target_of(logits, 4, 3)
    assert head.ids_NK[0, :4].tolist() == [7, *ids]
    tail = target_of(logits, 1, 400)
    assert tail.ids_NK[1, 1:4].tolist() == ids
    assert tail.mass_NK[1, :4].tolist() == pytest.approx(logits[1, [7, *ids]].softmax(-1).tolist(), rel=0.05)
    packed_ids, _ = pack(tail.ids_NK, tail.mass_NK)
    assert packed_ids.dtype == torch.int32
    assert packed_ids[1, 1:4].tolist() == ids
    assert densify(tail, 262144)[1].nonzero().squeeze(1).tolist() == [7, *ids]


def test_packing_keeps_how_unsure_a_confident_teacher_is() -> None:
    """fp16 has no number between 0.9995 and 1; the rest, in the other slots, says which it was."""
    generator = torch.Generator().manual_seed(0)
    logits_NU = torch.randn(500, 3000, generator=generator) * 2
    logits_NU[:250, 17] = 18.0
    target = target_of(logits_NU, 16, 16)
    rest_N = 1 - target.mass_NK[:, 0].double()
    assert rest_N[:250].max() < 5e-3
    ids_NK, packed_NK = pack(target.ids_NK, target.mass_NK)
    mass_NK = unpack_mass(packed_NK)
    assert packed_NK.dtype == torch.float16
    torch.testing.assert_close(mass_NK.sum(-1), torch.ones(500), atol=1e-6, rtol=0)
    rest_error_N = (1 - mass_NK[:, 0].double()) / rest_N - 1
    assert rest_error_N.abs().max() < 0.02
    assert ((1 - packed_NK[:250, 0].double()) / rest_N[:250] - 1).abs().max() > 0.1
    torch.testing.assert_close(mass_NK[:, 1:], target.mass_NK[:, 1:], atol=6e-8, rtol=2**-11)
    # the draws' equal masses are rounded alike, so errors may add up, but to no more than the rounding of their sum
    assert ((mass_NK[:, 0].double() - target.mass_NK[:, 0]).abs() <= 2**-11 * rest_N + 32 * 6e-8).all()
    assert (ids_NK[packed_NK == 0] == 0).all()


def test_draws_do_not_depend_on_the_rows_beside_them() -> None:
    logits_NU = torch.randn(300, 5000, generator=torch.Generator().manual_seed(3))
    uniform_NS = uniforms(300, 6)
    ids_NK, mass_NK = draw_target(logits_NU, 4, uniform_NS)
    for rows in (slice(0, 1), slice(100, 171), torch.tensor([299, 3])):
        ids, mass = draw_target(logits_NU[rows], 4, uniform_NS[rows])
        assert torch.equal(ids, ids_NK[rows])
        assert torch.equal(mass, mass_NK[rows])
    empty_ids, empty_mass = draw_target(logits_NU[:0], 4, uniform_NS[:0])
    assert empty_ids.shape == empty_mass.shape == (0, 10)


def test_rows_of_a_target() -> None:
    target = target_of(torch.randn(6, 20, generator=torch.Generator().manual_seed(4)), 3, 3)
    assert len(target) == 6
    for rows in (slice(2, 4), torch.tensor([5, 0]), torch.tensor([True, False, True, False, False, True])):
        part = target[rows]
        assert torch.equal(part.ids_NK, target.ids_NK[rows])
        assert torch.equal(part.mass_NK, target.mass_NK[rows])
        assert torch.equal(part.entropy_N, target.entropy_N[rows])
    moved = target.to(torch.device("meta"))
    assert {tensor.device.type for tensor in (moved.ids_NK, moved.mass_NK, moved.entropy_N)} == {"meta"}

"""The compiled backward pass of attention by document, against autograd of the formula in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from entkd import native
from entkd.models.attention import Document, at_positions, attend, whole
from entkd.native import attention

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler, or a CPU without bf16 instructions")
HEADS = [(2, 2, 64), (6, 2, 16), (9, 3, 64), (4, 1, 80), (5, 1, 7)]
"""Heads, heads of the keys and width."""
LENGTHS = [1, 2, 15, 33, 130, 312]


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the kernel did it, of every backward pass."""
    own, done = native.attention_gradient, []

    def counting(*arguments):
        found = own(*arguments)
        done.append(found is not None)
        return found

    monkeypatch.setattr(native, "attention_gradient", counting)
    return done


def inputs(heads: int, key_heads: int, width: int, keys: int, queries: int | None = None) -> list[Tensor]:
    """Queries, keys, values, laid out as projections do, and a gradient of what attention makes of them."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(queries or keys, heads), (keys, key_heads), (keys, key_heads), (queries or keys, heads)]
    *states, gradient = (torch.randn(1, *shape, width, generator=generator).bfloat16() for shape in shapes)
    return [*(each.transpose(1, 2).requires_grad_() for each in states), gradient]


def gradients(tensors: Sequence[Tensor], documents: Sequence[Document]) -> list[Tensor]:
    *states, gradient = tensors
    return list(torch.autograd.grad(attend(*states, documents, None), states, gradient))


def exact(tensors: Sequence[Tensor], documents: Sequence[Document]) -> list[Tensor]:
    *states, gradient_1QHD = (each.detach().double() for each in tensors)
    query_1HQD, key_1GKD, value_1GKD = (each.requires_grad_() for each in states)
    out_1HQD, shared = torch.zeros_like(query_1HQD), query_1HQD.shape[1] // key_1GKD.shape[1]
    for queries, keys, at_q in documents:
        own, key, value = query_1HQD[:, :, queries], key_1GKD[:, :, keys], value_1GKD[:, :, keys]
        logits = own @ key.repeat_interleave(shared, 1).mT * own.shape[-1] ** -0.5
        unseen_qk = torch.arange(key.shape[2]) > at_q[:, None]
        p = logits.masked_fill(unseen_qk, -torch.inf).softmax(-1)
        out_1HQD[:, :, queries] = p @ value.repeat_interleave(shared, 1)
    return list(torch.autograd.grad(out_1HQD, states, gradient_1QHD.transpose(1, 2)))


def assert_near(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Within the rounding of bf16 operands."""
    # What attention gave is rounded too, and little is left of its difference from the few values of a short document.
    close = 5e-3 if expected[1].shape[2] > 2 else 2e-2
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        error = (one.double() - other).norm()
        assert error <= close * other.norm() + 1e-5 * other.numel() ** 0.5, (error, other.norm())


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", [*([length] for length in LENGTHS), LENGTHS], ids=str)
def test_gradients_are_those_of_the_formula(heads: tuple[int, int, int], lengths: list[int], calls: list[bool]) -> None:
    documents = whole([sum(lengths[:i]) for i in range(len(lengths))], sum(lengths))
    tensors = inputs(*heads, sum(lengths))
    found = gradients(tensors, documents)
    assert calls == [True]
    assert_near(found, exact(tensors, documents))
    for each in found:
        assert each.dtype == torch.bfloat16
        assert each.transpose(1, 2).is_contiguous()
    assert all(map(torch.equal, found, gradients(tensors, documents)))


@pytest.mark.parametrize("heads", HEADS)
def test_queries_of_some_tokens_alone(heads: tuple[int, int, int]) -> None:
    """As at the last layer: of every document the end or nothing, keys that nobody sees, and padding behind."""
    starts, tokens = [0, 40, 41, 190, 350], 360
    index_Q = torch.tensor([3, 20, 38, *range(60, 150, 2), *range(190, 349), 350])
    documents = at_positions(whole(starts, tokens), index_Q)
    assert len(documents) == len(starts) - 1
    tensors = inputs(*heads, tokens, len(index_Q))
    found, expected = gradients(tensors, documents), exact(tensors, documents)
    assert_near(found, expected)
    unseen_K = (expected[2] == 0).all(3).all(1)[0]
    assert unseen_K[[39, 40, 149, 349, 351, 359]].all()
    assert not any(each[:, :, unseen_K].any() for each in found[1:])


def test_fp32_states_under_autocast_get_fp32_gradients(calls: list[bool]) -> None:
    *states, gradient = inputs(6, 2, 32, 200)
    documents = whole([0, 77], 200)
    expected = exact([*states, gradient], documents)
    wide = [each.detach().float().requires_grad_() for each in states]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients([*wide, gradient], documents)
    assert calls == [True]
    assert {each.dtype for each in found} == {torch.float32}
    assert_near(found, expected)


def test_inputs_are_read_by_their_strides() -> None:
    *states, gradient = inputs(6, 2, 32, 50)
    documents = whole([0, 20], 50)
    expected = gradients([*states, gradient], documents)
    by_head = [each.detach().contiguous().requires_grad_() for each in states]
    assert all(map(torch.equal, gradients([*by_head, gradient], documents), expected))
    by_head_again = gradient.transpose(1, 2).contiguous().transpose(1, 2)
    assert all(map(torch.equal, gradients([*states, by_head_again], documents), expected))
    by_number = [each.detach().mT.contiguous().mT for each in states]
    out, logsumexp = gradient.roll(1), torch.full((1, 6, 50), 3.0)  # any will do
    rest = (out, gradient, logsumexp, documents, 0.2, (torch.bfloat16,) * 3)
    found, expected = (attention.attention_gradient(*each, *rest) for each in (by_number, states))
    assert all(map(torch.equal, found, expected))
    ones = torch.ones_like(gradient)
    constant = gradients([*states, ones[..., :1].expand(ones.shape)], documents)
    assert all(map(torch.equal, constant, gradients([*states, ones], documents)))


def test_any_number_of_threads_gives_the_same() -> None:
    tensors, documents = inputs(9, 3, 64, 400), whole([0, 5, 200, 312], 400)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(gradients(tensors, documents))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, found[0], found[1]))
    assert all(map(torch.equal, found[0], found[2]))


@pytest.mark.parametrize("which", range(4))
def test_nan_stays_in_padding_and_in_its_document(which: int) -> None:
    tensors, documents = inputs(6, 2, 64, 100), whole([0, 33, 70, 90], 100)[:-1]
    clean = gradients(tensors, documents)
    assert all(not each[:, :, 90:].any() for each in clean)
    axis = 1 if which == 3 else 2
    with torch.no_grad():
        tensors[which].narrow(axis, 90, 10).fill_(torch.nan)
    assert all(map(torch.equal, gradients(tensors, documents), clean))
    with torch.no_grad():
        tensors[which].select(axis, 40).fill_(torch.nan)
    found = gradients(tensors, documents)
    for one, other in zip(found, clean, strict=True):
        assert torch.equal(one[:, :, :33], other[:, :, :33])
        assert torch.equal(one[:, :, 70:], other[:, :, 70:])
    assert any(each[:, :, 33:70].isnan().any() for each in found)


def test_without_it_pytorch_gives_the_same(monkeypatch: pytest.MonkeyPatch, calls: list[bool]) -> None:
    tensors, documents = inputs(6, 2, 64, 100), whole([0, 33, 70], 100)
    found = gradients(tensors, documents)
    monkeypatch.setattr(attention, "library", lambda: None)
    expected = gradients(tensors, documents)
    assert calls == [True, False]
    assert_near(found, [each.double() for each in expected])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_numbers_are_left_to_pytorch(dtype: torch.dtype, calls: list[bool]) -> None:
    *states, gradient = (each.detach().to(dtype) for each in inputs(4, 2, 16, 30))
    documents = whole([0, 13], 30)
    tensors = [*(each.requires_grad_() for each in states), gradient]
    torch.testing.assert_close(gradients(tensors, documents), exact(tensors, documents), check_dtype=False)
    assert calls == [False]


def test_no_document_gives_zeros(calls: list[bool]) -> None:
    assert not any(each.any() for each in gradients(inputs(4, 2, 16, 30), []))
    assert calls == [True]


def test_shapes_that_differ_are_an_error() -> None:
    (query, key, value, gradient), documents = inputs(4, 2, 16, 30), whole([0, 13], 30)
    logsumexp, rest = torch.zeros(1, 4, 30), (1.0, (torch.bfloat16,) * 3)
    for tensors in (
        (query, key, value[:, :, 1:], gradient, gradient, logsumexp),
        (query, key, value, gradient, gradient[:, 1:], logsumexp),
        (query, key, value, gradient, gradient, logsumexp[:, 1:]),
        (query[:, :3], key, value, gradient[:, :, :3], gradient[:, :, :3], logsumexp[:, :3]),
    ):
        with pytest.raises(ValueError, match="differ"):
            attention.attention_gradient(*tensors, documents, *rest)
    for wrong in (whole([0, 13], 31), [documents[0]._replace(at_q=torch.arange(5))]):
        with pytest.raises(ValueError, match="documents reach beyond"):
            attention.attention_gradient(query, key, value, gradient, gradient, logsumexp, wrong, *rest)
    for at_q in (documents[0].at_q.int(), documents[0].at_q + 100):
        wrong = [documents[0]._replace(at_q=at_q)]
        with pytest.raises(ValueError, match="must be int64 and among its keys"):
            attention.attention_gradient(query, key, value, gradient, gradient, logsumexp, wrong, *rest)

"""Losses fused with the projections against the definition, in tiles of every size (limits 6, 9, 11, 13, 15, 17)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from references import formulas, methods

import entkd.closeness
import entkd.fused
import entkd.kernels
import entkd.products
import entkd.tiles
import entkd.token_loss
from entkd.config import DIVERGENCE_NAMES
from entkd.divergences import DIVERGENCES
from entkd.fused import linear_cross_entropy, linear_distillation, linear_divergence, linear_statistics
from entkd.sparse import SparseTarget, draw_target, sparse_forward_kl

CASES = [(name, {}) for name in DIVERGENCE_NAMES] + formulas.OTHER_SETTINGS
N, D, E, V = 13, 6, 8, 17


def problem(dtype=torch.float32, n=N):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    return draw(n, D), draw(V, D), draw(n, E), draw(V, E, scale=0.7)


def extras(dtype=torch.float32, n=N):
    generator = torch.Generator().manual_seed(1)
    temperatures = 0.6 + 2 * torch.rand(n, generator=generator, dtype=torch.float64)
    weights = 2 * torch.rand(n, generator=generator, dtype=torch.float64)
    return temperatures.to(dtype), weights.to(dtype)


def definition(name, tensors, temperatures, weights, scale, vocab=V, **settings):
    """Value, dh and dW of Σ w s(T) D, token by token, from the formulas."""
    h, w, th, tw = (tensor.double().numpy() for tensor in tensors)
    w, tw = w[:vocab], tw[:vocab]
    value, dh, dw = 0.0, np.zeros_like(h), np.zeros_like(w)
    for i, (t, weight) in enumerate(zip(temperatures.tolist(), weights.tolist(), strict=True)):
        student, teacher = w @ h[i], tw @ th[i]
        factor = weight * scale(t)
        value += factor * formulas.divergence(name, student, teacher, t, **settings)
        dz = factor * formulas.gradient(name, student, teacher, t, **settings)
        dh[i] = dz @ w
        dw += np.outer(dz, h[i])
    return value, dh, dw


def run(tensors, **keywords):
    h, w = (tensor.clone().requires_grad_() for tensor in tensors[:2])
    value = linear_divergence(h, w, *tensors[2:], **keywords)
    value.backward()
    return value.item(), h.grad, w.grad


def assert_close(result, expected, relative):
    """Relative to the largest entry of each tensor."""
    for got, want in zip(result, expected, strict=True):
        got, want = (
            np.asarray(x if isinstance(x, float) else x.double() if torch.is_tensor(x) else x) for x in (got, want)
        )
        assert np.abs(got - want).max() <= relative * max(1e-30, np.abs(want).max())


@pytest.mark.parametrize(("name", "settings"), CASES)
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-5), (torch.float64, 1e-7)])
def test_value_and_gradients_follow_the_definition(name, settings, dtype, relative):
    tensors, (temperatures, weights) = problem(dtype), extras(dtype)
    expected = definition(name, tensors, temperatures, weights, lambda t: t * t, **settings)
    result = run(tensors, divergence=name, settings=settings, temperature_N=temperatures, weight_N=weights)
    assert_close(result, expected, relative)
    assert result[1].dtype == result[2].dtype == dtype


@pytest.mark.parametrize(
    ("t2", "scale"), [("per_token", lambda t: t * t), ("linear", lambda t: t), ("off", lambda t: 1)]
)
def test_the_scale_of_the_temperature_is_in_value_and_gradient(t2, scale):
    tensors, (temperatures, _) = problem(torch.float64), extras(torch.float64)
    expected = definition("forward_kl", tensors, temperatures, torch.ones(N), scale)
    assert_close(run(tensors, divergence="forward_kl", temperature_N=temperatures, t2=t2), expected, 1e-7)


@pytest.mark.parametrize("name", DIVERGENCE_NAMES)
@pytest.mark.parametrize(("tile", "piece"), [(1, 1), (4, 3), (5, 2), (13, 13), (100, 100)])
def test_tiles_change_nothing(monkeypatch, name, tile, piece):
    tensors, (temperatures, weights) = problem(torch.float64), extras(torch.float64)
    keywords = {"divergence": name, "temperature_N": temperatures, "weight_N": weights}
    expected = definition(name, tensors, temperatures, weights, lambda t: t * t)
    monkeypatch.setattr(entkd.tiles, "tile_rows", lambda vocab, device: tile)
    monkeypatch.setattr(entkd.tiles, "piece_rows", lambda vocab, device: piece)
    assert_close(run(tensors, **keywords), expected, 1e-7)


def test_no_tensor_spans_all_tokens_and_the_vocabulary(monkeypatch):
    monkeypatch.setattr(entkd.tiles, "tile_rows", lambda vocab, device: 4)
    seen = []

    def spy(student, *arguments, **keywords):
        seen.append(student.shape)
        return entkd.kernels.value_and_gradient(student, *arguments, **keywords)

    monkeypatch.setattr(entkd.token_loss, "value_and_gradient", spy)
    run(problem(), divergence="todi")
    assert sum(shape[0] for shape in seen) == N
    assert max(shape[0] for shape in seen) <= 4


@pytest.mark.parametrize("name", DIVERGENCE_NAMES)
def test_no_token_gives_zero_and_zero_gradients(name):
    tensors = problem(n=0)
    value, dh, dw = run(tensors, divergence=name)
    assert value == 0
    assert dh.shape == (0, D)
    assert (dw == 0).all()
    value, dh, dw = run(problem(), divergence=name, weight_N=torch.zeros(N))
    assert value == 0
    assert (dh == 0).all()
    assert (dw == 0).all()


@pytest.mark.parametrize("name", DIVERGENCE_NAMES)
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 0.0, 50.0])
def test_padded_rows_of_the_vocabulary_change_nothing(name, junk):
    h, w, th, tw = problem()
    padded = [h, torch.cat([w, torch.full((5, D), junk)]), th, torch.cat([tw, torch.full((2, E), junk)])]
    value, dh, dw = run(padded, divergence=name, vocab_size=V)
    expected = definition(name, (h, w, th, tw), torch.ones(N), torch.ones(N), lambda t: 1)
    assert_close((value, dh, dw[:V]), expected, 1e-5)
    assert (dw[V:] == 0).all()


@pytest.mark.parametrize("name", DIVERGENCE_NAMES)
def test_tokens_of_weight_zero_change_nothing_even_as_nan(name):
    tensors, (temperatures, weights) = problem(), extras()
    weights[[0, 5, 12]] = 0
    expected = definition(name, tensors, temperatures, weights, lambda t: t * t)
    broken = [tensor.clone() for tensor in tensors]
    broken[0][5], broken[2][12], temperatures[0] = math.nan, math.inf, math.nan
    keywords = {"divergence": name, "temperature_N": temperatures, "weight_N": weights}
    assert_close(run(broken, **keywords), expected, 1e-5)


@pytest.mark.parametrize("labels", [None, torch.arange(N)])
@pytest.mark.parametrize("softened", [False, True])
def test_the_loss_that_moves_taids_t_does_not_depend_on_weights(labels, softened):
    tensors, (temperatures, weights) = problem(torch.float64), extras(torch.float64)
    temperatures = temperatures if softened else torch.ones_like(temperatures)
    students, teachers = ((h @ w.T).numpy() for h, w in (tensors[:2], tensors[2:]))
    expected = 0.0
    for student, teacher, t in zip(students, teachers, temperatures.tolist(), strict=True):
        target = methods.taid_target(student, teacher, 0.3) / t
        expected -= formulas.softmax(target) @ np.log(formulas.softmax(student / t))
    weights[2:9] = 0
    for weight_N in (None, weights, torch.zeros(N)):
        found = linear_distillation(
            *tensors,
            labels_N=labels,
            weight_N=weight_N,
            temperature_N=temperatures if softened else None,
            teacher_share=torch.tensor(0.3, dtype=torch.float64),
        )
        assert found.target_cross_entropy.item() == pytest.approx(expected, rel=1e-12)


def test_vocabularies_that_do_not_fit_are_refused():
    h, w, th, tw = problem()
    with pytest.raises(ValueError, match=r"17 rows and the teacher's 16; pass vocab_size"):
        linear_divergence(h, w, th, tw[:16], divergence="forward_kl")
    with pytest.raises(ValueError, match=r"teacher's output projection has 16 rows, the tokenizer 17"):
        linear_divergence(h, w, th, tw[:16], divergence="forward_kl", vocab_size=17)
    with pytest.raises(ValueError, match=r"student's output projection has 17 rows, the tokenizer 18"):
        linear_cross_entropy(h, w, torch.zeros(N, dtype=torch.long), vocab_size=18)
    with pytest.raises(ValueError, match="13 student tokens but 12 teacher tokens"):
        linear_divergence(h, w, th[1:], tw, divergence="forward_kl")
    with pytest.raises(ValueError, match="forward_kl, reverse_kl"):
        linear_divergence(h, w, th, tw, divergence="kl")


def test_gradients_scale_with_what_follows_and_reach_only_the_student():
    tensors = [tensor.requires_grad_() for tensor in problem(torch.float64)]
    temperatures, weights = (tensor.requires_grad_() for tensor in extras(torch.float64))
    keywords = {"divergence": "reverse_kl", "temperature_N": temperatures, "weight_N": weights}
    (linear_divergence(*tensors, **keywords) / -7).backward()
    assert all(tensor.grad is None for tensor in (*tensors[2:], temperatures, weights))
    with torch.no_grad():
        _, dh, dw = definition("reverse_kl", [t.detach() for t in tensors], temperatures, weights, lambda t: t * t)
    assert_close((tensors[0].grad, tensors[1].grad), (dh / -7, dw / -7), 1e-7)


def test_without_gradients_only_the_value_is_made(monkeypatch):
    tensors = problem()
    monkeypatch.setattr(entkd.tiles, "add_weight_gradient", lambda *_: pytest.fail("a gradient was computed"))
    expected = definition("jsd", tensors, torch.ones(N), torch.ones(N), lambda t: 1)[0]
    with torch.no_grad():
        frozen = linear_divergence(
            tensors[0].requires_grad_(), tensors[1].requires_grad_(), *tensors[2:], divergence="jsd"
        )
    assert frozen.item() == pytest.approx(expected, rel=1e-5)
    h = tensors[0].detach().requires_grad_()
    linear_divergence(h, tensors[1].detach(), *tensors[2:], divergence="jsd").backward()
    assert h.grad is not None


def test_a_projection_tied_to_the_embedding_gets_both_gradients():
    _, w, th, tw = problem(torch.float64)
    weight, ids = w.requires_grad_(), torch.arange(N) % V
    linear_divergence(torch.tanh(weight[ids]), weight, th, tw, divergence="forward_kl").backward()
    untied = w.detach().clone().requires_grad_()
    logits = torch.tanh(untied[ids]) @ untied.T
    p = torch.softmax(th @ tw.T, -1)
    (p * (p.log() - logits.log_softmax(-1))).sum().backward()
    torch.testing.assert_close(weight.grad, untied.grad)


def close_pair(weight_dtype):
    """bf16 hidden states of a teacher and a student at a KL of about 0.02 over 2,000 tokens."""
    generator = torch.Generator().manual_seed(2)
    n, width, vocab = 192, 64, 2000
    hidden = torch.randn(n, width, generator=generator).bfloat16()
    teacher = (3 / width**0.5 * torch.randn(vocab, width, generator=generator)).bfloat16()
    step = 0.2 / width**0.5 * torch.randn(vocab, width, generator=generator)
    return hidden, (teacher.float() + step).to(weight_dtype), hidden, teacher


def rounded(tensors):
    """The student's tensors as bf16 products take them, in fp64."""
    return [tensor.bfloat16().double().requires_grad_() for tensor in tensors[:2]]


def relative_error(gradient, reference):
    return ((gradient.double() - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DIVERGENCE_NAMES)
def test_bf16_gradients_are_within_one_percent_where_bf16_logits_are_not(name, weight_dtype):
    tensors = close_pair(weight_dtype)
    h64, w64 = rounded(tensors)
    # The dense functions in fp64 are held by the formulas in test_divergences.py.
    values = DIVERGENCES[name](h64 @ w64.T, tensors[2].double() @ tensors[3].double().T)
    values.sum().backward()
    if name == "forward_kl":
        assert 0.01 < values.mean().item() < 0.03
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, dh, dw = run(tensors, divergence=name)
        naive = tensors[1].clone().requires_grad_()
        DIVERGENCES[name](tensors[0] @ naive.T, tensors[2] @ tensors[3].T).sum().backward()
    assert relative_error(dw, w64.grad) < 0.01
    assert relative_error(dh, h64.grad) < 0.01
    assert relative_error(naive.grad, w64.grad) > 0.05


def test_rounded_logits_are_those_of_a_plain_bf16_projection(monkeypatch):
    """As noisy as the naive loss, in as many tiles as there are; without an effect on operands that are not bf16."""
    tensors = close_pair(torch.bfloat16)
    h64, w64 = rounded(tensors)
    exact = DIVERGENCES["forward_kl"](h64 @ w64.T, tensors[2].double() @ tensors[3].double().T)
    exact.sum().backward()
    h, w = (tensor.clone().requires_grad_() for tensor in tensors[:2])
    plain = DIVERGENCES["forward_kl"](h @ w.T, tensors[2] @ tensors[3].T)
    plain.sum().backward()
    monkeypatch.setattr("entkd.tiles.tile_rows", lambda *_: 7)
    value, dh, dw = run(tensors, divergence="forward_kl", rounded_logits=True)
    assert value == pytest.approx(plain.sum().item(), rel=1e-3)
    assert relative_error(dw, w.grad) < 0.01
    assert relative_error(dh, h.grad) < 0.01
    assert 0.05 < relative_error(dw, w64.grad) < 0.5
    single = [tensor.float() for tensor in tensors]
    assert_close(run(single, rounded_logits=True), run(single), 0)


def test_bf16_without_autocast_and_fp32_states_under_autocast_are_as_good():
    tensors = close_pair(torch.float32)
    h64, w64 = rounded(tensors)
    DIVERGENCES["forward_kl"](h64 @ w64.T, tensors[2].double() @ tensors[3].double().T).sum().backward()
    assert relative_error(run(tensors, divergence="forward_kl")[2], w64.grad) < 0.01
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dw = run((tensors[0].float(), *tensors[1:]), divergence="forward_kl")[2]
    assert dw.dtype == torch.float32
    assert relative_error(dw, w64.grad) < 0.01


def test_other_autocast_types_do_not_touch_fp32_states():
    tensors = problem()
    expected = definition("forward_kl", tensors, torch.ones(N), torch.ones(N), lambda t: 1)
    with torch.autocast("cpu", dtype=torch.float16):
        assert_close(run(tensors, divergence="forward_kl"), expected, 1e-5)


@pytest.mark.parametrize("name", [name for name in DIVERGENCE_NAMES if name != "tvd"])
def test_given_log_probabilities_do_as_well_as_hidden_states(name, monkeypatch):
    """Rounded to fp16, as they are stored, they keep the gradient of a close pair within 1 % of fp64.

    Not so for total variation, whose gradient jumps where p = q: it reads hidden states (test_targets.py).
    """
    monkeypatch.setattr("entkd.tiles.tile_rows", lambda vocab, device: 50)
    tensors = close_pair(torch.float32)
    h64, w64 = rounded(tensors)
    logits = tensors[2].double() @ tensors[3].double().T
    temperatures = torch.linspace(0.5, 2, len(logits), dtype=torch.float64)
    DIVERGENCES[name](h64 @ w64.T, logits, temperatures).sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = (*tensors[:2], torch.log_softmax(logits, -1).half(), None)
        _, dh, dw = run(given, divergence=name, temperature_N=temperatures.float(), t2="off")
    assert relative_error(dw, w64.grad) < 0.01
    assert relative_error(dh, h64.grad) < 0.01
    close = linear_statistics(*given)
    expected = linear_statistics(*tensors)
    torch.testing.assert_close(close["divergence"], expected["divergence"], rtol=5e-3, atol=1e-4)


def test_the_bf16_units_are_switched_on_for_one_product_only():
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    with entkd.products._mkldnn_bf16(True):
        assert matmul.fp32_precision == "bf16"
    assert matmul.fp32_precision == before
    with pytest.raises(RuntimeError), entkd.products._mkldnn_bf16(True):
        raise RuntimeError
    assert matmul.fp32_precision == before


@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy(weighted):
    (h, w, _, _), (_, weights) = problem(torch.float64), extras(torch.float64)
    weights = weights if weighted else torch.ones(N)
    labels = torch.arange(N) % (V - 2)
    q = [formulas.softmax(w[: V - 2].numpy() @ row) for row in h.numpy()]
    expected = -sum(c * math.log(row[y]) for c, row, y in zip(weights.tolist(), q, labels.tolist(), strict=True))
    dz = np.array(
        [c * (row - np.eye(V - 2)[y]) for c, row, y in zip(weights.tolist(), q, labels.tolist(), strict=True)]
    )
    dh, dw = dz @ w[: V - 2].numpy(), dz.T @ h.numpy()
    h, w = h.requires_grad_(), w.requires_grad_()
    value = linear_cross_entropy(h, w, labels, weight_N=weights if weighted else None, vocab_size=V - 2)
    value.backward()
    assert_close((value.item(), h.grad, w.grad[: V - 2]), (expected, dh, dw), 1e-12)
    assert (w.grad[V - 2 :] == 0).all()
    empty = linear_cross_entropy(h[:0], w, labels[:0])
    empty.backward()
    assert empty.item() == 0


def small_tiles(monkeypatch):
    for module in (entkd.tiles, entkd.closeness):
        monkeypatch.setattr(module, "tile_rows", lambda vocab, device: 5)
        monkeypatch.setattr(module, "piece_rows", lambda vocab, device: 2)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("weighted", [False, True])
def test_both_terms_over_one_projection_equal_the_two_alone(monkeypatch, divergence, weighted):
    small_tiles(monkeypatch)
    tensors, (temperatures, weights) = problem(torch.float64), extras(torch.float64)
    labels, keywords = torch.arange(N) % V, {"divergence": divergence}
    if weighted:
        weights[[0, 7]] = 0
        keywords |= {"temperature_N": temperatures, "weight_N": weights}
    alone = run(tensors, **keywords)
    h, w = (tensor.clone().requires_grad_() for tensor in tensors[:2])
    ce = linear_cross_entropy(h, w, labels)
    ce.backward()
    both_h, both_w = (tensor.clone().requires_grad_() for tensor in tensors[:2])
    if weighted:  # a token of weight 0 has a cross-entropy all the same
        tensors[2][7] = math.nan
    both = linear_distillation(
        both_h, both_w, *tensors[2:], labels_N=labels, divergence_weight=0.7, cross_entropy_weight=1.5, **keywords
    )
    both.total.backward()
    assert_close(
        (both.total.item(), both_h.grad, both_w.grad),
        (
            0.7 * alone[0] + 1.5 * ce.item(),
            0.7 * alone[1] + 1.5 * h.grad,
            0.7 * alone[2] + 1.5 * w.grad,
        ),
        1e-12,
    )
    assert both.divergence.item() == pytest.approx(alone[0], rel=1e-12)
    assert both.cross_entropy.item() == pytest.approx(ce.item(), rel=1e-12)
    assert not both.divergence.requires_grad
    assert not both.cross_entropy.requires_grad


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_gradients_follow_finite_differences(monkeypatch, name, settings):
    """Along random directions in fp64; the weights that adaptive_kl and todi hold fixed are held fixed here too."""
    small_tiles(monkeypatch)
    tensors, (temperatures, weights) = problem(torch.float64), extras(torch.float64)
    _, dh, dw = run(tensors, divergence=name, settings=settings, temperature_N=temperatures, weight_N=weights)
    h, w, th, tw = tensors
    scale = (weights * temperatures**2).unsqueeze(-1)
    teacher = torch.log_softmax(th @ tw.T / temperatures.unsqueeze(-1), -1)
    student = torch.log_softmax(h @ w.T / temperatures.unsqueeze(-1), -1)
    sigma = torch.sigmoid(teacher - student)
    shares = entkd.divergences.adaptive_shares(
        teacher.exp(), student.exp(), settings.get("mu", 0.5), settings.get("variant", "authors")
    ).unsqueeze(-1)

    def value(h, w):
        if name not in ("adaptive_kl", "todi"):
            logits = h @ w.T, th @ tw.T, temperatures
            return (scale.squeeze(-1) * DIVERGENCES[name](*logits, **settings)).sum()
        log_q = torch.log_softmax(h @ w.T / temperatures.unsqueeze(-1), -1)
        forward, reverse = teacher.exp() * (teacher - log_q), log_q.exp() * (log_q - teacher)
        frozen = shares if name == "adaptive_kl" else sigma
        return (scale * (frozen * forward + (1 - frozen) * reverse)).sum()

    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        eh, ew = (torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in (h, w))
        step = 1e-6
        slope = (value(h + step * eh, w + step * ew) - value(h - step * eh, w - step * ew)) / (2 * step)
        expected = (dh * eh).sum() + (dw * ew).sum()
        assert slope.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sparse_target_follows_its_dense_reference(monkeypatch, dtype):
    small_tiles(monkeypatch)
    h, w, th, tw = problem(dtype)
    logits = th @ tw.T
    uniform = torch.rand(N, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ids, mass = draw_target(logits, 3, uniform)
    assert (mass == 0).any()
    target = SparseTarget(ids, mass, -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).float())
    weights = extras(dtype)[1]
    weights[4] = 0
    dense_h, dense_w = (tensor.clone().requires_grad_() for tensor in (h, w))
    expected = (weights * sparse_forward_kl(dense_h @ dense_w.T, target)).sum()
    expected.backward()
    h, w = h.requires_grad_(), w.requires_grad_()
    value = linear_divergence(h, w, target=target, weight_N=weights)
    value.backward()
    assert_close((value.item(), h.grad, w.grad), (expected.item(), dense_h.grad, dense_w.grad), 1e-5)


def test_a_sparse_target_that_holds_everything_gives_the_forward_kl():
    h, w, th, tw = problem()
    logits = th @ tw.T
    ids, mass = draw_target(logits, V, torch.zeros(N, 1, dtype=torch.float64))
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    h, w = h.requires_grad_(), w.requires_grad_()
    value = linear_divergence(h, w, target=SparseTarget(ids, mass, entropy))
    value.backward()
    expected = run((h.detach(), w.detach(), th, tw), divergence="forward_kl")
    assert_close((value.item(), h.grad, w.grad), expected, 1e-5)


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"divergence": "reverse_kl"}, "not reverse_kl; use hidden states"),
        ({"temperature_N": torch.ones(2)}, "at other temperatures; use hidden states"),
        ({"teacher_hidden_NE": torch.ones(2, 4)}, "not both"),
    ],
)
def test_a_sparse_target_is_refused_for_what_it_cannot_give(keywords, match):
    target = SparseTarget(torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1), torch.zeros(2))
    with pytest.raises(ValueError, match=match):
        linear_divergence(torch.ones(2, 4), torch.ones(5, 4), target=target, **keywords)
    with pytest.raises(ValueError, match="2 student tokens but 1 teacher tokens"):
        linear_divergence(torch.ones(2, 4), torch.ones(5, 4), target=target[:1])


def test_weights_from_the_students_own_output_are_formed_in_the_tile(monkeypatch):
    small_tiles(monkeypatch)
    tensors, (temperatures, weights) = problem(torch.float64), extras(torch.float64)
    seen = torch.zeros(N, dtype=torch.float64)

    def token_weight(entropy_R, divergence_R, rows):
        seen[rows] = entropy_R
        return entropy_R + 2 * divergence_R

    statistics = linear_statistics(*tensors, divergence="jsd", temperature_N=temperatures)
    own = statistics["entropy"] + 2 * statistics["divergence"]
    keywords = {"divergence": "jsd", "temperature_N": temperatures}
    expected = run(tensors, **keywords, weight_N=weights * own)
    assert_close(run(tensors, **keywords, weight_N=weights, token_weight=token_weight), expected, 1e-12)
    torch.testing.assert_close(seen, statistics["entropy"])


@pytest.mark.parametrize("with_labels", [False, True])
def test_weights_from_the_tile_stay_with_their_tokens_where_others_have_weight_zero(monkeypatch, with_labels):
    """Whether tokens of weight 0 are left out, or stay for the cross-entropy; a temperature there may be NaN."""
    small_tiles(monkeypatch)
    tensors, (temperatures, weights) = problem(torch.float64), extras(torch.float64)
    factor = torch.arange(1.0, N + 1, dtype=torch.float64)
    weights[[0, 3, 7]] = 0
    expected = run(tensors, divergence="jsd", temperature_N=temperatures, weight_N=weights * factor)
    temperatures[3] = math.nan
    h, w = (tensor.clone().requires_grad_() for tensor in tensors[:2])
    result = linear_distillation(
        h,
        w,
        *tensors[2:],
        labels_N=torch.arange(N) if with_labels else None,
        divergence="jsd",
        cross_entropy_weight=0.0,
        temperature_N=temperatures,
        weight_N=weights,
        token_weight=lambda entropy_R, divergence_R, rows: factor[rows],
    )
    result.total.backward()
    assert_close((result.divergence.item(), h.grad, w.grad), expected, 1e-12)


def test_statistics(monkeypatch):
    small_tiles(monkeypatch)
    h, w, noise, _ = problem()
    # A teacher that sometimes agrees: the student in two more dimensions, with noise.
    th, tw = torch.cat([h, torch.ones(N, E - D)], 1) + 0.4 * noise, torch.cat([w, torch.zeros(V, E - D)], 1)
    padded = torch.cat([w, torch.full((3, D), math.nan)])
    result = linear_statistics(h.requires_grad_(), padded, th, tw, vocab_size=V)
    assert set(result) == {"entropy", "divergence", "agreement"}
    for i in range(N):
        student, teacher = (
            (rows.detach().double() @ weight.double().T)[i].numpy() for rows, weight in ((h, w), (th, tw))
        )
        q, p = formulas.softmax(student), formulas.softmax(teacher)
        assert result["divergence"][i].item() == pytest.approx(formulas.kl(p, q), rel=1e-4)
        assert result["entropy"][i].item() == pytest.approx(-(q * np.log(q)).sum(), rel=1e-4)
        assert result["agreement"][i].item() == (student.argmax() == teacher.argmax())
    assert not any(tensor.requires_grad for tensor in result.values())
    assert 0 < result["agreement"].sum() < N
    temperatures = extras()[0]
    other = linear_statistics(
        h, w, th, tw, divergence="alpha_beta", temperature_N=temperatures, settings={"alpha": 0.5}
    )
    dense = DIVERGENCES["alpha_beta"](h @ w.T, th @ tw.T, temperatures, alpha=0.5)
    torch.testing.assert_close(other["divergence"], dense.detach())
    torch.testing.assert_close(other["entropy"], result["entropy"])
    assert set(linear_statistics(h, w)) == {"entropy"}
    assert all(len(tensor) == 0 for tensor in linear_statistics(h[:0], w, th[:0], tw).values())


def test_gradients_of_a_loss_are_given_away_once() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(7, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1, 2, 3]))
    loss.backward(retain_graph=True)
    kept = weight.grad
    expected = torch.nn.functional.cross_entropy(
        (hidden @ weight.T).detach().requires_grad_(), torch.tensor([1, 2, 3]), reduction="sum"
    )
    torch.testing.assert_close(loss, expected)
    before = kept.clone()
    linear_cross_entropy(hidden, weight, torch.tensor([1, 2, 3]))  # made in memory of its own
    assert torch.equal(kept, before)
    with pytest.raises(RuntimeError, match="differentiated before"):
        loss.backward()


def test_two_losses_alive_at_once_keep_their_gradients() -> None:
    """As cross-entropy beside distillation: neither writes over what the other has yet to give away."""
    hidden = torch.randn(3, 4)
    weight = torch.randn(7, 4, requires_grad=True)
    labels = torch.tensor([[1, 2, 3], [4, 5, 6]])
    expected = torch.autograd.grad(
        sum(torch.nn.functional.cross_entropy(hidden @ weight.T, own, reduction="sum") for own in labels), weight
    )[0]
    losses = [linear_cross_entropy(hidden, weight, own) for own in labels]
    sum(losses).backward()
    torch.testing.assert_close(weight.grad, expected)

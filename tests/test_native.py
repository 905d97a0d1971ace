"""The compiled kernels, what they refuse, and that nothing but time is lost without them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from entkd import native
from entkd.native import build
from entkd.products import add_weight_gradient, hidden_gradient, projection

needs_library = pytest.mark.skipif(not native.available(), reason="no C++ compiler, or a CPU without bf16 instructions")
SHAPES = [(1, 1, 2), (3, 63, 8), (300, 65, 6), (257, 129, 64), (31, 1100, 96), (64, 128, 32)]


def operands(rows, vocab, width):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).bfloat16()
    return hidden, torch.randn(vocab, width, generator=generator).bfloat16()


def gradients(rows, vocab):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(2)).bfloat16()


@needs_library
@pytest.mark.parametrize(("rows", "vocab", "width"), SHAPES)
def test_logits_are_exact_for_their_operands(rows, vocab, width):
    hidden, weight = operands(rows, vocab, width)
    out = torch.full((rows, vocab), torch.nan)
    assert native.logits(hidden, weight, out)
    expected = hidden.double() @ weight.double().T
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    fp32 = torch.randn(vocab, width, generator=torch.Generator().manual_seed(1))
    assert native.logits(hidden, fp32, out)
    torch.testing.assert_close(out.double(), hidden.double() @ fp32.bfloat16().double().T, rtol=1e-5, atol=1e-5)


@needs_library
@pytest.mark.parametrize(("rows", "vocab", "width"), SHAPES)
def test_gradients_are_exact_for_their_operands(rows, vocab, width):
    (hidden, weight), gradient = operands(rows, vocab, width), gradients(rows, vocab)
    out = torch.full((rows, width), torch.nan)
    assert native.hidden_gradient(gradient, weight, out)
    expected = gradient.double() @ weight.double()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6 * vocab)
    total = torch.full((vocab, width), torch.nan)
    product = gradient.double().T @ hidden.double()
    for add in (False, True, True):
        assert native.weight_gradient(gradient, hidden, total, add)
    torch.testing.assert_close(total.double(), 3 * product, rtol=1e-5, atol=1e-6 * rows)


@needs_library
@pytest.mark.parametrize("numbers", [1, 15, 16, 17, 300_001])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_adamw_is_the_papers_update(numbers, decay):
    """Against algorithm 2 of arXiv 1711.05101 in fp64, for steps with other gradients and rates each."""
    generator = torch.Generator().manual_seed(0)
    weight, mean, square = torch.randn(numbers, generator=generator), torch.zeros(numbers), torch.zeros(numbers)
    rounded = torch.empty(numbers, dtype=torch.bfloat16)
    theta, m, v = (each.double() for each in (weight, mean, square))
    for step, rate in enumerate((1e-3, 0.1, 0.02), start=1):
        gradient = torch.randn(numbers, generator=generator) * 10.0 ** (1 - step)
        g = 0.25 * gradient.double()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        direction = (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        theta = theta - rate * (direction + decay * theta)
        settings = {"factor": 0.25, "rate": rate, "betas": (0.9, 0.95), "epsilon": 1e-8, "decay": decay}
        assert native.adamw(weight, mean, square, gradient, rounded, step=step, **settings)
        torch.testing.assert_close(weight.double(), theta, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mean.double(), m, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(square.double(), v, rtol=1e-5, atol=1e-9)
        assert torch.equal(rounded, weight.bfloat16())


@needs_library
def test_adamw_rounds_as_pytorch_does_and_says_that_it_has_written():
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e-39, -1e-39, 3.4e38, 1.00390625, 1.01171875, 0.0, -0.0])
    zeros = torch.zeros_like(special)
    rounded, version = torch.empty(len(special), dtype=torch.bfloat16), special._version
    nothing = {"factor": 1.0, "rate": 0.0, "betas": (0.9, 0.95), "epsilon": 1e-8, "decay": 0.0, "step": 1}
    expected = special.bfloat16()
    assert native.adamw(special, zeros.clone(), zeros.clone(), zeros, rounded, **nothing)
    assert torch.equal(rounded.view(torch.int16)[1:], expected.view(torch.int16)[1:])
    assert rounded[0].isnan()
    assert special._version == version + 1
    assert not native.adamw(special.double(), zeros, zeros, zeros, None, **nothing)
    assert not native.adamw(special[::2], zeros[::2], zeros[::2], zeros[::2], None, **nothing)
    with pytest.raises(ValueError, match="differ"):
        native.adamw(special, zeros[:3].contiguous(), zeros, zeros, None, **nothing)


@needs_library
def test_what_they_are_not_made_for_is_left_to_others():
    hidden, weight = operands(4, 8, 6)
    out, gradient = torch.zeros(4, 8), gradients(4, 8)
    for tensors in (
        (hidden.float(), weight, out),
        (hidden, weight.double(), out),
        (hidden, weight, out.bfloat16()),
        (hidden.T.contiguous().T, weight, out),
        (hidden[:, :5].contiguous(), weight[:, :5].contiguous(), out),
    ):
        assert not native.logits(*tensors)
    assert not native.hidden_gradient(gradient.float(), weight, torch.zeros(4, 6))
    assert not native.hidden_gradient(gradient, weight.float(), torch.zeros(4, 6))
    assert not native.weight_gradient(gradient, hidden, torch.zeros(8, 6, dtype=torch.float64), False)
    assert (out == 0).all()
    with pytest.raises(ValueError, match="differ"):
        native.logits(hidden, weight, torch.zeros(4, 7))
    with pytest.raises(ValueError, match="differ"):
        native.hidden_gradient(gradient, weight[:7], torch.zeros(4, 6))
    with pytest.raises(ValueError, match="differ"):
        native.weight_gradient(gradient, hidden[:3], torch.zeros(8, 6), False)
    assert native.logits(hidden[:0], weight, out[:0])
    assert native.kl(out.double(), out.double(), None, None, False, None) is None
    assert native.kl(out, out, None, torch.ones(4, 1, dtype=torch.float64), False, None) is None
    with pytest.raises(ValueError, match="differ"):
        native.kl(out, out[:, :7].contiguous(), None, None, False, None)
    with pytest.raises(ValueError, match="labels from 0 to 8 for 8 tokens"):
        native.cross_entropy(out, torch.tensor([[0], [1], [2], [8]]), None, None)


@needs_library
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 4095, 4096, 4097, 9000])
def test_kl_of_rows(reverse, vocab):
    generator = torch.Generator().manual_seed(vocab)
    student, teacher = (6 * torch.randn(5, vocab, generator=generator) for _ in range(2))
    temperature = torch.tensor([[0.3], [1.0], [1.0], [2.0], [5.0]])
    scale = torch.tensor([[1.0], [0.5], [-2.0], [1e-3], [7.0]])
    q, p = ((tensor.double() / temperature.double()).log_softmax(-1) for tensor in (student, teacher))
    if reverse:
        q, p = p, q
    expected = (p.exp() * (p - q)).sum(-1, keepdim=True)
    slope = p.exp() * (p - q - expected) if reverse else q.exp() - p.exp()
    slope = slope * scale.double() / temperature.double()
    gradient = torch.full_like(student, torch.nan)
    value = native.kl(student, teacher, temperature, scale, reverse, gradient)
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=2e-6)
    # Of log-probabilities near -100, whose last bit is 8e-6, differences are taken and divided by a temperature of 0.3.
    torch.testing.assert_close(gradient.double(), slope, rtol=2e-5, atol=1e-4 if reverse else 2e-6)
    rounded = torch.empty(student.shape, dtype=torch.bfloat16)
    native.kl(student, teacher, temperature, scale, reverse, rounded)
    torch.testing.assert_close(rounded, gradient.bfloat16(), rtol=0, atol=1e-37)  # it makes 0 of subnormal numbers
    assert torch.equal(native.kl(student, teacher, temperature, scale, reverse, student), value)  # over the logits
    assert torch.equal(student, gradient)


@needs_library
def test_one_number_for_all_rows_may_be_kept_once():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 50, generator=generator) for _ in range(2))
    once, labels = torch.tensor([[1.5]]).expand(4, 1), torch.tensor([[7]]).expand(4, 1)
    every = once.contiguous()
    expected, found = torch.empty(4, 50), torch.empty(4, 50)
    value = native.kl(student, teacher, every, every, False, expected)
    assert torch.equal(native.kl(student, teacher, once, once, False, found), value)
    assert torch.equal(found, expected)
    value = native.cross_entropy(student, labels.contiguous(), every, expected)
    assert torch.equal(native.cross_entropy(student, labels, once, found), value)
    assert torch.equal(found, expected)


@needs_library
@pytest.mark.parametrize("shift", [0.0, 300.0, -5e4])
def test_extreme_rows(shift):
    student = torch.tensor([[0.0, -1e3, 80.0, 1e4], [1.0, 2.0, 3.0, 4.0]]) + shift
    teacher = torch.tensor([[0.0, 50.0, -torch.inf, -torch.inf], [1.0, 2.0, 3.0, 4.0]]) - shift
    value, gradient = native.kl(student, teacher, None, None, False, None), torch.empty_like(student)
    native.kl(student, teacher, None, None, False, gradient)
    log_q, log_p = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    expected = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).nansum(-1)
    torch.testing.assert_close(value[:, 0].double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), log_q.exp() - log_p.exp(), rtol=1e-5, atol=1e-6)
    assert abs(value[1]) < 1e-6
    student[0, 0] = torch.nan
    native.kl(student, teacher, None, None, False, gradient)
    assert gradient[0].isnan().all()
    assert not gradient[1].isnan().any()


def test_without_them_the_numbers_are_the_same(monkeypatch):
    (hidden, weight), gradient = operands(5, 40, 16), gradients(5, 40)

    def everything(name):
        out, total = torch.empty(5, 16), torch.empty(40, 16)
        hidden_gradient(gradient, weight, out)
        for first in (True, False):
            add_weight_gradient(total, gradient, hidden, first)
        return projection(hidden, weight, name)(slice(1, 5)).clone(), out, total

    with_library = everything("one")
    monkeypatch.setattr(native, "library", lambda: None)
    without = everything("two")
    torch.testing.assert_close(with_library[0], without[0], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(with_library[1:], without[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)  # theirs goes by way of bf16
    torch.testing.assert_close(without[0].double(), hidden[1:].double() @ weight.double().T, rtol=1e-5, atol=1e-5)


def test_without_them_a_weight_is_cast_once_for_all_tiles(monkeypatch):
    hidden, weight = operands(6, 40, 16)
    casts = []
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr("entkd.products.cast", lambda weight, dtype, name: casts.append(name) or weight.to(dtype))
    project = projection(hidden, weight, "logits")
    for start in range(0, 6, 2):
        torch.testing.assert_close(
            project(slice(start, start + 2)), hidden[start : start + 2].float() @ weight.float().T
        )
    assert casts == ["weight of logits"]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ENTKD_NATIVE": "0"}, ""),
        ({"CXX": "/nowhere/c++"}, ""),
        ({"CXX": "false"}, "could not be compiled"),
    ],
)
def test_a_missing_or_broken_compiler_is_no_error(environment, message, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    script = (
        "import torch; torch.cpu._is_avx512_bf16_supported = lambda: True\n"
        "from entkd import native; assert not native.available()"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert message in ended.stderr
    assert ended.stderr.count("\n") == (1 if message else 0), ended.stderr
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".so", ".o", ".tmp")]


@pytest.mark.parametrize("setting", ["AVX2", "AVX512_CORE", "off"])
@pytest.mark.skipif(not native.available(), reason="no kernels for this CPU")
def test_where_onednn_is_kept_from_the_instructions_others_do_the_work(setting, monkeypatch):
    lines = [
        "import torch, entkd.fused; from entkd import native",
        f"torch.backends.mkldnn.enabled = {setting != 'off'}",
        "h, w = (torch.ones(n, 32, dtype=torch.bfloat16, requires_grad=True) for n in (4, 64))",
        "entkd.fused.linear_divergence(h, w, torch.randn(4, 64)).backward()",
        "assert not native.available() and torch.isfinite(w.grad).all()",
    ]
    if setting != "off":
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", setting)
    ended = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == "native: oneDNN's bf16 kernels do not run, so losses take longer\n"


def test_all_sources_are_in_the_key_of_the_cache():
    assert {path.name for path in build.FOLDER.glob("*.cpp")} == set(build.SOURCES)
    assert {path.name for path in build.FOLDER.glob("*.h")} == {"simd.h"}

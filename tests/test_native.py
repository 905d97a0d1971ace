"""The compiled product, what it refuses, and that nothing but time is lost without it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from entkd import native
from entkd.products import projection

needs_library = pytest.mark.skipif(
    native._library() is None, reason="no C++ compiler, or a CPU without bf16 instructions"
)


def operands(rows, vocab, width):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).bfloat16()
    return hidden, torch.randn(vocab, width, generator=generator).bfloat16()


@needs_library
@pytest.mark.parametrize(("rows", "vocab", "width"), [(1, 1, 2), (3, 63, 8), (300, 65, 6), (257, 129, 64)])
def test_the_product_is_exact_for_its_operands(rows, vocab, width):
    hidden, weight = operands(rows, vocab, width)
    out = torch.full((rows, vocab), torch.nan)
    assert native.bf16_product(hidden, weight, out)
    expected = hidden.double() @ weight.double().T
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    fp32 = torch.randn(vocab, width, generator=torch.Generator().manual_seed(1))
    assert native.bf16_product(hidden, fp32, out)
    torch.testing.assert_close(out.double(), hidden.double() @ fp32.bfloat16().double().T, rtol=1e-5, atol=1e-5)


@needs_library
def test_what_it_is_not_made_for_is_left_to_others():
    hidden, weight = operands(4, 8, 6)
    out = torch.zeros(4, 8)
    for tensors in (
        (hidden.float(), weight, out),
        (hidden, weight.double(), out),
        (hidden, weight, out.bfloat16()),
        (hidden.T.contiguous().T, weight, out),
        (hidden[:, :5].contiguous(), weight[:, :5].contiguous(), out),
    ):
        assert not native.bf16_product(*tensors)
    assert (out == 0).all()
    with pytest.raises(ValueError, match="differ"):
        native.bf16_product(hidden, weight, torch.zeros(4, 7))
    assert native.bf16_product(hidden[:0], weight, out[:0])


def test_without_it_the_numbers_are_the_same(monkeypatch):
    hidden, weight = operands(5, 40, 16)
    with_library = projection(hidden, weight, "one")(slice(1, 5)).clone()
    monkeypatch.setattr(native, "_library", lambda: None)
    without = projection(hidden, weight, "two")(slice(1, 5))
    torch.testing.assert_close(with_library, without, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(without.double(), hidden[1:].double() @ weight.double().T, rtol=1e-5, atol=1e-5)


def test_without_it_a_weight_is_cast_once_for_all_tiles(monkeypatch):
    hidden, weight = operands(6, 40, 16)
    casts = []
    monkeypatch.setattr(native, "_library", lambda: None)
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
        "from entkd import native; assert native._library() is None"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert message in ended.stderr
    assert ended.stderr.count("\n") == (1 if message else 0), ended.stderr
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".so", ".o", ".tmp")]

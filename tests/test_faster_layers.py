"""Norms, gated MLPs and rotary positions in single passes: against fp64, and whole models against Transformers' own."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from tiny_models import tiny_llama
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from entkd import native
from entkd.models import trunk_forward
from entkd.models.faster_layers import faster_rotation, use_faster_layers
from entkd.native.layers import RMSNorm, Rotation, SwiGLU

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels here")
V = 60
SMALL = {"vocab_size": V, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
GROUPED = SMALL | {"num_key_value_heads": 2, "intermediate_size": 40}
MODELS = {
    "llama": lambda: tiny_llama(V),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=8)),
}


def compare(function: Callable[..., Tensor], formula: Callable[..., Tensor], *inputs: Tensor, tolerance: float) -> None:
    """Value and gradients by all inputs against autograd of the formula in fp64 on the same numbers."""
    leaves = [each.clone().requires_grad_() for each in inputs]
    exact = [each.double().requires_grad_() for each in inputs]
    out, expected = function(*leaves), formula(*exact)
    slope = torch.randn(out.shape).to(out.dtype)
    found = torch.autograd.grad(out, leaves, slope)
    wanted = torch.autograd.grad(expected, exact, slope.double())
    for own, other in zip((out, *found), (expected, *wanted), strict=True):
        assert (own.double() - other).norm() <= tolerance * other.norm() + 1e-7
        torch.testing.assert_close(own.double(), other, rtol=4 * tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 16), (2, 3, 17), (1, 300, 576), (40, 33)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    states, weight = torch.randn(shape) * 3, torch.randn(shape[-1])

    def formula(states: Tensor, weight: Tensor) -> Tensor:
        return weight * states / (states.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    compare(lambda x, w: RMSNorm.apply(x, w, 1e-5), formula, states, weight, tolerance=1e-5)


def test_rms_norm_takes_strided_states_and_zeros() -> None:
    weight = torch.ones(6)
    states = torch.randn(6, 4).T
    assert torch.allclose(RMSNorm.apply(states, weight, 1e-6), nn.functional.rms_norm(states, (6,), eps=1e-6))
    zeros = torch.zeros(2, 6, requires_grad=True)
    RMSNorm.apply(zeros, weight, 1e-6).sum().backward()
    assert zeros.grad is not None
    assert torch.allclose(zeros.grad, torch.full((2, 6), 1e3))


@pytest.mark.parametrize("shape", [(1,), (16,), (1, 5, 33), (1, 600, 40)])
def test_swiglu(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(shape).bfloat16() * 4 for _ in range(2))
    compare(SwiGLU.apply, lambda a, b: a * torch.sigmoid(a) * b, gate, up, tolerance=4e-3)


def test_swiglu_at_its_ends() -> None:
    gate = torch.tensor([-1e4, -300.0, -90.0, 0.0, 90.0, 300.0, 1e4, torch.nan]).bfloat16().requires_grad_()
    out = SwiGLU.apply(gate, torch.ones(8).bfloat16())
    assert out[:4].abs().max() < 1e-30
    assert torch.equal(out[4:7], gate[4:7])
    out.sum().backward()
    assert gate.grad is not None
    assert torch.allclose(gate.grad[:7].float(), torch.tensor([0.0, 0, 0, 0.5, 1, 1, 1]))
    assert out[7].isnan()
    assert gate.grad[7].isnan()


@pytest.mark.parametrize(("heads", "width"), [(1, 2), (3, 8), (9, 64), (2, 80)])
def test_rotation(heads: int, width: int) -> None:
    torch.manual_seed(0)
    states = torch.randn(1, 7, heads, width).bfloat16()
    cos, sin = torch.randn(1, 7, width), torch.randn(1, 7, width)  # both halves differ: nothing is assumed of them

    def formula(states: Tensor) -> Tensor:
        upper, lower = states.chunk(2, dim=-1)
        return states * cos.double()[:, :, None] + torch.cat([-lower, upper], dim=-1) * sin.double()[:, :, None]

    compare(lambda x: Rotation.apply(x, cos, sin), formula, states, tolerance=4e-3)


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_is_as_near_to_fp32_as_under_autocast_alone(kind: str) -> None:
    torch.manual_seed(0)
    plain, faster = MODELS[kind](), MODELS[kind]()
    faster.load_state_dict(plain.state_dict())
    use_faster_layers(faster)
    ids = torch.randint(3, V, (1, 50), generator=torch.Generator().manual_seed(1))
    slope = torch.randn(1, 50, plain.config.hidden_size, generator=torch.Generator().manual_seed(2))
    modeling = sys.modules[type(plain).__module__]
    own = modeling.apply_rotary_pos_emb

    def run(model: nn.Module, autocast: bool) -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            if model is faster:
                with faster_rotation(model):
                    assert (modeling.apply_rotary_pos_emb is not own) == autocast
                    hidden, _ = trunk_forward(model, ids, torch.arange(50)[None])
            else:
                hidden, _ = trunk_forward(model, ids, torch.arange(50)[None])
        hidden.backward(slope.to(hidden.dtype))
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return [hidden.detach().float().flatten(), torch.cat([g.flatten() for g in gradients])]

    exact = run(plain, autocast=False)
    for found, expected in zip(run(faster, autocast=False), exact, strict=True):
        assert torch.equal(found, expected)  # without autocast it is the model itself
    for found, ordinary, expected in zip(run(faster, True), run(plain, True), exact, strict=True):
        error, ordinary_error = ((each - expected).norm() / expected.norm() for each in (found, ordinary))
        assert 0 < error < 1.2 * ordinary_error
    assert modeling.apply_rotary_pos_emb is own


def test_the_function_is_put_back_after_an_error() -> None:
    model = tiny_llama(V)
    modeling = sys.modules[type(model).__module__]
    own = modeling.apply_rotary_pos_emb
    with (
        pytest.raises(RuntimeError, match="in between"),
        torch.autocast("cpu", dtype=torch.bfloat16),
        faster_rotation(model),
    ):
        raise RuntimeError("in between")
    assert modeling.apply_rotary_pos_emb is own

"""Linear layers with kept bf16 weights: autocast's numbers, gradients nearer to fp64's than autocast's."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tiny_models import tiny_llama
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from entkd import native
from entkd.config import Training
from entkd.distill.optim import build_optimizer, clip_gradients
from entkd.models.linear import _forward, keep_rounded_weights

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels here")
TOKENS, D, V = 37, 24, 18


def layers(bias: bool) -> tuple[nn.Linear, nn.Linear]:
    """A layer as PyTorch made it, and its copy that keeps a rounded weight."""
    torch.manual_seed(0)
    plain, kept = nn.Linear(D, V, bias=bias), nn.Linear(D, V, bias=bias)
    kept.load_state_dict(plain.state_dict())
    kept.forward = _forward(kept)  # type: ignore[method-assign]
    return plain, kept


def run(layer: nn.Linear, hidden: Tensor, slope: Tensor) -> tuple[Tensor, list[Tensor]]:
    hidden = hidden.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(hidden)
    gradients = torch.autograd.grad(out, [hidden, *layer.parameters()], slope)
    return out, list(gradients)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(TOKENS,), (1, TOKENS), (2, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_is_autocasts_and_gradients_are_exacter(bias: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    plain, kept = layers(bias)
    hidden, slope = torch.randn(*shape, D).to(dtype), torch.randn(*shape, V).bfloat16()
    expected, of_plain = run(plain, hidden, slope)
    out, of_kept = run(kept, hidden, slope)
    assert torch.equal(out, expected)
    assert torch.equal(of_kept[0], of_plain[0])
    assert of_kept[0].dtype == dtype
    exact = slope.flatten(0, -2).double().T @ hidden.flatten(0, -2).bfloat16().double()
    torch.testing.assert_close(of_kept[1].double(), exact, rtol=1e-5, atol=1e-5)
    assert (of_kept[1] - exact).norm() < 0.1 * (of_plain[1] - exact).norm()
    if bias:
        torch.testing.assert_close(of_kept[2], slope.flatten(0, -2).float().sum(0), rtol=1e-5, atol=1e-5)


def test_without_autocast_it_is_the_layer_itself() -> None:
    plain, kept = layers(True)
    hidden = torch.randn(TOKENS, D)
    assert torch.equal(kept(hidden), plain(hidden))


def test_frozen_weights_and_inputs_get_no_gradient() -> None:
    _, kept = layers(False)
    kept.weight.requires_grad_(False)
    hidden = torch.randn(TOKENS, D, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept(hidden).float().sum().backward()
    assert kept.weight.grad is None
    assert hidden.grad is not None


@pytest.mark.parametrize("biased", [False, True])
def test_a_model_trains_as_under_autocast(biased: bool) -> None:
    """Several steps, so that weights of the step before would be seen."""
    small = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(**small, num_key_value_heads=2, intermediate_size=32)
    torch.manual_seed(0)
    plain, kept = (Qwen2ForCausalLM(config) if biased else tiny_llama(60) for _ in range(2))
    kept.load_state_dict(plain.state_dict())
    keep_rounded_weights(kept)
    ids = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(1))
    training = Training(steps=1, lr=3e-3, clip=1.0)
    losses: dict[str, list[float]] = {}
    for name, model in (("plain", plain), ("kept", kept)):
        optimizer = build_optimizer(model, None, training, None)
        for _ in range(8):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            clip_gradients(model, None, training.clip, optimizer)
            optimizer.step()
            losses.setdefault(name, []).append(loss.item())
    assert losses["kept"][0] == losses["plain"][0]
    assert losses["kept"] == pytest.approx(losses["plain"], rel=2e-3)
    assert all(later < earlier for earlier, later in pairwise(losses["kept"]))

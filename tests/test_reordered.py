from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_models import tiny_llama
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from entkd.reordered import reordered_weights

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="oneDNN has no bf16 products on this CPU",
)

SIZES = {
    "vocab_size": 300,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
GPT2 = {"n_embd": 96, "n_layer": 2, "n_head": 4, "vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "llama": lambda: tiny_llama(hidden_size=96, intermediate_size=160),
    "llama, untied": lambda: tiny_llama(hidden_size=96, intermediate_size=160, tie_word_embeddings=False),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
}


def make(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for bias in (each for key, each in model.named_parameters() if key.endswith("bias")):
        torch.nn.init.normal_(bias)
    return model.bfloat16()


def linear_layers(model: PreTrainedModel) -> list[torch.nn.Linear]:
    return [layer for layer in model.modules() if type(layer) is torch.nn.Linear]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_logits_are_those_of_the_weights_in_fp64_as_closely_as_before(name: str, rows: int) -> None:
    model, ids = make(name), torch.arange(3, 3 + rows * 6).view(rows, 6)
    with torch.inference_mode():
        before = model(ids).logits
        with reordered_weights(model):
            within = model(ids).logits
        after = model(ids).logits
        expected = make(name).double()(ids).logits
    assert torch.equal(after, before)
    of_before, of_within = ((each - expected).square().mean().sqrt() for each in (before, within))
    assert of_within <= 1.05 * of_before
    torch.testing.assert_close(within, before)


@pytest.mark.parametrize("name", MODELS)
def test_memory_holds_a_weight_in_one_order_unless_it_is_an_embedding_too(name: str) -> None:
    model = make(name)
    embedding = model.get_input_embeddings().weight
    with torch.inference_mode(), reordered_weights(model):
        kept = [layer for layer in linear_layers(model) if layer.weight.numel()]
        assert embedding.numel()
    assert [layer.weight is embedding for layer in kept] == [True] * (name != "llama, untied" and len(kept))


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_the_model_is_as_before_and_can_be_trained(fails: bool) -> None:
    model, ids = make("qwen2"), torch.arange(3, 33).view(5, 6)
    before = {name: (id(weight), weight.detach().clone()) for name, weight in model.named_parameters()}
    model(ids, labels=ids).loss.backward()
    gradients = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    try:
        with torch.inference_mode(), reordered_weights(model):
            assert all("forward" in vars(layer) for layer in linear_layers(model))
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert not any("forward" in vars(layer) for layer in linear_layers(model))
    for name, weight in model.named_parameters():
        identity, values = before[name]
        assert id(weight) == identity
        assert torch.equal(weight, values)
        assert weight.requires_grad
        assert not weight.is_inference()
        assert weight.stride() == values.stride()
    model(ids, labels=ids).loss.backward()
    assert all(torch.equal(weight.grad, old) for weight, old in zip(model.parameters(), gradients, strict=True))


@pytest.mark.parametrize("which", ["fp32", "another type"])
def test_other_models_are_left_alone(which: str) -> None:
    model = tiny_llama() if which == "fp32" else MistralForCausalLM(MistralConfig(**SIZES)).bfloat16()
    with reordered_weights(model):
        assert all(layer.weight.numel() and "forward" not in vars(layer) for layer in linear_layers(model))

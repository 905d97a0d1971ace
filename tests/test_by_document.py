"""Without gradient on a CPU, documents one by one give what the packed blocks give, and padding is not computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from entkd.data.corpus import Corpus
from entkd.data.packing import Batch, collate
from entkd.models import by_document, packed_states, trunk, trunk_forward
from tests.tiny_models import tiny_llama

V = 300
SMALL = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.4}
GROUPED = SMALL | {"num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 512}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny_llama,
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=3, n_head=4, initializer_range=0.4)),
}


@pytest.fixture
def corpus(tiny_corpus: Path) -> Corpus:
    return Corpus.open(tiny_corpus, "train")


def in_blocks(model: PreTrainedModel, batch: Batch, capture=()) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    hidden_BLD, captured = trunk_forward(model, batch.input_ids_BL, batch.position_ids_BL, capture)
    states = {layer: each.flatten(0, 1)[batch.positions_N] for layer, each in captured.items()}
    return hidden_BLD.flatten(0, 1)[batch.positions_N], states


def tokens_seen(model: PreTrainedModel, run: Callable[[], object]) -> int:
    """Tokens through the first layer."""
    seen: list[int] = []

    def count(_module, args, kwargs):
        hidden_BLD = args[0] if args else kwargs["hidden_states"]
        seen.append(hidden_BLD.shape[0] * hidden_BLD.shape[1])

    layers = getattr(trunk(model), "layers", None) or trunk(model).h
    handle = layers[0].register_forward_pre_hook(count, with_kwargs=True)
    run()
    handle.remove()
    return sum(seen)


@pytest.mark.parametrize("blocks", [[[5]], [[5, 0], [17, 3]], [[9], [30, 1, 2], [4]]])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_it_gives_what_packed_blocks_give(name: str, blocks: list[list[int]], corpus: Corpus) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.config.use_cache = False
    batch = collate(corpus, [np.asarray(block) for block in blocks], 256, 2)
    expected, expected_layers = in_blocks(model, batch, (0, 2))
    found, layers = packed_states(model, batch, (0, 2))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for layer in (0, 2):
        torch.testing.assert_close(layers[layer], expected_layers[layer], rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == "sdpa"
    real = int(corpus.lengths[[document for block in blocks for document in block]].sum())
    assert tokens_seen(model, lambda: packed_states(model, batch)) == -(-real // 16) * 16
    assert tokens_seen(model, lambda: in_blocks(model, batch)) == 256 * len(blocks)


def test_padding_of_any_value_changes_nothing(corpus: Corpus) -> None:
    model, batch = tiny_llama(), collate(corpus, [np.asarray([5, 0])], 256, 2)
    other = collate(corpus, [np.asarray([5, 0])], 256, 77)
    with torch.no_grad():
        assert torch.equal(packed_states(model, batch)[0], packed_states(model, other)[0])


@pytest.mark.parametrize("why", ["gradient", "attention", "type", "windows"])
def test_where_it_cannot_the_blocks_are_computed(why: str, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_llama(), collate(corpus, [np.asarray([5, 0])], 256, 2)
    if why == "attention":
        model = tiny_llama(attn_implementation="eager")
    if why == "windows":
        window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
        model = Qwen2ForCausalLM(Qwen2Config(**GROUPED, **window)).eval()
    if why == "type":
        model = OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=16)).eval()
    monkeypatch.setattr(by_document, "_kept", lambda *_: pytest.fail("went by document"))
    with torch.set_grad_enabled(why == "gradient"):
        found, _ = packed_states(model, batch)
        assert torch.equal(found, in_blocks(model, batch)[0])
    assert found.requires_grad == (why == "gradient")


def test_an_error_leaves_the_model_as_it_was(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_llama(), collate(corpus, [np.asarray([5, 0])], 256, 2)

    def fails(*_arguments):
        raise RuntimeError("no memory")

    monkeypatch.setattr(by_document, "trunk_forward", fails)
    with torch.no_grad(), pytest.raises(RuntimeError, match="no memory"):
        packed_states(model, batch)
    assert model.config._attn_implementation == "sdpa"

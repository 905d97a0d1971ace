"""On a CPU, documents one by one give what the packed blocks give, gradients too, and nothing else is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_llama
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
from entkd.models import attention, by_document, decoder_layers, packed_states, trunk, trunk_forward

V = 300
SMALL = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.4}
GROUPED = SMALL | {"num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 512}
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny_llama,
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_embd=16, n_layer=3, n_head=4, initializer_range=0.4, **NO_DROPOUT)
    ),
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


def make(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype)
    model.config.use_cache = False
    return model


def batch_of(rows: list[list[tuple[int, int, int]]], block: int = 40, pad_id: int = 2) -> Batch:
    """Documents of random tokens from 3 on: (tokens, first and last that predicts) each."""
    torch.manual_seed(1)
    ids_BL, positions_BL = torch.full((len(rows), block), pad_id), torch.zeros(len(rows), block, dtype=torch.int64)
    positions: list[int] = []
    for row, documents in enumerate(rows):
        start = 0
        for tokens, first, last in documents:
            ids_BL[row, start : start + tokens] = torch.randint(3, V, (tokens,))
            positions_BL[row, start : start + tokens] = torch.arange(tokens)
            positions += range(row * block + start + first, row * block + start + last + 1)
            start += tokens
    positions_N = torch.tensor(positions, dtype=torch.int64)
    return Batch(ids_BL, positions_BL, positions_N, torch.zeros_like(positions_N), torch.arange(len(positions)))


SEVERAL = [[(9, 4, 7), (2, 0, 0), (17, 0, 15)], [(30, 11, 20), (1, 0, 0), (5, 3, 3)], [(12, 10, 10)]]
"""With a prompt of one token, documents of one and of two, and tokens that predict nothing behind those that do."""


def with_gradients(
    model: PreTrainedModel, found: tuple[torch.Tensor, dict[int, torch.Tensor]]
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The states, and the gradients of a number that all of them are in."""
    states = [found[0], *found[1].values()]
    generator = torch.Generator().manual_seed(2)
    total = sum((each * torch.randn(each.shape, generator=generator).to(each)).sum() for each in states)
    named = dict(trunk(model).named_parameters())
    gradients = torch.autograd.grad(total, list(named.values()))
    return [each.detach() for each in states], dict(zip(named, gradients, strict=True))


def assert_same(
    found: tuple[list[torch.Tensor], dict[str, torch.Tensor]],
    expected: tuple[list[torch.Tensor], dict[str, torch.Tensor]],
) -> None:
    """Within rounding of the largest number of each tensor."""
    close = 1e-10 if expected[0][0].dtype == torch.float64 else 2e-5
    pairs = [*zip(found[0], expected[0], strict=True), *((found[1][name], expected[1][name]) for name in expected[1])]
    for one, other in pairs:
        assert one.shape == other.shape
        assert (one - other).abs().max() <= close * other.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_packed_blocks(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_QUERIES", 7)  # several parts of a document
    model, batch = make(name, dtype).train(), batch_of(SEVERAL)
    expected = with_gradients(model, in_blocks(model, batch, (0, 2)))
    found = with_gradients(model, packed_states(model, batch, (0, 2)))
    assert_same(found, expected)
    again = with_gradients(model, packed_states(model, batch, (0, 2)))
    assert all(torch.equal(found[1][each], again[1][each]) for each in again[1])


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_every_document_alone(name: str) -> None:
    model = make(name, torch.float64).train()
    batch, parts = batch_of(SEVERAL), []
    for row, documents in enumerate(SEVERAL):
        start = 0
        for tokens, first, last in documents:
            own_1L = batch.input_ids_BL[row : row + 1, start : start + tokens]
            hidden_1LD, layers = trunk_forward(model, own_1L, torch.arange(tokens)[None], (0, 2))
            parts.append([each[0, first : last + 1] for each in (hidden_1LD, *layers.values())])
            start += tokens
    alone_ND, *layers_alone = (torch.cat(states) for states in zip(*parts, strict=True))
    expected = with_gradients(model, (alone_ND, dict(enumerate(layers_alone))))
    assert_same(with_gradients(model, packed_states(model, batch, (0, 2))), expected)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_under_autocast_it_is_as_near_to_fp32_as_packed_blocks_are(name: str) -> None:
    model, batch = make(name).train(), batch_of(SEVERAL)
    exact = with_gradients(model, in_blocks(model, batch))[1]

    def error(run: Callable[[PreTrainedModel, Batch], tuple[torch.Tensor, dict[int, torch.Tensor]]]) -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states, layers = run(model, batch)
        found = with_gradients(model, (states.float(), layers))[1]
        return sum(float((found[each] - exact[each]).norm() / exact[each].norm()) for each in exact)

    assert 0 < error(packed_states) < 1.5 * error(in_blocks)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("documents", [[], [(9, 4, 3), (5, 1, 0)]], ids=["no document", "no position"])
def test_a_batch_that_predicts_nothing_has_gradients_of_zero(name: str, documents: list[tuple[int, int, int]]) -> None:
    model, batch = make(name).train(), batch_of([documents])
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = packed_states(model, batch, (0, 2))
        assert found[0].shape == found[1][0].shape == found[1][2].shape == (0, found[0].shape[1])
        assert all(not gradient.any() for gradient in with_gradients(model, found)[1].values())


def test_nan_stays_in_padding_and_in_its_document() -> None:
    model = make("llama").train()
    clean = packed_states(model, batch_of(SEVERAL))[0]
    batch = batch_of(SEVERAL, pad_id=1)
    with torch.no_grad():
        model.get_input_embeddings().weight[1] = float("nan")
    assert all(gradient.isfinite().all() for gradient in with_gradients(model, packed_states(model, batch))[1].values())
    batch.input_ids_BL[0, 0] = 1
    bad_ND = packed_states(model, batch)[0]
    assert bad_ND[:4].isnan().all()
    assert torch.equal(bad_ND[4:], clean[4:])


@pytest.mark.parametrize("name", MODELS)
def test_the_last_layer_is_computed_where_it_is_read(name: str) -> None:
    model, batch = make(name), batch_of(SEVERAL)
    seen: list[int] = []
    for layer in decoder_layers(model):
        layer.mlp.register_forward_hook(lambda _module, args, _output: seen.append(args[0].shape[1]))
    packed_states(model, batch)
    *others, last = seen
    assert set(others) == {80}
    assert last == (80 if name == "gpt2" else len(batch.positions_N))


@pytest.mark.parametrize("why", ["order", "code", "forward"])
def test_the_last_layer_is_left_whole_where_it_is_not_known(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make("qwen2"), batch_of(SEVERAL)
    if why == "order":
        batch = replace(batch, positions_N=batch.positions_N.flip(0))
    if why == "code":
        own = type(decoder_layers(model)[-1])
        decoder_layers(model)[-1].__class__ = type("Layer", (own,), {})
    if why == "forward":
        layer = decoder_layers(model)[-1].self_attn
        layer.forward = layer.forward
    expected = with_gradients(model, in_blocks(model, batch, (2,)))
    monkeypatch.setattr(by_document, "last_layer_at", lambda *_: pytest.fail("cut"))
    assert_same(with_gradients(model, packed_states(model, batch, (2,))), expected)


@pytest.mark.parametrize("why", ["attention", "type", "windows", "dropout", "dropout of gpt2", "checkpointing"])
@pytest.mark.parametrize("gradient", [True, False])
def test_where_it_cannot_the_blocks_are_computed(
    why: str, gradient: bool, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = tiny_llama(), collate(corpus, [np.asarray([5, 0])], 256, 2)
    if why == "attention":
        model = tiny_llama(attn_implementation="eager")
    if why == "windows":
        window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
        model = Qwen2ForCausalLM(Qwen2Config(**GROUPED, **window)).eval()
    if why == "type":
        model = OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=16)).eval()
    if why == "dropout":
        model = tiny_llama(attention_dropout=0.1).train()
    if why == "dropout of gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=3, n_head=4)).train()
    if why == "checkpointing":
        model = tiny_llama().train()
        model.activation_checkpointing_enable()
    model.config.use_cache = False
    monkeypatch.setattr(by_document, "_kept", lambda *_: pytest.fail("went by document"))
    with torch.set_grad_enabled(gradient):
        torch.manual_seed(0)
        found, _ = packed_states(model, batch)
        torch.manual_seed(0)
        assert torch.equal(found, in_blocks(model, batch)[0])
    assert found.requires_grad == gradient


def test_dropout_is_no_hindrance_where_it_is_off(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_llama(attention_dropout=0.1).eval(), collate(corpus, [np.asarray([5, 0])], 256, 2)
    monkeypatch.setattr(by_document, "trunk_forward", lambda _model, ids, *_: pytest.fail(f"{ids.numel()} tokens"))
    real = int(corpus.lengths[[5, 0]].sum())
    with pytest.raises(pytest.fail.Exception, match=f"{-(-real // 16) * 16} tokens"):
        packed_states(model, batch)


def test_an_error_leaves_the_model_as_it_was(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_llama(), collate(corpus, [np.asarray([5, 0])], 256, 2)

    def fails(*_arguments):
        raise RuntimeError("no memory")

    monkeypatch.setattr(by_document, "trunk_forward", fails)
    with torch.no_grad(), pytest.raises(RuntimeError, match="no memory"):
        packed_states(model, batch)
    assert model.config._attn_implementation == "sdpa"


def test_attention_is_in_the_type_of_autocast():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 12, 8, generator=generator) for heads in (4, 2, 2))
    documents = attention.whole([0, 5], 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = attention.attend(query, key, value, documents, None)
    assert cast.dtype == torch.bfloat16
    rounded = attention.attend(query.bfloat16(), key.bfloat16(), value.bfloat16(), documents, None)
    assert torch.equal(cast, rounded)
    assert attention.attend(query, key, value, documents, None).dtype == torch.float32

"""A GGUF file is read once, by whatever way Transformers asks for it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from entkd.models import gguf_file, load_model, load_tokenizer, save_model
from entkd.models.gguf_file import load_gguf, read_once

PLAIN = (gguf.GGUFReader, gguf.get_tensor_name_map)


@pytest.fixture(scope="module")
def tiny_gguf(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama's weights and its tokenizer as a GGUF file."""
    model, bpe = load_model(tiny_teacher), json.loads((tiny_teacher / "tokenizer.json").read_text())["model"]
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(model.config.num_hidden_layers)
    writer.add_context_length(model.config.max_position_embeddings)
    writer.add_embedding_length(model.config.hidden_size)
    writer.add_feed_forward_length(model.config.intermediate_size)
    writer.add_head_count(model.config.num_attention_heads)
    writer.add_head_count_kv(model.config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_vocab_size(model.config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].__getitem__))
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    for name, weight in model.named_parameters():
        writer.add_tensor(f"{names.get_name(name.removesuffix('.weight'))}.weight", weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_one_reading_gives_what_many_give(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()

    def count(owner: object, name: str) -> None:
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: calls.update([name]) or plain(*args))

    count(gguf.GGUFReader, "_build_fields")
    count(gguf, "get_tensor_name_map")
    source = {"pretrained_model_name_or_path": tiny_gguf.parent, "gguf_file": tiny_gguf.name}
    plain_model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    plain_tokenizer = AutoTokenizer.from_pretrained(**source)
    assert min(calls.values()) > 2  # else Transformers has become as good, and this module can go
    calls.clear()
    model, tokenizer = load_gguf(tiny_gguf)
    assert calls == {"_build_fields": 1, "get_tensor_name_map": 1}

    state, expected = model.state_dict(), plain_model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert all(torch.equal(one, other) for one, other in zip(model.buffers(), plain_model.buffers(), strict=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.backend_tokenizer.to_str() == plain_tokenizer.backend_tokenizer.to_str()
    save_model(model, tokenizer, tmp_path / "saved")
    assert all(torch.equal(weight, state[name]) for name, weight in load_model(tmp_path / "saved").state_dict().items())
    assert load_tokenizer(tmp_path / "saved")("the cat")["input_ids"] == plain_tokenizer("the cat")["input_ids"]


def test_the_package_is_as_before_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="invalid literal"), read_once():
        int("what goes wrong within")
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == PLAIN
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises((OSError, ValueError)):
        load_gguf(damaged)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == PLAIN


def test_two_files_are_two_readers(tiny_gguf: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(tiny_gguf.read_bytes().replace(b"tiny", b"tall"))
    with read_once():
        one, same, tall = (gguf.GGUFReader(path) for path in (tiny_gguf, tiny_gguf, other))
        assert isinstance(one, PLAIN[0])
        assert one.fields is same.fields
        assert [reader.fields["general.name"].contents() for reader in (one, tall)] == ["tiny", "tall"]


@pytest.mark.parametrize("name", ["GGUFReader", "get_tensor_name_map"])
def test_a_package_without_such_names_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(gguf_file.gguf, name)
    with read_once():
        assert not hasattr(gguf, name)
    assert not hasattr(gguf, name)

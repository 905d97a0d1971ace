"""The teacher signal store: its numbers, against direct computations on unpacked documents."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from signal_cases import ALL, HARD, SETTINGS, as_teacher, direct, tree
from tiny_models import tiny_llama
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import entkd.signals.teacher_pass
import entkd.signals.write
from entkd.config import Signals
from entkd.data import Corpus
from entkd.data.corpus import Document, write_split
from entkd.errors import UserError
from entkd.signals import SignalStore
from entkd.signals.content import describe_content
from entkd.signals.files import RowReader, write_tensors
from entkd.signals.shards import plan_shards
from entkd.signals.split import response_tokens
from entkd.signals.teacher_pass import token_statistics
from entkd.signals.verify import verify
from entkd.signals.write import write_signals


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """Random tiny Llama whose head has 20 rows of padding, which must change nothing."""
    tokens = len(PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer))
    return as_teacher(tiny_llama(tokens + 20), tiny_tokenizer, tmp_path_factory.mktemp("signals-teacher"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, teacher: Path, tiny_corpus: Path) -> Path:
    """Manifest of a store with features of hard tokens."""
    folder = tmp_path_factory.mktemp("signals")
    output = folder / "results" / "manifest.json"
    write_signals(SETTINGS, HARD, teacher, tiny_corpus, folder / "cache", output, "fp32")
    return output


@pytest.mark.parametrize("split", ["train", "test"])
def test_signals_equal_a_direct_fp64_computation(written, teacher, tiny_corpus, split):
    signals, expected = SignalStore.open(written).split(split), direct(teacher, tiny_corpus, split)
    assert len(signals) == len(expected["entropy"])
    for name, found in {
        "entropy": signals.entropy_R,
        "logsumexp": signals.logsumexp_R,
        "target": signals.target_logprob_R,
    }.items():
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), expected[name], atol=2e-5, rtol=1e-5)
    hidden = signals.hidden(torch.arange(len(signals)))
    assert hidden.dtype == torch.bfloat16
    # bf16 keeps 8 bits: half a unit in the last place is 2^-9 of the value
    np.testing.assert_allclose(hidden.float().numpy(), expected["hidden"], rtol=2**-8, atol=1e-5)


def test_kept_log_probabilities_are_those_of_the_model(teacher, tiny_corpus, tmp_path):
    """In any order, across shards, by the model's own logits in fp64; an interruption continues."""
    settings = SETTINGS.model_copy(update={"mode": "logprobs"})
    manifest = tmp_path / "manifest.json"
    write_signals(settings, HARD, teacher, tiny_corpus, tmp_path / "cache", manifest, "fp32")
    store = SignalStore.open(manifest)
    assert store.has_logprobs
    expected = direct(teacher, tiny_corpus, "train")
    head = LlamaForCausalLM.from_pretrained(teacher / "model", dtype=torch.float64).lm_head.weight
    logits = torch.from_numpy(expected["hidden"]) @ head[: store.vocab_size].detach().T
    tokens = torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))
    found = store.split("train").logprobs(tokens)
    assert found.dtype == torch.float16
    # fp16 keeps 11 bits: half a unit in the last place is 2^-11 of the value at most
    np.testing.assert_allclose(found.double(), logits.log_softmax(-1)[tokens], rtol=2**-10, atol=1e-4)
    in_order = store.split("train").logprobs(torch.arange(len(logits)))  # runs of rows, not one by one
    np.testing.assert_allclose(in_order.double(), logits.log_softmax(-1), rtol=2**-10, atol=1e-4)
    shard = store.folder / "logprobs-train-00001.safetensors"
    before = tree(store.folder)
    assert shard.name in before
    shard.unlink()
    write_signals(settings, HARD, teacher, tiny_corpus, tmp_path / "cache", manifest, "fp32")
    assert tree(store.folder) == before
    assert verify(manifest, teacher, tiny_corpus, 4) == 0


def test_rows_are_read_as_they_were_written(tmp_path):
    rows_NU = torch.arange(24, dtype=torch.float16).view(6, 4)
    write_tensors(tmp_path / "rows.safetensors", {"other": torch.ones(3), "rows": rows_NU}, {})
    reader = RowReader(tmp_path / "rows.safetensors", "rows")
    assert reader.shape == (6, 4)
    out = torch.empty(2, 4, dtype=torch.float16)
    for first in range(5):
        reader.read(first, out)
        assert torch.equal(out, rows_NU[first : first + 2])
    with pytest.raises(ValueError, match="do not fit"):
        reader.read(5, out)
    with pytest.raises(ValueError, match="do not fit"):
        reader.read(0, torch.empty(2, 4))
    data = (tmp_path / "rows.safetensors").read_bytes()
    os.truncate(tmp_path / "rows.safetensors", len(data) - 1)
    with pytest.raises(EOFError, match="entkd signals-verify"):
        reader.read(4, out)


def test_statistics_come_from_the_unrounded_hidden_state(written, teacher, tiny_corpus):
    store, expected = SignalStore.open(written), direct(teacher, tiny_corpus, "train")
    signals = store.split("train")
    rounded = torch.softmax(signals.hidden(torch.arange(len(signals))).double() @ store.head_UE.double().T, dim=1)
    from_rounded = torch.special.entr(rounded).sum(1).numpy()
    assert np.abs(from_rounded - expected["entropy"]).max() > 1e-3 > 2e-5


def test_first_and_last_answer_token_by_hand(written, teacher, tiny_corpus):
    """Document 5: log p of its first response token given the prompt, and of EOS given all before it."""
    model = LlamaForCausalLM.from_pretrained(teacher / "model", dtype=torch.float32).eval()
    corpus = Corpus.open(tiny_corpus, "train")
    ids, prompt_length = corpus.document(5)
    document = torch.from_numpy(ids.astype(np.int64))
    assert document[-1] == 2  # EOS, whose id is also that of padding
    signals = SignalStore.open(written).split("train")
    for given_tokens, index in (
        (prompt_length, corpus.response_offsets[5]),
        (len(ids) - 1, corpus.response_offsets[6] - 1),
    ):
        with torch.no_grad():
            logits = model(document[None, :given_tokens]).logits[0, -1, :-20].double()
        expected = float(logits[document[given_tokens]] - logits.logsumexp(0))
        assert float(signals.target_logprob_R[index]) == pytest.approx(expected, abs=2e-5)


def test_features_of_hard_tokens_only(written, teacher, tiny_corpus):
    store, expected = SignalStore.open(written), direct(teacher, tiny_corpus, "train")
    signals = store.split("train")
    assert store.feature_layers == (0, 2, 3)  # 4 layers, after 1/3 and 2/3 of the depth and the last
    everything = torch.arange(len(signals))
    has = signals.has_features(everything)
    assert torch.equal(has, store.difficulty()(signals.entropy_R) > 0.8)
    assert 0.1 < has.float().mean() < 0.3
    hard = everything[has]
    for layer in store.feature_layers:
        np.testing.assert_allclose(
            signals.features(hard, layer).float().numpy(), expected[f"layer{layer}"][has], rtol=2**-8, atol=1e-4
        )
    with pytest.raises(UserError, match=r"1 of 3 tokens asked for have no features.*hard.*0.8"):
        signals.features(torch.cat([hard[:2], everything[~has][:1]]), 0)
    with pytest.raises(UserError, match="no states of teacher layer 1"):
        signals.features(hard, 1)
    assert not store.split("test").has_features(torch.arange(len(store.split("test")))).any()


def test_difficulty_is_the_mid_rank_over_the_calibration_documents(written, tiny_corpus):
    store = SignalStore.open(written)
    signals = store.split("train")
    lengths = Corpus.open(tiny_corpus, "train").response_lengths
    documents = np.concatenate([s.documents for s in plan_shards(SETTINGS, ["train"], tiny_corpus) if s.calibration])
    # enough documents to reach 150 response tokens, and no document more than that takes
    assert lengths[documents].sum() >= 150 > lengths[documents].sum() - lengths[documents].max()
    sample = signals.entropy_R[response_tokens(signals.response_offsets, documents)].numpy()
    value = float(signals.entropy_R[17])
    by_hand = ((sample < value).sum() + 0.5 * (sample == np.float32(value)).sum()) / len(sample)
    assert float(store.difficulty()(signals.entropy_R[17:18])) == pytest.approx(by_hand, abs=1e-6)


def test_other_batches_and_shards_give_the_same_values(written, teacher, tiny_corpus, tmp_path):
    store = SignalStore.open(written)
    other = Signals(calibration_tokens=150, shard_tokens=5000, batch_tokens=1000)
    write_signals(other, ALL, teacher, tiny_corpus, tmp_path / "cache", tmp_path / "manifest.json", "fp32")
    same = SignalStore.open(tmp_path / "manifest.json")
    assert len(store.manifest["splits"]["train"]["shards"]) > 5
    assert len(same.manifest["splits"]["train"]["shards"]) == 2  # the calibration documents', and one for the rest
    ours, theirs = store.split("train"), same.split("train")
    shuffled = torch.randperm(len(ours), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours.entropy_R, theirs.entropy_R, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.target_logprob_R, theirs.target_logprob_R, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.hidden(shuffled), theirs.hidden(shuffled), atol=1e-4, rtol=2**-7)
    # all tokens have features there, at other layers
    assert same.feature_layers == (1, 3)
    assert theirs.has_features(shuffled).all()
    hard = shuffled[ours.has_features(shuffled)]
    torch.testing.assert_close(ours.features(hard, 3), theirs.features(hard, 3), atol=1e-3, rtol=2**-7)


def test_gather_takes_any_order_and_repeats(written):
    signals = SignalStore.open(written).split("train")
    everything = signals.hidden(np.arange(len(signals)))
    tokens = np.random.default_rng(1).integers(0, len(signals), 3 * len(signals))
    assert torch.equal(signals.hidden(torch.from_numpy(tokens)), everything[torch.from_numpy(tokens)])
    assert signals.hidden(np.empty(0, dtype=np.int64)).shape == (0, 32)
    for outside in (-1, len(signals)):
        with pytest.raises(IndexError, match=f"split train has {len(signals)} response tokens"):
            signals.hidden(torch.tensor([0, outside]))


def test_the_document_that_a_row_belongs_to(written, teacher, tiny_corpus):
    """Rows are found by document, although the calibration documents lie in shards of their own."""
    signals = SignalStore.open(written).split("train")
    assert np.array_equal(signals.response_offsets, Corpus.open(tiny_corpus, "train").response_offsets)


def test_logits_of_minus_infinity_are_noted(teacher, tiny_corpus, tmp_path, monkeypatch):
    hidden = torch.tensor([[1.0], [1.0]])
    statistics, has_inf = token_statistics(hidden, torch.tensor([[1.0], [-math.inf], [1.0]]), torch.tensor([0, 1]))
    assert has_inf
    assert statistics["entropy"].tolist() == pytest.approx([math.log(2)] * 2)
    assert statistics["target_logprob"].tolist() == pytest.approx([-math.log(2), -math.inf])
    assert token_statistics(hidden, torch.tensor([[1.0], [-1e4]]), torch.tensor([0, 1]))[1] is False
    plain = entkd.signals.teacher_pass.token_statistics
    monkeypatch.setattr(entkd.signals.teacher_pass, "token_statistics", lambda *a: (plain(*a)[0], True))
    write_signals(SETTINGS, HARD, teacher, tiny_corpus, tmp_path / "cache", tmp_path / "manifest.json", "fp32")
    assert SignalStore.open(tmp_path / "manifest.json").has_inf_logits


def test_statistics_do_not_depend_on_the_tile(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(50, 8, generator=generator), torch.randn(40, 8, generator=generator)
    target = torch.randint(0, 40, (50,), generator=generator)
    whole, _ = token_statistics(hidden, head, target)
    monkeypatch.setattr(entkd.signals.teacher_pass, "TILE_ELEMENTS", 40 * 7)
    tiled, _ = token_statistics(hidden, head, target)
    log_p = torch.log_softmax(hidden.double() @ head.double().T, dim=1)
    torch.testing.assert_close(tiled["entropy"].double(), -(log_p.exp() * log_p).sum(1), atol=1e-5, rtol=1e-5)
    for name in whole:
        torch.testing.assert_close(tiled[name], whole[name], atol=1e-6, rtol=1e-6)


def test_reading_a_few_rows_does_not_load_the_shard(written, tmp_path):
    """A shard of 256 MiB, of which 64 neighbouring rows are read."""
    shutil.copytree(written.parents[1], tmp_path / "copy")
    manifest = tmp_path / "copy" / "results" / "manifest.json"
    store = SignalStore.open(manifest)
    names = store.manifest["splits"]["test"]["shards"]
    rows = 2**22
    save_file(
        {
            "documents": torch.tensor([0]),
            "response_lengths": torch.tensor([rows]),
            "hidden": torch.ones(rows, 32, dtype=torch.bfloat16),
        },
        store.folder / names[0],
    )
    store.manifest["splits"]["test"] = {"documents": 1, "shards": names[:1]}
    signals = SignalStore(store.folder, store.manifest).split("test")
    before = psutil.Process().memory_info().rss
    assert signals.hidden(torch.arange(3_000_000, 3_000_064)).sum() == 64 * 32
    grown = psutil.Process().memory_info().rss - before
    assert grown < 110 * 2**20  # the index of 4M tokens takes 32 MiB; the file would take 256


@given(st.lists(st.integers(0, 6), min_size=1, max_size=12), st.randoms())
def test_response_tokens_are_the_documents_ranges(lengths, random):
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    documents = random.sample(range(len(lengths)), random.randint(0, len(lengths)))
    expected = [token for document in documents for token in range(offsets[document], offsets[document + 1])]
    assert response_tokens(offsets, np.asarray(documents, dtype=np.int64)).tolist() == expected


def test_token_ids_beyond_17_and_18_bits(tmp_path, tiny_tokenizer, tiny_corpus):
    """Ids 131,072, 151,935 and 262,143 keep their own log-probability."""
    ids = [131072, 151935, 262143]
    model = tiny_llama(
        262144, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
    )
    teacher = as_teacher(model, tiny_tokenizer, tmp_path / "teacher")
    data = tmp_path / "data"
    shutil.copytree(tiny_corpus, data)
    write_split(data, "train", [Document([5], ids, {"id": "a", "prompt": "", "response": "", "user": "", "cut": True})])
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps(manifest | {"vocab_size": 262144}))
    needs = {"features": None, "splits": ["train"]}
    write_signals(Signals(calibration_tokens=16), needs, teacher, data, tmp_path / "cache", tmp_path / "m.json", "fp32")
    store = SignalStore.open(tmp_path / "m.json")
    with torch.no_grad():
        log_p = torch.log_softmax(model(torch.tensor([[5, *ids]])).logits[0, :-1].double(), dim=1)
    expected = [float(log_p[row, token]) for row, token in enumerate(ids)]
    assert store.split("train").target_logprob_R.tolist() == pytest.approx(expected, abs=2e-5)
    assert store.feature_layers == ()
    assert store.head_UE.shape == (262144, 8)


def test_bf16_teacher(written, teacher, tiny_corpus, tmp_path):
    """A bf16 trunk is near the fp32 one, its head stays as stored, and its state loses nothing in the store."""
    output = tmp_path / "manifest.json"
    write_signals(SETTINGS, HARD, teacher, tiny_corpus, tmp_path / "cache", output, "bf16")
    store, exact = SignalStore.open(output), SignalStore.open(written)
    assert store.head_UE.dtype == torch.float32
    assert torch.equal(store.head_UE, exact.head_UE)
    signals = store.split("train")
    assert (signals.entropy_R - exact.split("train").entropy_R).abs().mean() < 0.05
    logits = signals.hidden(torch.arange(len(signals))).double() @ store.head_UE.double().T
    torch.testing.assert_close(
        signals.entropy_R.double(), torch.special.entr(logits.softmax(1)).sum(1), atol=2e-5, rtol=1e-5
    )


def test_entropy_csv_counts_every_token(written):
    rows = [line.split(",") for line in (written.parent / "entropy.csv").read_text().splitlines()]
    assert rows[0] == ["quantity", "left", "right", "count"]
    signals = SignalStore.open(written).split("train")
    for quantity, right in (("entropy", float(signals.entropy_R.max())), ("difficulty", 1.0)):
        own = [row for row in rows if row[0] == quantity]
        assert sum(int(row[3]) for row in own) == len(signals)
        assert float(own[0][1]) == 0
        assert float(own[-1][2]) == pytest.approx(right)


def test_the_store_moves_with_its_folder_and_errors_say_what_is_missing(written, teacher, tiny_corpus, tmp_path):
    shutil.copytree(written.parents[1], tmp_path / "moved")
    moved = tmp_path / "moved" / "results" / "manifest.json"
    store = SignalStore.open(moved)
    assert store.folder.resolve().is_relative_to(tmp_path / "moved")
    with pytest.raises(UserError, match=r"no signals of split 'dev'.*'test', 'train'"):
        store.split("dev")
    pointer = json.loads(moved.read_text())
    moved.write_text(json.dumps(pointer | {"key": "0" * 64}))
    with pytest.raises(UserError, match="needs format 1, key 0000000000000000"):
        SignalStore.open(moved)
    shutil.rmtree(store.folder)
    with pytest.raises(UserError, match="no finished store"):
        SignalStore.open(moved)
    with pytest.raises(UserError, match="no such manifest; run `entkd signals`"):
        SignalStore.open(tmp_path / "nowhere.json")
    with pytest.raises(UserError, match="`train` must be in it"):
        describe_content(SETTINGS, {"features": None, "splits": ["test"]}, teacher, tiny_corpus, torch.float32)

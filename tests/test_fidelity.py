"""Fidelity to the teacher, against a dense fp64 computation of both models on unpacked documents."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from signal_cases import SETTINGS, as_teacher
from tiny_models import tiny_llama
from transformers import PreTrainedTokenizerFast

from entkd.data import Corpus
from entkd.errors import UserError
from entkd.models import load_model
from entkd.score.fidelity import fidelity
from entkd.signals import SignalStore
from entkd.signals.write import write_signals

NEEDS = {"features": None, "splits": ["train", "test"]}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tiny_tokenizer):
    """Its hidden states are rounded by bf16 in the store, which is what limits the comparison."""
    tokens = len(PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer))
    return as_teacher(tiny_llama(tokens + 20), tiny_tokenizer, tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def signals(tmp_path_factory, teacher, tiny_corpus):
    folder = tmp_path_factory.mktemp("signals")
    write_signals(SETTINGS, NEEDS, teacher, tiny_corpus, folder / "cache", folder / "manifest.json", "fp32")
    return folder / "manifest.json"


@pytest.fixture(scope="module")
def student(tiny_tokenizer):
    tokens = len(PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer))
    return tiny_llama(tokens + 4, seed=1, hidden_size=16, num_hidden_layers=2, initializer_range=0.2)


@pytest.fixture(scope="module")
def expected(student, signals, tiny_corpus):
    """KL, agreement and document of every response token; the teacher's logits from the store's hidden states."""
    corpus, store = Corpus.open(tiny_corpus, "test"), SignalStore.open(signals)
    hidden = store.split("test").hidden(torch.arange(corpus.response_tokens)).double()
    teacher_logp = (hidden @ store.head_UE.double().T).log_softmax(-1)
    logits = []
    for document in range(len(corpus)):
        ids, prompt = corpus.document(document)
        with torch.no_grad():
            row = student(torch.tensor(ids.astype(np.int64))[None], use_cache=False).logits[0]
        logits.append(row[prompt - 1 : -1, : store.vocab_size].double())
    student_logp = torch.cat(logits).log_softmax(-1)
    return pd.DataFrame(
        {
            "kl": (teacher_logp.exp() * (teacher_logp - student_logp)).sum(-1),
            "top1_agreement": (teacher_logp.argmax(-1) == student_logp.argmax(-1)).double(),
            "document": np.repeat(np.arange(len(corpus)), corpus.response_lengths),
            "entropy": store.split("test").entropy_R.double(),
        }
    )


@pytest.mark.parametrize(("batch_tokens", "tile"), [(1, 256), (5000, 10_000), (5000, 7)])
def test_values_equal_dense_fp64(student, signals, tiny_corpus, expected, batch_tokens, tile, monkeypatch):
    monkeypatch.setattr("entkd.score.fidelity.tile_rows", lambda vocab, device: tile)
    scores, items = fidelity(student, tiny_corpus, signals, batch_tokens)
    found = pd.DataFrame(scores).set_index("metric")
    items = pd.DataFrame(items)
    documents = expected.groupby("document")
    for metric in ("kl", "top1_agreement"):
        assert found.loc[metric, "value"] == pytest.approx(expected[metric].mean(), rel=1e-5)
        assert found.loc[metric, "n"] == documents.ngroups
        own = items[items["metric"] == metric]
        assert own["value"].mean() == pytest.approx(found.loc[metric, "value"], abs=1e-12)
        by_hand = documents[metric].sum() / documents.size().mean()
        np.testing.assert_allclose(own["value"], by_hand, rtol=1e-5, atol=1e-12)


def test_stored_log_probabilities_give_the_values_of_the_hidden_states(
    student, teacher, signals, tiny_corpus, tmp_path, monkeypatch
):
    settings = SETTINGS.model_copy(update={"mode": "logprobs"})
    write_signals(settings, NEEDS, teacher, tiny_corpus, tmp_path / "cache", tmp_path / "manifest.json", "fp32")
    monkeypatch.setattr("entkd.score.fidelity.tile_rows", lambda vocab, device: 7)
    found, _ = fidelity(student, tiny_corpus, tmp_path / "manifest.json", 5000)
    expected, _ = fidelity(student, tiny_corpus, signals, 5000)
    for one, other in zip(found, expected, strict=True):
        assert one["metric"] == other["metric"]
        assert one["value"] == pytest.approx(other["value"], rel=5e-3)  # fp16 here, bf16 there


def test_standard_error_is_that_of_a_ratio(student, signals, tiny_corpus, expected):
    """Against the delete-one-document jackknife, which agrees to first order."""
    scores, _ = fidelity(student, tiny_corpus, signals, 5000)
    means = [expected[expected["document"] != left]["kl"].mean() for left in expected["document"].unique()]
    n = len(means)
    jackknife = np.sqrt((n - 1) / n * ((means - np.mean(means)) ** 2).sum())
    assert scores[0]["stderr"] == pytest.approx(jackknife, rel=0.2)


def test_deciles_are_by_teacher_entropy(student, signals, tiny_corpus, expected):
    found = pd.DataFrame(fidelity(student, tiny_corpus, signals, 5000)[0]).set_index("metric")
    ranked = expected.sort_values("entropy", kind="stable")
    for index in range(10):
        own = ranked["kl"].iloc[_bounds(len(ranked), index) : _bounds(len(ranked), index + 1)]
        assert found.loc[f"kl_decile_{index + 1:02d}", "value"] == pytest.approx(own.mean(), rel=1e-5)
        assert found.loc[f"kl_decile_{index + 1:02d}", "n"] == len(own)


def _bounds(total: int, index: int) -> int:
    """The first tenths take the remainder, one token each."""
    return index * (total // 10) + min(index, total % 10)


def test_limit_takes_the_first_documents(student, signals, tiny_corpus, expected):
    scores, items = fidelity(student, tiny_corpus, signals, 5000, limit=3)
    assert scores[0]["value"] == pytest.approx(expected[expected["document"] < 3]["kl"].mean(), rel=1e-5)
    assert [item["item"] for item in items if item["metric"] == "kl"] == ["0", "1", "2"]


def test_the_teacher_agrees_with_itself(teacher, signals, tiny_corpus):
    scores, _ = fidelity(load_model(teacher), tiny_corpus, signals, 5000)
    values = {row["metric"]: row["value"] for row in scores}
    assert values["kl"] < 1e-3
    assert values["top1_agreement"] > 0.97


def test_signals_of_other_data_are_refused(student, signals, tiny_corpus, tmp_path):
    for path in tiny_corpus.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    lengths = np.load(tmp_path / "test.prompt_lengths.npy")
    lengths[0] += 1
    np.save(tmp_path / "test.prompt_lengths.npy", lengths)
    with pytest.raises(UserError, match="is not that of"):
        fidelity(student, tmp_path, signals, 5000)

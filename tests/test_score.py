"""Scoring: log-likelihoods against a dense fp64 computation, and the stage's files against numbers made by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from rouge_score.rouge_scorer import RougeScorer
from tiny_models import ending_early, tiny_llama
from transformers import PreTrainedTokenizerFast

from entkd.config import Suite
from entkd.data import read_texts
from entkd.errors import UserError
from entkd.models import load_model, load_tokenizer
from entkd.score import score
from entkd.score.greedy import continued
from entkd.score.items import ITEM_COLUMNS, SCORE_COLUMNS, ratio_items, standard_error
from entkd.score.lm import LanguageModel, label_logprobs
from entkd.score.tasks import load_tasks

PAIRS = [("the quick brown fox", "the quick brown dog"), ("what is it", "what is the capital"), ("a cat", "a story")]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return load_tokenizer_files(tiny_tokenizer)


def load_tokenizer_files(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_llama(len(tokenizer) + 20)


@pytest.fixture
def lm(model, tokenizer):
    return LanguageModel(model, tokenizer, memory_gib=1.0)


def requests(*arguments):
    return [SimpleNamespace(args=argument) for argument in arguments]


def dense(model, tokenizer, context: str, continuation: str) -> tuple[float, bool]:
    """Σ log p over the continuation's tokens in fp64, one sequence at a time, over the tokenizer's entries."""
    ids = tokenizer(context + continuation)["input_ids"]
    start = max(1, len(tokenizer(context)["input_ids"])) if context else 1
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1, : len(tokenizer)].double()
    logprobs, labels = logits.log_softmax(-1)[start - 1 :], torch.tensor(ids[start:])
    return float(logprobs.gather(1, labels[:, None]).sum()), bool((logprobs.argmax(-1) == labels).all())


def test_log_likelihoods_equal_dense_fp64(lm, model, tokenizer):
    cases = [("", text) for pair in PAIRS for text in pair]
    cases += [
        ("the quick", " brown fox jumps over"),
        ("the quick", " brown"),
        ("the quick", " lazy"),
        ("x\n", "the end"),
    ]
    found = lm.loglikelihood(requests(*cases), disable_tqdm=True)
    for case, (value, greedy) in zip(cases, found, strict=True):
        expected, expected_greedy = dense(model, tokenizer, *case)
        assert value == pytest.approx(expected, abs=1e-4), case
        assert greedy == expected_greedy


def test_greedy_continuation_is_recognised(lm, model, tokenizer):
    ids = tokenizer("the quick")["input_ids"]
    with torch.no_grad():
        best = model(torch.tensor([ids])).logits[0, -1, : len(tokenizer)].argsort(descending=True)[:2].tolist()
    rows = [(None, ids, [token]) for token in best]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(rows, disable_tqdm=True)] == [True, False]


@settings(max_examples=10, deadline=None)
@given(batch_tokens=st.integers(1, 60))
def test_batch_size_changes_nothing(model, tokenizer, batch_tokens):
    lm = LanguageModel(model, tokenizer, memory_gib=1.0)
    cases = requests(*[("", text) for pair in PAIRS for text in pair])
    expected = lm.loglikelihood(cases, disable_tqdm=True)
    lm.batch_tokens = batch_tokens
    found = lm.loglikelihood(cases, disable_tqdm=True)
    np.testing.assert_allclose([value for value, _ in found], [value for value, _ in expected], atol=1e-4)


def test_rows_that_pad_the_vocabulary_do_not_count(tokenizer):
    """Huge logits in the padded rows would dominate any normaliser that read them."""
    model = tiny_llama(len(tokenizer) + 20, tie_word_embeddings=False)
    cases = requests(("", "the quick brown fox"))
    before = LanguageModel(model, tokenizer, 1.0).loglikelihood(cases, disable_tqdm=True)
    with torch.no_grad():
        model.lm_head.weight[len(tokenizer) :] *= 1000
    assert LanguageModel(model, tokenizer, 1.0).loglikelihood(cases, disable_tqdm=True) == before


def test_padded_rows_are_never_generated(tokenizer):
    model = tiny_llama(len(tokenizer) + 20, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[len(tokenizer) :] *= 1000
    lm = LanguageModel(model, tokenizer, 1.0)
    (text,) = lm.generate_until(requests(("the quick", {"until": [], "max_gen_toks": 8})), disable_tqdm=True)
    with torch.no_grad():
        ids = torch.tensor([tokenizer("the quick")["input_ids"]])
        new: list[int] = []
        while len(new) < 8 and (not new or new[-1] != tokenizer.eos_token_id):
            step = torch.tensor([[*ids[0].tolist(), *new]])
            new.append(int(model(step, use_cache=False).logits[0, -1, : len(tokenizer)].argmax()))
    assert text == tokenizer.decode(new, skip_special_tokens=True)


STOP = {"until": [], "max_gen_toks": 20}
OPENINGS = ["the quick", "what is the capital of", "a", "a cat and the lazy dog", "x"]


def test_greedy_texts_are_those_of_transformers(tokenizer, monkeypatch):
    model = ending_early([tokenizer(text)["input_ids"] for text in OPENINGS])
    lm = LanguageModel(model, tokenizer, 1.0)
    cases = requests(*((text, {"do_sample": False, "temperature": 0.0} | STOP) for text in OPENINGS))
    found = lm.generate_until(cases, disable_tqdm=True)
    monkeypatch.setattr("entkd.score.lm.is_greedy", lambda *_: False)
    assert found == lm.generate_until(cases, disable_tqdm=True)
    assert len({len(tokenizer(text)["input_ids"]) for text in found}) > 1  # some ended at EOS


@pytest.mark.parametrize(
    ("arguments", "own_settings", "expected"),
    [
        ({}, {}, True),
        ({"do_sample": False, "temperature": 0.0}, {}, True),
        ({}, {"do_sample": True, "top_p": 0.9, "temperature": 0.6}, True),  # lm-eval switches sampling off
        ({"do_sample": True, "temperature": 1.0}, {}, False),
        ({"num_beams": 2}, {}, False),
        ({"until": ["\n"]}, {}, False),
        ({}, {"repetition_penalty": 1.1}, False),
        ({}, {"eos_token_id": [2, 5]}, False),
        ({}, {"max_new_tokens": 3}, False),
    ],
)
def test_only_plain_greedy_requests_go_by_our_own_loop(tokenizer, arguments, own_settings, expected, monkeypatch):
    model = tiny_llama(len(tokenizer))
    for name, value in own_settings.items():
        setattr(model.generation_config, name, value)
    calls = []
    monkeypatch.setattr("entkd.score.lm.continued", lambda *arguments: (calls.append(1), continued(*arguments))[1])
    lm = LanguageModel(model, tokenizer, 1.0)
    lm.generate_until(requests(("the quick", STOP | {"max_gen_toks": 2} | arguments)), disable_tqdm=True)
    assert bool(calls) == expected


def test_texts_encoded_together_are_those_encoded_alone(lm, tokenizer):
    texts = ["the quick", " brown fox", "<s>the quick", "the quick", "x\n ", tokenizer.decode([1]) + "a"]
    alone = [lm.tok_encode(text) for text in texts]
    lm._encode_all([*texts, ""])
    assert [lm.tok_encode(text) for text in texts] == alone
    assert lm.encoded.keys() >= {"the quick", " brown fox"}
    lm.loglikelihood(requests(("", "the quick")), disable_tqdm=True)
    assert not lm.encoded


def test_too_few_rows_are_refused_with_both_sizes(tokenizer):
    with pytest.raises(UserError, match=f"{len(tokenizer) - 5} rows and the tokenizer {len(tokenizer)}"):
        LanguageModel(tiny_llama(len(tokenizer) - 5), tokenizer, 1.0)


def test_agrees_with_lm_evals_own_model_where_there_is_a_context(model, tokenizer):
    cases = requests(("the quick", " brown fox"), ("what is the", " capital of france"), ("the quick", " cat"))
    full_vocabulary = tiny_llama(len(tokenizer))
    theirs = HFLM(pretrained=full_vocabulary, tokenizer=tokenizer, batch_size=2).loglikelihood(cases, disable_tqdm=True)
    ours = LanguageModel(full_vocabulary, tokenizer, 1.0).loglikelihood(cases, disable_tqdm=True)
    for (their_value, their_greedy), (value, greedy) in zip(theirs, ours, strict=True):
        assert value == pytest.approx(their_value, abs=1e-4)
        assert greedy == their_greedy


def test_rolling_log_likelihood_agrees_with_lm_evals_own_model(tokenizer):
    model = tiny_llama(len(tokenizer))
    cases = requests(("the quick brown fox jumps over the lazy dog and runs away",), ("what is the capital",))
    options = {"pretrained": model, "tokenizer": tokenizer, "max_length": 8}
    theirs = HFLM(**options, batch_size=1).loglikelihood_rolling(cases, disable_tqdm=True)
    ours = LanguageModel(model, tokenizer, 1.0)
    ours._max_length = 8
    np.testing.assert_allclose(ours.loglikelihood_rolling(cases, disable_tqdm=True), theirs, atol=1e-4)


def test_a_long_context_is_cut_from_the_left(lm, model, tokenizer):
    lm._max_length = 6
    (value, _), *_ = lm.loglikelihood(requests(("the quick brown fox jumps over the lazy", " dog")), disable_tqdm=True)
    ids = tokenizer("the quick brown fox jumps over the lazy dog")["input_ids"]
    scored = len(ids) - len(tokenizer("the quick brown fox jumps over the lazy")["input_ids"])
    with torch.no_grad():
        logits = model(torch.tensor([ids[-7:-1]])).logits[0, :, : len(tokenizer)].double()
    labels = torch.tensor(ids[-scored:])
    assert value == pytest.approx(float(logits.log_softmax(-1)[-scored:].gather(1, labels[:, None]).sum()), abs=1e-4)


def test_a_tokenizer_that_adds_bos_keeps_it_as_prefix(model, tokenizer):
    lm = LanguageModel(model, tokenizer, 1.0)
    assert lm.automatic_bos is None
    assert lm._encode_alone("the quick")[0] == tokenizer("the quick")["input_ids"][:1]
    lm.automatic_bos = 1
    assert lm._encode_alone("the quick") == ([1], tokenizer("the quick")["input_ids"])


def test_batch_tokens_follow_the_memory(model, tokenizer):
    assert LanguageModel(model, tokenizer, 1.0).batch_tokens == 2**30 // (8 * len(tokenizer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_label_logprobs_equal_dense_over_many_tiles(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(700, 16, generator=generator).to(dtype)
    weight_VD = torch.randn(50, 16, generator=generator).to(dtype)
    source_M = torch.randint(700, (2000,), generator=generator)
    label_M = torch.randint(50, (2000,), generator=generator)
    logprob_M, greedy_M = label_logprobs(hidden_ND, weight_VD, source_M, label_M)
    logits_NV = (hidden_ND.double() @ weight_VD.double().T).to(dtype)  # rounded as the model rounds them
    reference_NV = logits_NV.double().log_softmax(-1)
    # A sum that lies between two bf16 numbers may be rounded either way.
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2**-4}[dtype]
    torch.testing.assert_close(logprob_M.double(), reference_NV[source_M, label_M], rtol=0, atol=tolerance)
    if dtype != torch.bfloat16:  # which has ties
        assert torch.equal(greedy_M, reference_NV.argmax(-1)[source_M] == label_M)


def test_ratio_items_by_hand():
    items, weights, error = ratio_items(np.array([2.0, 3.0, 7.0]), np.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(items, [1.0, 1.5, 3.5])
    np.testing.assert_allclose(weights, [0.5, 1.0, 1.5])
    assert items.mean() == pytest.approx(12 / 6)
    # residuals x − R y = 0, −1, 1 over mean(y) = 2; sd = 0.5; / √3
    assert error == pytest.approx(0.5 / math.sqrt(3))
    assert math.isnan(standard_error(np.array([1.0])))


def suite(*tasks, **changes) -> Suite:
    named = [dict(zip(("name", "metric"), task, strict=True)) for task in tasks]
    return Suite.model_validate(
        {"tasks": named, "fidelity": False, "max_generated_tokens": 5, "precision": "fp32"} | changes
    )


DEMO = (
    ("entkd_heldout", "bits_per_byte"),
    ("entkd_rouge", "rougeL"),
    ("entkd_minimal_pairs", "acc"),
)


@pytest.fixture(scope="module")
def scored(tmp_path_factory, tiny_teacher, tiny_corpus):
    folder = tmp_path_factory.mktemp("scores")
    files = folder / "demo.csv", folder / "demo.items.parquet"
    where = (tiny_teacher, tiny_corpus, None, *files)
    score(suite(*DEMO, limit=6), *where, arm="kd", seed=3, suite_name="demo")
    return pd.read_csv(files[0]), pd.read_parquet(files[1])


def test_files_have_the_agreed_columns(scored):
    scores, items = scored
    assert list(scores) == SCORE_COLUMNS
    assert list(items) == ITEM_COLUMNS
    assert set(scores["arm"]) == set(items["arm"]) == {"kd"}
    assert set(scores["seed"]) == {3}
    assert not scores.duplicated(["task", "metric"]).any()
    assert set(scores["task_version"]) == {1.0}


def test_mean_over_items_is_the_reported_value(scored):
    scores, items = scored
    means = items.groupby(["task", "metric"])["value"].agg(["mean", "size"])
    for name, metric in DEMO:
        row = scores.query("task == @name and metric == @metric").iloc[0]
        assert means.loc[name, metric]["mean"] == pytest.approx(row["value"], abs=1e-12)
        assert means.loc[name, metric]["size"] == row["n"]
    weights = items.groupby("task")["weight"]
    np.testing.assert_allclose(weights.mean(), 1, rtol=1e-12)
    assert (weights.nunique() > 1).to_dict() == {name: name == "entkd_heldout" for name, _ in DEMO}


def test_weight_of_a_document_is_its_share_of_the_bytes(scored, tiny_corpus):
    rows = read_texts(tiny_corpus, "test")[:6]
    lengths = np.array([len(row["response"].encode()) for row in rows])
    found = scored[1].query("task == 'entkd_heldout'").set_index("item")["weight"]
    np.testing.assert_allclose(found[[str(i) for i in range(6)]], lengths / lengths.mean(), rtol=1e-12)


def test_limit_holds_for_every_task(scored):
    n = scored[0].set_index("task")["n"]
    assert n["entkd_heldout"] == n["entkd_rouge"] == n["entkd_pairs_past_tense"] == 6
    assert n["entkd_minimal_pairs"] == 9 * 6


def test_bits_per_byte_is_nats_over_bytes(scored, tiny_teacher, tiny_corpus):
    model, tokenizer = load_model(tiny_teacher), load_tokenizer(tiny_teacher)
    rows = read_texts(tiny_corpus, "test")[:6]
    nats = -sum(dense(model, tokenizer, row["prompt"], row["response"])[0] for row in rows)
    length = sum(len(row["response"].encode()) for row in rows)
    value = scored[0].set_index("task").loc["entkd_heldout", "value"]
    assert value == pytest.approx(nats / math.log(2) / length, rel=1e-5)


def test_rouge_is_that_of_greedy_responses(scored, tiny_teacher, tiny_corpus):
    model, tokenizer = load_model(tiny_teacher), load_tokenizer(tiny_teacher)
    scorer, values = RougeScorer(["rougeL"], use_stemmer=True), []
    for row in read_texts(tiny_corpus, "test")[:6]:
        ids = tokenizer(row["prompt"])["input_ids"]
        new: list[int] = []
        while len(new) < 5 and tokenizer.eos_token_id not in new:
            with torch.no_grad():
                new.append(int(model(torch.tensor([[*ids, *new]])).logits[0, -1].argmax()))
        text = tokenizer.decode(new, skip_special_tokens=True)
        values.append(scorer.score(row["response"], text)["rougeL"].fmeasure)
    items = scored[1].query("task == 'entkd_rouge'")["value"]
    np.testing.assert_allclose(items, values, atol=1e-9)


def test_minimal_pairs_are_judged_by_whole_sentences(scored, tiny_teacher):
    from entkd.tasks.minimal_pairs.generate import generate

    model, tokenizer = load_model(tiny_teacher), load_tokenizer(tiny_teacher)
    items = scored[1].query("task == 'entkd_minimal_pairs'").set_index("item")["value"]
    for row in generate():
        if row["UID"] in ("past_tense", "reflexive_number") and int(row["pairID"]) < 6:
            good, bad = (dense(model, tokenizer, "", row[f"sentence_{kind}"])[0] for kind in ("good", "bad"))
            assert items[f"entkd_pairs_{row['UID']}/{row['pairID']}"] == float(good > bad)


@pytest.fixture
def folder_of_tasks(tmp_path):
    rows = [{"question": "the quick", "choices": ["brown fox", "lazy dog"], "gold": gold} for gold in (1, 0, 1)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "choice.yaml").write_text(
        f"task: my_choice\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: question\ndoc_to_choice: choices\n"
        "doc_to_target: gold\nmetric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
        "  - {metric: f1, aggregation: f1, higher_is_better: true}\nmetadata: {version: 2}\n"
    )
    (tmp_path / "group.yaml").write_text(
        "group: my_group\ntask: [my_choice, entkd_pairs_past_tense]\n"
        "aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: false}]\nmetadata: {version: 1}\n"
    )
    return tmp_path


def test_a_folder_of_the_users_tasks(folder_of_tasks, tiny_teacher, tiny_corpus, tmp_path):
    files = tmp_path / "out" / "x.csv", tmp_path / "out" / "x.items.parquet"
    tasks = [("my_group", "acc"), ("my_choice", "acc"), ("my_choice", "f1")]
    asked = suite(*tasks, include_path=str(folder_of_tasks), limit=5)
    score(asked, tiny_teacher, tiny_corpus, None, *files, arm="kd", seed=0, suite_name="mine")
    scores, items = pd.read_csv(files[0]), pd.read_parquet(files[1])
    values = scores.set_index(["task", "metric"])["value"]
    # A mean over tasks of 3 and 5 items, not over the 8 items.
    both = (values["my_choice", "acc"] + values["entkd_pairs_past_tense", "acc"]) / 2
    assert values["my_group", "acc"] == pytest.approx(both)
    assert items.query("task == 'my_group'")["value"].mean() == pytest.approx(both)
    assert len(items.query("task == 'my_group'")) == 8
    model, tokenizer = load_model(tiny_teacher), load_tokenizer(tiny_teacher)
    fox, dog = (dense(model, tokenizer, "the quick", f" {end}")[0] for end in ("brown fox", "lazy dog"))
    assert values["my_choice", "acc"] == pytest.approx((2 if dog > fox else 1) / 3)
    assert items.query("metric == 'f1'").empty  # F1 is no mean over items
    assert set(scores.query("task == 'my_choice'")["task_version"]) == {2}


@pytest.mark.parametrize(
    ("task", "metric", "message"),
    [
        ("entkd_heldout", "bits_per_bite", "`bits_per_bite` is not .* did you mean `bits_per_byte`"),
        ("entkd_minimal_pairs", "f1", "reports acc"),
    ],
)
def test_unknown_metrics_are_refused(tiny_corpus, task, metric, message):
    with pytest.raises(UserError, match=message):
        load_tasks(suite((task, metric)), tiny_corpus)


def test_unknown_tasks_are_refused_with_the_nearest(tiny_corpus, monkeypatch):
    from entkd.score import tasks

    real = tasks.TaskManager
    without_defaults = lambda include_defaults, **options: real(include_defaults=False, **options)  # noqa: E731
    monkeypatch.setattr(tasks, "TaskManager", without_defaults)  # lm-eval's own 14,000 take half a minute to index
    with pytest.raises(UserError, match="unknown task `entkd_heldut`; did you mean `entkd_heldout`"):
        load_tasks(suite(("entkd_heldut", "acc")), tiny_corpus)


def test_data_that_cannot_be_fetched_are_named(tiny_corpus, monkeypatch):
    def load(self, names):
        raise ConnectionError("Couldn't reach 'a/b' on the Hub")

    monkeypatch.setattr("entkd.score.tasks.TaskManager.load", load)
    with pytest.raises(UserError, match=r"tasks.entkd_heldout: its data are not .*Couldn't reach 'a/b'"):
        load_tasks(suite(*DEMO), tiny_corpus)


def test_include_path_must_be_a_folder(tiny_corpus):
    with pytest.raises(UserError, match="include_path: nowhere is not a folder"):
        load_tasks(suite(*DEMO, include_path="nowhere"), tiny_corpus)

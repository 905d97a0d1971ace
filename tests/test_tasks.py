"""The task files and the functions they name."""

from __future__ import annotations

import math

import pytest
from lm_eval.tasks import TaskManager

from entkd.data import read_texts
from entkd.score.tasks import OWN_TASKS
from entkd.tasks.utils import bits_per_byte, rouge_l


@pytest.fixture(scope="module")
def manager(tiny_corpus):
    return TaskManager(include_path=[OWN_TASKS], include_defaults=False, metadata={"data": str(tiny_corpus)})


def test_the_package_offers_these_tasks(manager):
    assert {"entkd_heldout", "entkd_rouge", "entkd_minimal_pairs"} <= set(manager.all_tasks)
    assert "entkd_pairs_past_tense" in manager.all_tasks


def test_heldout_asks_for_the_response_given_the_prompt(manager, tiny_corpus):
    (task,) = manager.load(["entkd_heldout"])["tasks"].values()
    rows = read_texts(tiny_corpus, "test")
    task.build_all_requests()
    assert [request.args for request in task.instances] == [(row["prompt"], row["response"]) for row in rows]


def test_heldout_reports_nats_over_bytes(manager):
    (task,) = manager.load(["entkd_heldout"])["tasks"].values()
    values = [
        task.process_results({"response": text}, [(nats, False)])["bits_per_byte"]
        for text, nats in (("abcd", -6.0), ("ä", -2.0))
    ]
    assert values == [(-6.0, 4), (-2.0, 2)]
    assert task.aggregation()["bits_per_byte"](values) == pytest.approx(8 / 6 / math.log(2))
    assert task.higher_is_better() == {"bits_per_byte": False}


def test_rouge_asks_for_greedy_responses_without_stop_words(manager, tiny_corpus):
    (task,) = manager.load(["entkd_rouge"])["tasks"].values()
    task.build_all_requests()
    context, options = task.instances[0].args
    assert context == read_texts(tiny_corpus, "test")[0]["prompt"]
    assert options["until"] == []
    assert options["do_sample"] is False


def test_rouge_l_by_hand():
    """ "a c" against "a b c": common subsequence 2, precision 2/2, recall 2/3, F = 0.8; the best reference counts."""
    assert rouge_l({"references": ["a b c"]}, ["a c"])["rougeL"] == pytest.approx(0.8)
    assert rouge_l({"references": ["x", "a b c"]}, ["a c"])["rougeL"] == pytest.approx(0.8)
    assert rouge_l({"references": ["walking"]}, ["walks"])["rougeL"] == 1.0  # stems
    assert rouge_l({"references": ["a"]}, [""])["rougeL"] == 0.0


def test_bits_per_byte_counts_utf8():
    assert bits_per_byte({"response": "é€"}, [(-1.5, True)]) == {"bits_per_byte": (-1.5, 5)}


def test_pairs_are_asked_as_two_endings_of_one_start(manager):
    task = manager.load(["entkd_minimal_pairs"])["tasks"]["entkd_pairs_determiner_noun"]
    task.build_all_requests(limit=1)
    (good_start, good), (bad_start, bad) = (request.args for request in task.instances)
    doc = task.eval_docs[0]
    assert good_start == bad_start
    assert good_start + good == doc["sentence_good"]
    assert bad_start + bad == doc["sentence_bad"]
    assert task.process_results(doc, [(-1.0, False), (-2.0, False)]) == {"acc": 1.0}
    assert task.process_results(doc, [(-2.0, False), (-1.0, False)]) == {"acc": 0.0}

"""What the task files of this folder refer to by ``!function``."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from datasets import Dataset

from entkd.data.corpus import read_texts
from entkd.tasks.minimal_pairs.generate import FILE


def test_documents(data: str, **_metadata: Any) -> dict[str, Dataset]:
    """The test split of a prepared data folder: id, prompt with template, response, references."""
    rows = [
        {
            "id": row["id"],
            "prompt": row["prompt"],
            "response": row["response"],
            "references": row.get("references") or [row["response"]],
        }
        for row in read_texts(data, "test")
    ]
    return {"test": Dataset.from_list(rows)}


def minimal_pairs(phenomenon: str, **_metadata: Any) -> dict[str, Dataset]:
    """The pairs of one phenomenon."""
    return {"test": Dataset.from_list([row for row in _pairs() if row["UID"] == phenomenon])}


@cache
def _pairs() -> list[dict[str, Any]]:
    """The pairs of all phenomena, which are so many tasks."""
    return [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]


def shared_start(doc: dict[str, str]) -> str:
    """The words with which both sentences of a pair begin. Their probability is the same, so it need not be asked."""
    good, bad = doc["sentence_good"].split(" "), doc["sentence_bad"].split(" ")
    shared = next(index for index, words in enumerate(zip(good, bad, strict=False)) if words[0] != words[1])
    return " ".join(good[:shared])


def endings(doc: dict[str, str]) -> list[str]:
    """What follows the shared start: the good ending, the bad one."""
    start = len(shared_start(doc))
    return [doc["sentence_good"][start:], doc["sentence_bad"][start:]]


def bits_per_byte(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
    """Log-likelihood of the response in nats, and its bytes in UTF-8; lm-eval's aggregation divides their sums."""
    log_likelihood, _is_greedy = results[0]
    return {"bits_per_byte": (log_likelihood, len(doc["response"].encode("utf-8")))}


def rouge_l(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """ROUGE-L F of the generated response, the best over the references; Porter stems, as in the literature.

    Recall is bounded by what may be generated: a reference of 192 tokens against at most 64 generated ones reaches a
    recall of a third, and an F of a half.
    """
    scores = [_scorer().score(reference, results[0])["rougeL"].fmeasure for reference in doc["references"]]
    return {"rougeL": max(scores)}


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # a second of imports that the other tasks do without

    return RougeScorer(["rougeL"], use_stemmer=True)

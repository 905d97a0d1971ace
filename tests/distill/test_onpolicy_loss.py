"""A step on text that the student wrote, beside plain Transformers calls on the same tokens, document by document."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from references.components import slope
from references.formulas import divergence
from test_onpolicy import DISTILLM, ROWS, method_of, source_of

from entkd.data import Corpus
from entkd.distill.objective import Objective
from entkd.models import load_model

METHODS = {
    "gkd": ("jsd", {"name": "gkd", "share": 1.0, "max_response_tokens": 12}),
    "authors": ("skew_kl", DISTILLM | {"share": 1.0, "capacity": 24}),
    "paper": ("skew_kl", DISTILLM | {"share": 1.0, "capacity": 24, "variant": "paper"}),
}
ORIGINS = {
    "gkd": "GKD 2306.13649 Alg. 1",
    "authors": "DistiLLM 2402.03898 Alg. 1, release",
    "paper": "DistiLLM 2402.03898 Alg. 1",
}


@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradient(tiny, name: str, evidence) -> None:
    base, settings = METHODS[name]
    method = method_of(settings, divergence=base)
    source, student, steps = source_of(tiny, method)
    corpora, original = [], source.taught

    def watched(written, *arguments):
        corpora.append(written)
        return original(written, *arguments)

    source.taught = watched
    for number, blocks in enumerate(steps[:2], start=1):
        made = source.step(number, blocks, [], 0.5)
    documents = [(ids.tolist(), length) for ids, length in map(corpora[-1].document, range(len(corpora[-1])))]

    # ── what it trains on: the student's answers to the data's prompts, of this step or, in the paper, of any ──
    corpus, answers = Corpus.open(tiny.data, "train"), []
    for number, blocks in enumerate(steps[:2], start=1):
        data = map(corpus.document, np.concatenate(blocks).tolist())
        written = source.writer([ids[:length].tolist() for ids, length in data], number)
        answers.append([(prompt + response, len(prompt)) for prompt, response in written])
    if name == "paper":
        assert len(documents) == len(answers[1])
        assert all(document in answers[0] + answers[1] for document in documents)
        assert any(document in answers[0] for document in documents)
    else:
        assert documents == answers[1]

    # ── the objective in fp64 ──────────────────────────────────────────────────────────────────────────────────
    objective = Objective(student.double(), method, 300, source.targets.head_UE.double())
    loss = 0.0
    for micro in made.micro_batches:
        micro = dataclasses.replace(micro, teacher_NE=micro.teacher().double())  # its values stay those of bf16
        term = objective(micro, made.positions, made.hard)["loss"]
        term.backward()
        loss += term.item()

    # ── the reference ──────────────────────────────────────────────────────────────────────────────────────────
    teacher, twin = load_model(tiny.teacher), load_model(tiny.student).double()
    head = teacher.get_output_embeddings().weight.detach().double()
    positions, expected = sum(len(ids) - length for ids, length in documents), 0.0
    for ids, length in documents:
        cut, ids = slice(length - 1, -1), torch.tensor([ids])
        with torch.no_grad():
            states = teacher(ids, output_hidden_states=True).hidden_states[-1][0, cut]
        taught = (states.bfloat16().double() @ head.T).numpy()  # as a signal store keeps them
        logits = twin(ids).logits[0, cut]
        pairs = list(zip(logits.detach().numpy(), taught, strict=True))
        expected += sum(divergence(base, *pair) for pair in pairs) / positions
        logits.backward(torch.tensor(np.array([slope(base, *pair) for pair in pairs]) / positions))
    errors = [
        (own.grad - other.grad).abs().max().item()
        for own, other in zip(student.parameters(), twin.parameters(), strict=True)
    ]
    largest = max(other.grad.abs().max().item() for other in twin.parameters())
    assert made.positions == positions
    assert abs(loss - expected) < 1e-5 * expected
    assert max(errors) < 1e-4 * largest
    row = ROWS[name]
    evidence(row, "reference", f"{ORIGINS[name]}, its loss with `{base}`")
    evidence(row, "loss", abs(loss - expected))
    evidence(row, "gradient", max(errors))

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

    # ── what the teacher says of it: Transformers' states in bf16, as a signal store keeps them ──────────────────
    teacher = load_model(tiny.teacher)
    with torch.no_grad():
        states_DNE = [
            teacher(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, length - 1 : -1]
            for ids, length in documents
        ]
    own_NE = torch.cat([micro.teacher() for micro in made.micro_batches])
    own_NE = own_NE[torch.cat([micro.batch.tokens_N for micro in made.micro_batches]).argsort()]
    taught_DNE = own_NE.split([len(states_NE) for states_NE in states_DNE])
    for states_NE, taught_NE in zip(states_DNE, taught_DNE, strict=True):
        # A packed pass adds in another order, and a state that is nearly in the middle of two bf16 numbers may then be
        # stored as the other one: one of the paper's 3072 here is, which moves the loss by 2e-8. So the reference takes
        # the run's states, once they are known to be Transformers' but for such.
        away_NE, rounded_NE = (each.float() - states_NE for each in (taught_NE, states_NE.bfloat16()))
        assert (away_NE.abs() <= rounded_NE.abs() + 2e-6).all()

    # ── the objective in fp64 ──────────────────────────────────────────────────────────────────────────────────
    objective = Objective(student.double(), method, 300, source.targets.head_UE.double())
    loss = 0.0
    for micro in made.micro_batches:
        micro = dataclasses.replace(micro, teacher_NE=micro.teacher().double())  # its values stay those of bf16
        term = objective(micro, made.positions, made.hard)["loss"]
        term.backward()
        loss += term.item()

    # ── the reference ──────────────────────────────────────────────────────────────────────────────────────────
    twin = load_model(tiny.student).double()
    head = teacher.get_output_embeddings().weight.detach().double()
    positions, expected = sum(len(ids) - length for ids, length in documents), 0.0
    for (ids, length), taught_NE in zip(documents, taught_DNE, strict=True):
        logits = twin(torch.tensor([ids])).logits[0, length - 1 : -1]
        pairs = list(zip(logits.detach().numpy(), (taught_NE.double() @ head.T).numpy(), strict=True))
        expected += sum(divergence(base, *pair) for pair in pairs) / positions
        logits.backward(torch.tensor(np.array([slope(base, *pair) for pair in pairs]) / positions))
    errors = [
        (own.grad - other.grad).abs().max().item()
        for own, other in zip(student.parameters(), twin.parameters(), strict=True)
    ]
    largest = max(other.grad.abs().max().item() for other in twin.parameters())
    assert made.positions == positions
    assert abs(loss - expected) < 2e-14 * expected  # 100 times what is measured
    assert max(errors) < 5e-14 * largest
    row = ROWS[name]
    evidence(row, "reference", f"{ORIGINS[name]}, its loss with `{base}`")
    evidence(row, "loss", abs(loss - expected))
    evidence(row, "gradient", max(errors))

"""The total loss through packing, signals and micro-batches against documents one by one in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from entkd.config import Method, Signals
from entkd.data import Corpus
from entkd.data.packing import collate
from entkd.distill.objective import Objective
from entkd.distill.targets import TeacherTargets
from entkd.models import by_document, load_model
from entkd.signals.write import write_signals
from entkd.sparse import sparse_forward_kl

PAD = 2


def build(tiny, method: Method) -> tuple[Objective, TeacherTargets, Corpus]:
    corpus = Corpus.open(tiny.data, "train")
    targets = TeacherTargets(method, tiny.signals if method.needs_signals else None, tiny.data, corpus, seed=0)
    store = targets.store
    objective = Objective(
        load_model(tiny.student),
        method,
        vocab_size=300,
        teacher_head_UE=store.head_UE if store is not None else None,
        teacher_width=store.width if store is not None else None,
        generator=torch.Generator().manual_seed(1),
    )
    return objective, targets, corpus


def loss_and_gradient(
    objective: Objective, targets: TeacherTargets, corpus: Corpus, micros: Sequence[Sequence[Sequence[int]]], u: float
) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    """micros: micro-batches of blocks of documents."""
    objective.zero_grad()
    batches = [collate(corpus, [np.asarray(block) for block in micro], 256, PAD) for micro in micros]
    step = targets.step(batches, u)
    total, terms = 0.0, {}
    for micro in step.micro_batches:
        losses = objective(micro, step.positions, step.hard)
        losses["loss"].backward()
        total += losses["loss"].item()
        for name, value in losses.items():
            terms[name] = terms.get(name, 0.0) + value.item()
    gradient = {name: p.grad.clone() for name, p in objective.named_parameters()}
    return total, gradient, terms


FULL = {"divergence": "forward_kl", "ce": {"weight": 0.3}, "curriculum": {}, "temperature": {}, "features": {}}


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_full_method_equals_the_reference(tiny, reference, divergence: str) -> None:
    method = Method.model_validate(FULL | {"divergence": {"name": divergence, "weight": 0.7}})
    objective, targets, corpus = build(tiny, method)
    documents = [5, 0, 17, 3, 9, 30]
    loss, gradient, terms = loss_and_gradient(objective, targets, corpus, [[[5, 0], [17, 3]], [[9, 30]]], u=0.8)

    student = load_model(tiny.student).double()
    projectors = [p.weight.detach().double().requires_grad_() for p in objective.projectors]
    expected = reference(
        student, documents, kappa=0.8, u=0.8, c=0.5, projectors=projectors, reverse=divergence == "reverse_kl"
    )
    total = 0.7 * expected.kd + 0.3 * expected.ce + 0.5 * expected.features
    total.backward()
    assert (expected.difficulty > 0.8).sum() > 3  # the feature term is not empty
    assert terms["kd"] == pytest.approx(expected.kd.item(), rel=1e-4)
    assert terms["ce"] == pytest.approx(expected.ce.item(), rel=1e-5)
    assert terms["features"] == pytest.approx(expected.features.item(), rel=1e-4)
    assert loss == pytest.approx(total.item(), rel=1e-4)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gradient[f"student.{name}"].double(), parameter.grad, rtol=1e-3, atol=2e-5)
    for index, projector in enumerate(projectors):
        largest = projector.grad.abs().max().item()
        assert largest > 1e-3
        # fp32 rounds sums of many tokens by the largest, not by each entry; other CPUs add them in another order.
        torch.testing.assert_close(
            gradient[f"projectors.{index}.weight"].double(), projector.grad, rtol=1e-3, atol=1e-3 * largest
        )


def test_all_components_off_is_vanilla_kd(tiny, reference) -> None:
    """Limit 1: κ = 0, c = 0 and no features give the plain KL, whether the components are null or neutral."""
    documents, u = [1, 2, 8, 13], 0.9
    plain = Method.model_validate({"divergence": "forward_kl"})
    neutral = Method.model_validate(
        {"divergence": "forward_kl", "curriculum": {"kappa": 0.0}, "temperature": {"c": 0.0}}
    )
    results = [loss_and_gradient(*build(tiny, m), [[documents]], u) for m in (plain, neutral)]
    expected = reference(load_model(tiny.student).double(), documents).kd.item()
    for loss, _, _ in results:
        # fp32 and fp64 hidden states now and then round to different bf16 neighbours in the store
        assert loss == pytest.approx(expected, rel=1e-4)
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    for name in results[0][1]:
        torch.testing.assert_close(results[0][1][name], results[1][1][name], rtol=0, atol=1e-6)


def test_micro_batches_and_packing_change_nothing(tiny) -> None:
    """Limits 11 and 16: one micro-batch, several, and another packing give the same loss and gradient."""
    method = Method.model_validate(FULL)
    splits = [[[[4, 7, 1], [20, 11]]], [[[4, 7, 1]], [[20, 11]]], [[[11], [1, 20]], [[7]], [[4]]]]
    results = [loss_and_gradient(*build(tiny, method), split, u=0.2) for split in splits]
    for loss, gradient, _ in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        for name, expected in results[0][1].items():
            torch.testing.assert_close(gradient[name], expected, rtol=1e-4, atol=2e-6)


def test_a_micro_batch_without_response_tokens_keeps_the_graph(tiny) -> None:
    """Pitfall 19: nothing to learn from gives zero gradients, not missing ones, which would stall DDP."""
    objective, targets, corpus = build(tiny, Method.model_validate(FULL))
    batch = collate(corpus, [np.asarray([], dtype=np.int64)], 256, PAD)
    step = targets.step([batch], 0.5)
    losses = objective(step.micro_batches[0], step.positions, step.hard)
    losses["loss"].backward()
    assert losses["loss"].item() == 0.0
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, name
        assert torch.count_nonzero(parameter.grad) == 0, name


def test_prompt_and_padding_change_nothing_in_the_loss_terms(tiny) -> None:
    """Limit 6 and pitfall 1: only response tokens count; the first and the last one do, EOS included."""
    objective, targets, corpus = build(tiny, Method.model_validate({"ce": {}}))
    ids, prompt_length = corpus.document(0)
    assert ids[-1] == PAD  # document 0 ends with EOS, which is also the padding token
    batch = collate(corpus, [np.asarray([0])], 256, PAD)
    assert batch.labels_N.tolist() == ids[prompt_length:].tolist()
    assert batch.positions_N.tolist() == list(range(prompt_length - 1, len(ids) - 1))
    step = targets.step([batch], 0.5)
    losses = objective(step.micro_batches[0], step.positions, step.hard)
    with torch.no_grad():
        logits = objective.student(input_ids=torch.as_tensor(ids[None].astype(np.int64))).logits[0].double()
    nll = [-torch.log_softmax(logits[i - 1], -1)[ids[i]].item() for i in range(prompt_length, len(ids))]
    assert losses["ce"].item() == pytest.approx(np.mean(nll), rel=1e-5)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_hidden_states_of_prompt_and_padding_are_not_read(tiny, poison: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit 6, NaN and inf included: what stands at other positions than the predicting ones reaches no term.

    On a CPU the final norm has no others; elsewhere it has, as here.
    """
    monkeypatch.setattr(by_document, "_can_go_by_document", lambda *_: False)
    method = Method.model_validate(FULL)
    clean, expected, _ = loss_and_gradient(*build(tiny, method), [[[0, 5]]], u=0.7)
    objective, targets, corpus = build(tiny, method)
    batch = collate(corpus, [np.asarray([0, 5])], 256, PAD)
    read = torch.zeros(256, dtype=torch.bool)
    read[batch.positions_N] = True
    assert 0 < int(read.sum()) < 256

    def spoil(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        return torch.where(read[None, :, None], output, torch.full_like(output, poison))

    # after the last layer and after the final norm: the layers themselves mix positions, as they must
    objective.student.model.norm.register_forward_hook(spoil)
    loss, gradient, _ = loss_and_gradient(objective, targets, corpus, [[[0, 5]]], u=0.7)
    assert loss == pytest.approx(clean, rel=1e-6)
    head = "student.model.embed_tokens.weight"  # tied: it gets the gradient of the output projection too
    assert torch.isfinite(gradient[head]).all()
    torch.testing.assert_close(gradient[head], expected[head], rtol=1e-4, atol=1e-6)


def test_padding_token_and_length_change_nothing(tiny) -> None:
    """Limit 6: another padding token, a longer tail of padding."""
    method, results = Method.model_validate(FULL), []
    for block, pad in ((128, PAD), (256, 7)):
        objective, targets, corpus = build(tiny, method)
        step = targets.step([collate(corpus, [np.asarray([0, 5])], block, pad)], 0.7)
        losses = objective(step.micro_batches[0], step.positions, step.hard)
        losses["loss"].backward()
        results.append((losses["loss"].item(), {n: p.grad for n, p in objective.named_parameters()}))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-4, atol=2e-6)


def test_student_equal_to_the_teacher_has_loss_zero(tiny) -> None:
    """Limit 8, pitfall 9: no hidden cross-entropy in pure KD."""
    method = Method.model_validate({"divergence": "forward_kl", "curriculum": {}, "temperature": {}})
    corpus = Corpus.open(tiny.data, "train")
    targets = TeacherTargets(method, tiny.signals, tiny.data, corpus, seed=0)
    objective = Objective(load_model(tiny.teacher), method, 300, targets.store.head_UE, targets.store.width)
    loss, gradient, _ = loss_and_gradient(objective, targets, corpus, [[[0, 1, 2, 3]]], u=0.9)
    other, other_gradient, _ = loss_and_gradient(*build(tiny, method), [[[0, 1, 2, 3]]], u=0.9)
    assert 0 <= loss < 1e-3 * other  # what is left is the bf16 rounding of the stored hidden states
    norm, other_norm = (sum(g.square().sum() for g in gs.values()).sqrt() for gs in (gradient, other_gradient))
    assert norm < 0.05 * other_norm


def test_the_teachers_head_is_neither_trained_nor_saved(tiny) -> None:
    """Limit 12, and resume states do not carry the teacher."""
    objective = build(tiny, Method.model_validate({"divergence": "forward_kl"}))[0]
    assert not objective.teacher_head_UE.requires_grad
    assert "teacher_head_UE" not in objective.state_dict()


@pytest.mark.parametrize("ce", [None, {"weight": 0.3}])
def test_sparse_targets_train_by_their_dense_reference(tiny, tmp_path, ce) -> None:
    """Through packing, micro-batches and tiles, with curriculum and cross-entropy; every document alone beside it."""
    settings = Signals(mode="sparse", sparse={"top_k": 5, "samples": 7})
    signals = tmp_path / "manifest.json"
    needs = {"features": None, "splits": ["train"]}
    write_signals(settings, needs, tiny.teacher, tiny.data, tmp_path / "cache", signals, "fp32")
    patch = {"divergence": "forward_kl", "curriculum": {}, "temperature": {"base": 1.0, "c": 0.0}, "ce": ce}
    method, corpus = Method.model_validate(patch), Corpus.open(tiny.data, "train")
    targets = TeacherTargets(method, signals, tiny.data, corpus, seed=0)
    objective = Objective(load_model(tiny.student), method, vocab_size=300, teacher_head_UE=targets.head_UE)
    loss, gradient, _ = loss_and_gradient(objective, targets, corpus, [[[5, 0], [17, 3]], [[9, 30]]], u=0.8)

    student = load_model(tiny.student)
    documents = [5, 0, 17, 3, 9, 30]
    tokens_N = torch.cat([torch.arange(*corpus.response_offsets[[i, i + 1]].tolist()) for i in documents])
    weight_N = 1 + 0.8 * 0.6 * (2 * targets.difficulty_R[tokens_N] - 1)
    logits, labels = [], []
    for document in documents:
        ids, prompt_length = corpus.document(document)
        ids_L = torch.as_tensor(ids.astype(np.int64))
        logits.append(student(ids_L[None]).logits[0, prompt_length - 1 : -1])
        labels.append(ids_L[prompt_length:])
    value_N = sparse_forward_kl(torch.cat(logits), targets.split.sparse(tokens_N))
    expected = (weight_N / weight_N.mean() * value_N).mean()
    if ce is not None:
        expected = expected + 0.3 * torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(labels))
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
    for name, parameter in student.named_parameters():
        difference = (gradient[f"student.{name}"] - parameter.grad).norm()
        assert difference < 1e-3 * parameter.grad.norm(), name

"""Difficulties of other sources and feature options in training: against dense passes, off, resumed, shared out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from entkd.components import token_plan
from entkd.config import Method, Signals, Training, load_experiment
from entkd.data import Corpus
from entkd.data.packing import collate
from entkd.difficulty import permutation
from entkd.distill import distill, loop
from entkd.distill.distributed import World
from entkd.distill.objective import Objective
from entkd.distill.targets import TeacherTargets
from entkd.distill.untrained import untrained_statistics
from entkd.errors import UserError
from entkd.models import load_model
from entkd.signals import SignalStore
from entkd.signals.write import write_signals

PAD, VOCAB = 2, 300
TRAINING = Training(steps=4, block=64, blocks_per_step=4, micro_blocks=2, lr=3e-3, precision="fp32", eval_every=4)
CONTROLS = Path(__file__).parents[2] / "config/experiments/controls.yaml"
FULL = {"divergence": "forward_kl", "curriculum": {}, "temperature": {}, "features": {}}
SOURCES = (
    "teacher_entropy",
    "permuted",
    "permuted_within",
    "unigram",
    "label_nll",
    "initial_kl",
    "initial_student_entropy",
)


@pytest.fixture(scope="module")
def dense(tiny) -> dict[str, np.ndarray]:
    """What each source is, of every training token: one document at a time, whole logits, fp64."""
    teacher, student = load_model(tiny.teacher).double(), load_model(tiny.student).double()
    corpus = Corpus.open(tiny.data, "train")
    found: dict[str, list[Tensor]] = {name: [] for name in ("label_nll", "initial_kl", "initial_student_entropy")}
    with torch.no_grad():
        for document in range(len(corpus)):
            ids, prompt = corpus.document(document)
            ids = torch.as_tensor(ids.astype(np.int64))
            log_p, log_q = (
                torch.log_softmax(model(input_ids=ids[None]).logits[0], -1)[prompt - 1 : -1]
                for model in (teacher, student)
            )
            labels = ids[prompt:]
            found["label_nll"].append(-log_p[torch.arange(len(labels)), labels])
            found["initial_kl"].append((log_p.exp() * (log_p - log_q)).sum(-1))
            found["initial_student_entropy"].append(-(log_q.exp() * log_q).sum(-1))
    return {name: torch.cat(parts).numpy() for name, parts in found.items()}


def statistics(tiny, source: str, world: World | None = None, signals: Path | None = None) -> Tensor:
    return untrained_statistics(
        source,
        load_model(tiny.student).train(),
        Corpus.open(tiny.data, "train"),
        SignalStore.open(signals or tiny.signals),
        TRAINING,
        PAD,
        world or World(),
        torch.device("cpu"),
        torch.float32,
    )


def targets_of(tiny, method: Method, seed: int = 0) -> TeacherTargets:
    targets = TeacherTargets(method, tiny.signals, tiny.data, Corpus.open(tiny.data, "train"), seed)
    if targets.waits_for_student:
        targets.use_student(statistics(tiny, method.difficulty.source))
    return targets


def with_source(source: str, **changes: object) -> Method:
    return Method.model_validate(FULL | {"difficulty": {"source": source}} | changes)


@pytest.mark.parametrize("source", ["initial_kl", "initial_student_entropy"])
def test_statistics_of_the_untrained_student_are_those_of_dense_passes(tiny, dense, source: str) -> None:
    found = statistics(tiny, source).double().numpy()
    # the teacher's hidden states are stored in bf16, which moves a KL by some thousandths
    tolerance = {"initial_kl": {"rtol": 2e-2, "atol": 2e-2}, "initial_student_entropy": {"rtol": 1e-4}}[source]
    np.testing.assert_allclose(found, dense[source], **tolerance)


@pytest.mark.parametrize("source", ["label_nll", "initial_kl", "initial_student_entropy"])
def test_difficulty_is_the_rank_of_the_source(tiny, dense, source: str) -> None:
    """Mid-ranks by counting; neighbours may change places where the store's rounding makes them."""
    found = targets_of(tiny, with_source(source)).difficulty_R.numpy()
    value = dense[source]
    below = (value[None, :] < value[:, None]).mean(1)
    equal = (value[None, :] == value[:, None]).mean(1)
    assert np.abs(found - (below + equal / 2)).max() < (0.02 if source == "initial_kl" else 0.003)
    assert found.astype(np.float64).mean() == pytest.approx(0.5, abs=1e-6)


def test_stored_log_probabilities_give_the_same_initial_kl(tiny, tmp_path: Path) -> None:
    settings = Signals(mode="logprobs", features=None, shard_tokens=200)
    signals = tmp_path / "manifest.json"
    needs = {"features": None, "splits": ["train"]}
    write_signals(settings, needs, tiny.teacher, tiny.data, tmp_path / "cache", signals, "fp32")
    torch.testing.assert_close(
        statistics(tiny, "initial_kl", signals=signals), statistics(tiny, "initial_kl"), rtol=2e-2, atol=2e-2
    )


@pytest.mark.parametrize("source", ["initial_kl", "initial_student_entropy"])
def test_processes_share_the_pass(tiny, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets zeros where another process looks, so that the sum over the processes is the whole."""
    whole = statistics(tiny, source)
    monkeypatch.setattr(World, "sum", lambda self, terms: terms)
    parts = [statistics(tiny, source, World(rank, 3)) for rank in range(3)]
    assert all(0 < int((part != 0).sum()) < len(whole) for part in parts)
    assert torch.equal(sum(parts), whole)


def test_the_student_is_left_as_it_was(tiny) -> None:
    student = load_model(tiny.student).train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    state = torch.get_rng_state()
    corpus, store = Corpus.open(tiny.data, "train"), SignalStore.open(tiny.signals)
    untrained_statistics(
        "initial_kl", student, corpus, store, TRAINING, PAD, World(), torch.device("cpu"), torch.float32
    )
    assert student.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())


@pytest.mark.parametrize("arm", ["permuted", "permuted_within"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_permuted_control_has_the_histograms_of_full_on_other_tokens(tiny, arm: str, seed: int) -> None:
    """Over all training tokens and at every progress: the same weights, temperatures and size of the hard set."""
    arms = load_experiment(CONTROLS).resolved_arms
    full, control = arms["full"].method, arms[arm].method
    true_R, dealt_R = (targets_of(tiny, method, seed).difficulty_R for method in (full, control))
    tokens_R = torch.arange(len(true_R))
    for u in (0.0, 0.1, 0.37, 0.5, 0.9, 1.0):
        mine, theirs = (token_plan(d, u, method, tokens_R, seed) for d, method in ((true_R, full), (dealt_R, control)))
        for name in ("weight_N", "temperature_N"):
            a, b = getattr(mine, name), getattr(theirs, name)
            assert torch.equal(a.sort().values, b.sort().values), (name, u)
        assert mine.summary["hard"] == theirs.summary["hard"] > 0
        assert mine.summary["weight_scale_mean"] == pytest.approx(theirs.summary["weight_scale_mean"], rel=1e-12)
        assert not torch.equal(mine.features_N, theirs.features_N)
    moved = (true_R != dealt_R).double().mean().item()
    assert moved > 0.8
    corpus = Corpus.open(tiny.data, "train")
    inside = [
        torch.equal(true_R[start:end].sort().values, dealt_R[start:end].sort().values)
        for start, end in zip(corpus.response_offsets[:-1], corpus.response_offsets[1:], strict=True)
    ]
    assert all(inside) == (arm == "permuted_within")
    if arm == "permuted":  # what is left of the order of the tokens is chance
        assert abs(np.corrcoef(true_R, dealt_R)[0, 1]) < 4 / len(true_R) ** 0.5


def test_another_seed_deals_otherwise_and_the_same_seed_the_same(tiny) -> None:
    method = with_source("permuted")
    one, again, other = (targets_of(tiny, method, seed).difficulty_R for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    full_R = targets_of(tiny, Method.model_validate(FULL)).difficulty_R
    corpus = Corpus.open(tiny.data, "train")
    sequence_R = torch.from_numpy(np.repeat(np.arange(len(corpus)), corpus.response_lengths))
    assert torch.equal(other, full_R[permutation(sequence_R, 1, within=False)])


def loss_and_gradient(tiny, method: Method, u: float = 0.8) -> tuple[float, dict[str, Tensor]]:
    targets, corpus = targets_of(tiny, method), Corpus.open(tiny.data, "train")
    objective = Objective(
        load_model(tiny.student),
        method,
        VOCAB,
        targets.head_UE,
        targets.store.width,
        torch.Generator().manual_seed(1),
    )
    step = targets.step([collate(corpus, [np.asarray(block)], 256, PAD) for block in ([1, 2, 8], [13, 30])], u)
    total = 0.0
    for micro in step.micro_batches:
        loss = objective(micro, step.positions, step.hard)["loss"]
        loss.backward()
        total += loss.item()
    return total, {name: parameter.grad for name, parameter in objective.named_parameters()}


def assert_same(found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], abs=1e-6)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-6)


@pytest.mark.parametrize("source", SOURCES)
def test_neutral_components_are_vanilla_kd_whatever_the_source(tiny, source: str) -> None:
    plain = loss_and_gradient(tiny, Method.model_validate({"divergence": "forward_kl"}))
    neutral = with_source(source, curriculum={"kappa": 0.0}, temperature={"c": 0.0}, features=None)
    assert_same(loss_and_gradient(tiny, neutral), plain)


def test_a_source_that_nothing_reads_is_not_computed(tiny) -> None:
    method = Method.model_validate({"divergence": "forward_kl", "difficulty": {"source": "initial_kl"}})
    targets = TeacherTargets(method, tiny.signals, tiny.data, Corpus.open(tiny.data, "train"), 0)
    assert not targets.waits_for_student
    assert targets.difficulty_R is None


def test_sources_change_weights_temperatures_and_hard_tokens(tiny) -> None:
    """Every option reaches the loss: no two sources give the same one."""
    losses = [loss_and_gradient(tiny, with_source(source))[0] for source in SOURCES]
    assert len({round(loss, 6) for loss in losses}) == len(SOURCES)


def test_layers_by_name_are_the_points_where_they_are_the_same_layers(tiny) -> None:
    """The student's layers are 0, 1, 2, the teacher's stored ones 0, 2, 3."""
    kd_and_features = {"curriculum": None, "temperature": None}
    points = loss_and_gradient(tiny, with_source("teacher_entropy", **kd_and_features))
    named = with_source("teacher_entropy", features={"layers": [[0, 0], [1, 2], [2, 3]]}, **kd_and_features)
    assert_same(loss_and_gradient(tiny, named), points)


def test_layer_pairs_meet_the_layers_they_name(tiny) -> None:
    """One student layer against two teacher layers, with identity projectors: the cosines by hand."""
    features = {"layers": [[1, 3], [1, 0]], "projector": "identity", "tokens": "all", "weight": 1.0}
    method = Method.model_validate({"divergence": "forward_kl", "features": features})
    targets, corpus = targets_of(tiny, method), Corpus.open(tiny.data, "train")
    objective = Objective(load_model(tiny.student), method, VOCAB, targets.head_UE, targets.store.width)
    batch = collate(corpus, [np.asarray([4])], 256, PAD)
    step = targets.step([batch], 0.5)
    found = objective(step.micro_batches[0], step.positions, step.hard)["features"].item()

    ids, prompt = corpus.document(4)
    ids = torch.as_tensor(ids.astype(np.int64))[None]
    with torch.no_grad():
        ours = load_model(tiny.student)(input_ids=ids, output_hidden_states=True).hidden_states
        taught: list[Tensor] = []
        teacher = load_model(tiny.teacher)
        teacher.model.layers[3].register_forward_hook(lambda m, a, out: taught.append(out))
        theirs = teacher(input_ids=ids, output_hidden_states=True).hidden_states
        last = taught[0][0] if isinstance(taught[0], tuple) else taught[0]
    answer = slice(prompt - 1, -1)
    # hidden_states[i + 1] is the output of layer i; the last one has gone through the final norm, hence the hook
    student_ND = ours[2][0, answer]
    expected = 0.0
    for teacher_ND in (last.reshape(ids.shape[1], -1)[answer], theirs[1][0, answer]):
        rounded = teacher_ND.to(torch.bfloat16).float()
        expected += (1 - torch.cosine_similarity(student_ND, rounded, dim=-1)).mean().item() / 2
    assert found == pytest.approx(expected, rel=1e-4)


def test_layers_that_are_not_there_are_refused(tiny) -> None:
    wrong = Method.model_validate({"divergence": "forward_kl", "features": {"layers": [[0, 1]]}})
    with pytest.raises(
        UserError, match=r"method.features.layers: the states of teacher layer 1 are not stored; stored "
    ):
        targets_of(tiny, wrong)
    deep = Method.model_validate({"divergence": "forward_kl", "features": {"layers": [[3, 0]]}})
    with pytest.raises(UserError, match=r"method.features.layers: student layer 3 is out of range.* layers 0 to 2"):
        Objective(load_model(tiny.student), deep, VOCAB, None, 32)


@pytest.mark.parametrize("kind", ["hard", "easy", "random"])
def test_the_number_of_feature_tokens_moves_with_the_threshold(tiny, kind: str) -> None:
    features = {"tokens": kind, "threshold": 0.9, "threshold_end": 0.4}
    method = Method.model_validate({"divergence": "forward_kl", "features": features})
    targets, corpus = targets_of(tiny, method), Corpus.open(tiny.data, "train")
    batch = collate(corpus, [np.arange(len(corpus))], 4096, PAD)
    d = targets.difficulty_R[batch.tokens_N]
    counted = []
    for u, theta in ((0.0, 0.9), (0.5, 0.65), (1.0, 0.4)):
        step = targets.step([batch], u)
        assert step.hard == step.summary["hard"] == len(step.micro_batches[0].hard_H)
        if kind != "random":
            chosen = d > theta if kind == "hard" else d < 1 - theta
            assert abs(step.hard - int(chosen.sum())) <= 1  # θ(u) may round across a token's d
        counted.append(step.hard)
    assert counted == sorted(counted)
    assert counted[2] > 3 * counted[0] > 0


def test_sparse_signals_have_no_initial_kl_but_the_students_entropy(tiny, tmp_path: Path) -> None:
    settings = Signals(mode="sparse", sparse={"top_k": 5, "samples": 7}, features=None)
    signals = tmp_path / "manifest.json"
    needs = {"features": None, "splits": ["train"]}
    write_signals(settings, needs, tiny.teacher, tiny.data, tmp_path / "cache", signals, "fp32")
    corpus, arm = Corpus.open(tiny.data, "train"), {"divergence": "forward_kl", "curriculum": {}}
    method = Method.model_validate(arm | {"difficulty": {"source": "initial_kl"}})
    with pytest.raises(UserError, match=r"method.difficulty.source: initial_kl needs the teacher's whole distribution"):
        TeacherTargets(method, signals, tiny.data, corpus, 0)
    entropy_R = statistics(tiny, "initial_student_entropy", signals=signals)
    assert torch.equal(entropy_R, statistics(tiny, "initial_student_entropy"))


def test_hard_tokens_of_another_source_need_their_features(tiny, tmp_path: Path) -> None:
    """Behind the check of the configuration: a store of hard tokens names the setting where a run gets there."""
    needs = {"features": {"points": 3, "tokens": "hard", "threshold": 0.8}, "splits": ["train"]}
    signals = tmp_path / "manifest.json"
    write_signals(Signals(), needs, tiny.teacher, tiny.data, tmp_path / "cache", signals, "fp32")
    targets = targets_of(dataclasses.replace(tiny, signals=signals), with_source("permuted"))
    with pytest.raises(UserError, match=r"have no features; the store has those of tokens: hard"):
        targets.step([collate(Corpus.open(tiny.data, "train"), [np.arange(8)], 512, PAD)], 0.5)


class StoppedError(Exception):
    """Stands for whatever ends a process."""


def train(tiny, output: Path, method: Method, stop_at: int | None = None) -> dict:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        if stop_at is not None:
            calls, clip = [], loop.clip_gradients

            def clip_or_stop(*arguments: object) -> object:
                calls.append(1)
                if len(calls) == stop_at:
                    raise StoppedError
                return clip(*arguments)

            patch.setattr(loop, "clip_gradients", clip_or_stop)
        distill(method, TRAINING, 0, tiny.student, tiny.data, tiny.signals, output, save_minutes=1e-9, log_every=1)
    return json.loads((output / "run.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("source", ["initial_kl", "initial_student_entropy", "permuted"])
def test_a_continued_run_finds_the_same_difficulties(tiny, tmp_path: Path, source: str) -> None:
    """The student that is asked is the untrained one, not the one of the resume state."""
    method = with_source(source, features={"threshold": 0.9, "threshold_end": 0.5})
    whole = train(tiny, tmp_path / "whole", method)
    with pytest.raises(StoppedError):
        train(tiny, tmp_path / "cut", method, stop_at=3)
    continued = train(tiny, tmp_path / "cut", method)
    assert (whole["resumed"], continued["resumed"]) == (0, 1)
    assert continued["weights_sha256"] == whole["weights_sha256"]
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("whole", "cut")
    ]
    for one, other in zip(*rows, strict=True):
        assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}


def test_arms_of_other_sources_train_other_students(tiny, tmp_path: Path) -> None:
    hashes = set()
    for source in ("teacher_entropy", "permuted", "initial_kl"):
        record = train(tiny, tmp_path / source, with_source(source))
        hashes.add(record["weights_sha256"])
        assert record["arm"]["method"]["difficulty"].get("source", "teacher_entropy") == source
        weights = load_file(tmp_path / source / "model/model.safetensors").values()
        assert all(bool(torch.isfinite(tensor).all()) for tensor in weights)
    assert len(hashes) == 3

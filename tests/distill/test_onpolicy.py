"""Training on what the student writes: the text, the teacher's view of it, the run, its resume state and its ledger."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_approaches import assert_same_training

from entkd.config import Method, Signals, Training, canonical_json
from entkd.data import Corpus
from entkd.data.corpus import Document, write_split
from entkd.data.manifest import summarise, write_manifest
from entkd.data.packing import plan_steps
from entkd.distill import distill, loop
from entkd.distill.distributed import World
from entkd.distill.evaluate import dev_nll
from entkd.distill.flops import trunk_flops_per_token
from entkd.distill.objective import Objective
from entkd.distill.run import Run
from entkd.distill.targets import TeacherTargets
from entkd.errors import UserError
from entkd.generate import generate
from entkd.models import load_model
from entkd.onpolicy.buffer import ReplayBuffer, as_corpus
from entkd.onpolicy.generation import Writer, micro_batches
from entkd.onpolicy.pipeline import OnPolicy
from entkd.runtime import torch_stream
from entkd.signals.write import write_signals

CPU = torch.device("cpu")
TRAINING = Training(steps=6, block=64, blocks_per_step=4, micro_blocks=2, lr=3e-3, precision="fp32", eval_every=2)
COMPONENTS = {"curriculum": {}, "temperature": {}, "features": {"threshold": 0.5}}


def method_of(on_policy: object, **further: object) -> Method:
    return Method.model_validate({"divergence": "forward_kl", "on_policy": on_policy, **further})


def gkd(share: float, **further: object) -> Method:
    return method_of({"name": "gkd", "share": share, "max_response_tokens": 12}, **further)


def run(tiny, output: Path, method: Method, training: Training = TRAINING, **further) -> dict:
    torch.set_num_threads(1)
    inputs = (tiny.student, tiny.data, tiny.signals, output)
    distill(method, training, 0, *inputs, log_every=4, teacher=tiny.teacher, **further)
    return json.loads((output / "run.json").read_text(encoding="utf-8"))


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def without_seconds(output: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows(output)]


def with_logprobs(tiny, folder: Path) -> Path:
    """Signals of the same data that hold log-probabilities."""
    signals = folder / "signals" / "manifest.json"
    needs = {"features": None, "splits": ["train"]}
    write_signals(Signals(mode="logprobs"), needs, tiny.teacher, tiny.data, folder / "cache", signals, "fp32")
    return signals


def source_of(tiny, method: Method, training: Training = TRAINING, signals: Path | None = None):
    """The source of a run, and its student."""
    corpus, student = Corpus.open(tiny.data, "train"), load_model(tiny.student).train()
    path = signals or tiny.signals
    made = Run(method, training, 0, tiny.student, tiny.data, path, tiny.teacher, Path("x"), torch.float32, 5.0, 10)
    targets = TeacherTargets(method, path, tiny.data, corpus, 0)
    writer = Writer(student, tiny.student, method.on_policy, training.block, 0, 2, CPU, torch.float32)
    steps = plan_steps(corpus, training, 0)
    return OnPolicy(made, steps, targets, corpus, writer, World(), CPU, lambda: 0.0), student, steps


# ── the text ──────────────────────────────────────────────────────────────────────────────────────────────────


def prompts_of(tiny, count: int) -> list[list[int]]:
    corpus = Corpus.open(tiny.data, "train")
    return [ids[:length].tolist() for ids, length in map(corpus.document, range(count))]


def test_cold_samples_are_the_greedy_text_of_the_student(tiny) -> None:
    """At a temperature near 0 the only sample is the greedy continuation, as Transformers computes it."""
    method = method_of({"name": "gkd", "temperature": 1e-6, "max_response_tokens": 9})
    source, student, _ = source_of(tiny, method)
    prompts = prompts_of(tiny, 6)
    written = source.writer(prompts, 1)
    assert student.training
    for prompt, (same, response) in zip(prompts, written, strict=True):
        assert same == prompt
        greedy = load_model(tiny.student).generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=9, use_cache=True, eos_token_id=2
        )
        assert response == greedy[0, len(prompt) :].tolist()


def test_text_follows_seed_and_step_and_fits_the_block(tiny) -> None:
    method = method_of({"name": "gkd", "max_response_tokens": 500})
    source, _, _ = source_of(tiny, method)
    prompts = prompts_of(tiny, 8)
    first = source.writer(prompts, 1)
    assert first == source.writer(prompts, 1)  # dropout is off and nothing else is drawn
    assert first != source.writer(prompts, 2)
    lengths = [len(prompt) + len(response) for prompt, response in first]
    assert max(lengths) == TRAINING.block  # a random student seldom ends by itself
    for _, response in first:
        assert 2 not in response[:-1]


def test_no_text_is_lost_in_the_micro_batches(tiny) -> None:
    source, _, _ = source_of(tiny, gkd(1.0))
    written = source.writer(prompts_of(tiny, 9), 1)
    corpus = as_corpus(written)
    for processes in (1, 3):
        batches = micro_batches(corpus, TRAINING, 2, processes)
        assert len(batches) % processes == 0
        assert sum(len(batch.labels_N) for batch in batches) == corpus.response_tokens
        tokens, labels = (torch.cat([getattr(b, name) for b in batches]) for name in ("tokens_N", "labels_N"))
        assert labels[tokens.argsort()].tolist() == [token for _, response in written for token in response]


# ── the teacher's view ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def stored(tiny, tmp_path: Path, tiny_tokenizer: Path):
    """f(written, mode) → the targets of a signal store made from these documents."""

    def make(written: list[tuple[list[int], list[int]]], method: Method, mode: str) -> TeacherTargets:
        text = {"id": "0", "prompt": "", "response": "", "user": "", "cut": True}
        documents = [Document(prompt, response, text) for prompt, response in written]
        for split in ("train", "dev", "test"):
            write_split(tmp_path, split, documents)
        splits = dict.fromkeys(("train", "dev", "test"), summarise(documents, {}))
        write_manifest(tmp_path, {"source": "test"}, tiny_tokenizer, vocab_size=300, eos_token_id=2, splits=splits)
        needs = {"features": {"points": 3, "tokens": "all", "threshold": 0.8}, "splits": ["train"]}
        signals = tmp_path / "signals" / "manifest.json"
        write_signals(Signals(mode=mode), needs, tiny.teacher, tmp_path, tmp_path / "cache", signals, "fp32")
        return TeacherTargets(method, signals, tmp_path, Corpus.open(tmp_path, "train"), 0)

    return make


@pytest.mark.parametrize("mode", ["hidden", "logprobs"])
@pytest.mark.parametrize("scale", ["rank", "minmax"])
def test_targets_are_those_of_a_store_of_the_same_documents(
    tiny, stored, tmp_path: Path, mode: str, scale: str
) -> None:
    method = gkd(1.0, **COMPONENTS, difficulty={"scale": scale})
    signals = tmp_path / "own" / "manifest.json"
    needs = {"features": {"points": 3, "tokens": "all", "threshold": 0.8}, "splits": ["train"]}
    write_signals(Signals(mode=mode), needs, tiny.teacher, tiny.data, tmp_path / "cache", signals, "fp32")
    source, _, _ = source_of(tiny, method, signals=signals)
    written = source.writer(prompts_of(tiny, 10), 1)
    step = source.taught(as_corpus(written), 1, 0.9, {})
    expected = stored(written, method, mode)
    # The calibration is that of the data, not of the written text.
    sequence_R = torch.repeat_interleave(torch.arange(10), torch.tensor([len(response) for _, response in written]))
    expected.difficulty_R = source.difficulty(expected.split.entropy_R, sequence_R)
    reference = expected.step([micro.batch for micro in step.micro_batches], 0.9)
    assert (step.positions, step.tokens, step.hard) == (reference.positions, reference.tokens, reference.hard)
    assert step.hard > 0
    for own, other in zip(step.micro_batches, reference.micro_batches, strict=True):
        torch.testing.assert_close(own.teacher(), other.teacher(), rtol=1e-2, atol=1e-2)
        assert own.teacher().dtype == other.teacher().dtype
        torch.testing.assert_close(own.weight_N, other.weight_N, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(own.temperature_N, other.temperature_N, rtol=1e-3, atol=1e-3)
        assert torch.equal(own.hard_H, other.hard_H)
        assert len(own.teacher_features) == 3
        for mine, theirs in zip(own.teacher_features, other.teacher_features, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)


def gradient(tiny, method: Method, micro_blocks: int) -> tuple[torch.Tensor, float]:
    """Gradient of the student's head and the loss of one step on the same text."""
    training = TRAINING.model_copy(update={"micro_blocks": micro_blocks, "block": 64})
    source, student, steps = source_of(tiny, method, training)
    step = source.step(1, steps[0], [], 0.3)
    head_UE, width = source.targets.head_UE, source.targets.store.width
    objective = Objective(student, method, 300, head_UE, width, torch.Generator().manual_seed(0))
    total = 0.0
    for micro in step.micro_batches:
        loss = objective(micro.to(CPU), step.positions, step.hard)["loss"]
        loss.backward()
        total += loss.item()
    return student.get_output_embeddings().weight.grad, total


def test_micro_batches_change_neither_loss_nor_gradient(tiny) -> None:
    method = gkd(1.0, **COMPONENTS)
    expected_VD, loss = gradient(tiny, method, 4)
    assert expected_VD.abs().max() > 0
    for micro_blocks in (1, 2):
        found_VD, other = gradient(tiny, method, micro_blocks)
        torch.testing.assert_close(found_VD, expected_VD, rtol=1e-4, atol=1e-6)
        assert other == pytest.approx(loss, rel=1e-5)


def test_random_feature_tokens_of_one_step_are_not_those_of_another(tiny) -> None:
    """Response-token indices of written text are its own: equal ones would give every step the same pattern."""
    features = {"features": {"tokens": "random", "threshold": 0.5}}
    source, _, _ = source_of(tiny, gkd(1.0, **features))
    corpus = as_corpus(source.writer(prompts_of(tiny, 10), 1))
    chosen = [source.taught(corpus, step, 0.5, {}).micro_batches[0].hard_H.tolist() for step in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]


# ── the run ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_share_0_is_the_off_policy_run_bit_for_bit(tiny, tmp_path: Path) -> None:
    plain = Method.model_validate({"divergence": "forward_kl", **COMPONENTS})
    expected, found = run(tiny, tmp_path / "plain", plain), run(tiny, tmp_path / "gkd", gkd(0.0, **COMPONENTS))
    assert found["weights_sha256"] == expected["weights_sha256"]
    own = {"on_policy"}
    assert [{k: v for k, v in row.items() if k not in own} for row in without_seconds(tmp_path / "gkd")] == (
        without_seconds(tmp_path / "plain")
    )
    for name in ("generated_tokens", "teacher_tokens_online", "on_policy_steps", "replayed_steps"):
        assert expected[name] == found[name] == 0
    assert found["tflops"] == expected["tflops"]


def test_share_1_trains_on_nothing_but_the_students_text(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taught, trained = [], []
    original, forward = OnPolicy.taught, Objective.forward

    def watched(self, written, *arguments):
        taught.append(written)
        return original(self, written, *arguments)

    def trained_on(self, micro, *arguments, **keywords):
        trained.append(micro.batch)
        return forward(self, micro, *arguments, **keywords)

    monkeypatch.setattr(OnPolicy, "taught", watched)
    monkeypatch.setattr(Objective, "forward", trained_on)
    record = run(tiny, tmp_path, gkd(1.0, **COMPONENTS))
    corpus = Corpus.open(tiny.data, "train")
    steps = plan_steps(corpus, TRAINING, 0)
    assert record["on_policy_steps"] == len(taught) == 6
    for blocks, written in zip(steps, taught, strict=True):
        documents = np.concatenate(blocks)
        assert len(documents) == len(written)
        for index, document in enumerate(documents.tolist()):
            ids, length = written.document(index)
            given, prompt = corpus.document(document)
            assert ids[:length].tolist() == given[:prompt].tolist()
            assert ids[length:].tolist() != given[prompt:].tolist()
            assert len(ids) - length <= 12
    response_tokens = sum(written.response_tokens for written in taught)
    assert record["generated_tokens"] == record["positions"] == response_tokens
    assert record["teacher_tokens_online"] == sum(int(written.lengths.sum()) for written in taught)
    assert sum(len(batch.labels_N) for batch in trained) == response_tokens
    assert record["tokens"] == sum(batch.input_ids_BL.numel() for batch in trained)
    assert record["replayed_steps"] == 0
    logged = [row for row in rows(tmp_path) if "loss" in row]
    assert [row["on_policy"] for row in logged] == [1.0] * 6
    assert logged[-1]["positions"] == response_tokens
    for row in logged:
        assert row["weight_mean"] == pytest.approx(1.0, abs=1e-5)
        assert row["loss"] == pytest.approx(row["kd"] + 0.5 * row["features"], rel=1e-5)
    # the student writes with the weights of the step: the same prompts, other text once it has learned
    assert logged[-1]["kd"] < logged[0]["kd"]


@pytest.mark.parametrize("mode", ["hidden", "logprobs"])
def test_the_ledger_of_tflops_counts_generation_and_the_teacher(tiny, tmp_path: Path, mode: str) -> None:
    """Where the loss reads log-probabilities the teacher projects once more, and the student's step does not."""
    if mode == "logprobs":
        tiny = dataclasses.replace(tiny, signals=with_logprobs(tiny, tmp_path))
    record = run(tiny, tmp_path / "run", gkd(1.0))
    student, teacher = load_model(tiny.student), load_model(tiny.teacher)

    def trunk(model) -> float:
        weights = sum(p.numel() for name, p in model.named_parameters() if "layers" in name and p.ndim == 2)
        return 2.0 * weights + 4.0 * 64 * 32 * model.config.num_hidden_layers

    blocks, written = record["tokens"], record["generated_tokens"]
    prompts = record["teacher_tokens_online"] - written
    head = 2.0 * 32 * 300
    training = 3 * trunk(student) * blocks + (3 * head + head) * written
    online = (
        trunk(student) * (prompts + written) + head * written + trunk(teacher) * (prompts + written) + head * written
    )
    assert record["tflops"] == pytest.approx((training + online) / 1e12, rel=1e-6)


def test_looks_at_the_students_text_are_counted_where_they_happen(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that is one micro-batch of data may be several of the student's text, and the other way round."""
    looked = []
    whole = loop.with_factors

    def counting(objective, micro_batches, *rest):
        looked.append(sum(micro.batch.input_ids_BL.numel() for micro in micro_batches))
        return whole(objective, micro_batches, *rest)

    monkeypatch.setattr(loop, "with_factors", counting)
    one = TRAINING.model_copy(update={"blocks_per_step": 1, "micro_blocks": 1})
    long = {"name": "gkd", "share": 1.0, "max_response_tokens": 40}
    record = run(tiny, tmp_path / "run", method_of(long, approach="adakd", divergence="reverse_kl"), one)
    plain = run(tiny, tmp_path / "plain", method_of(long, divergence="reverse_kl"), one)
    assert sum(looked) > 0

    def flops(record: dict, scanned: int, looks: int) -> float:
        student, teacher = load_model(tiny.student), load_model(tiny.teacher)
        head, written = 2.0 * 32 * 300, record["positions"]
        read = record["teacher_tokens_online"]
        trunks = [trunk_flops_per_token(model, 64) for model in (student, teacher)]
        training = trunks[0] * (3 * record["tokens"] + scanned) + (4 + 2 * looks) * head * written
        return (training + (trunks[0] + trunks[1]) * read + 2 * head * written) / 1e12

    assert record["tflops"] == pytest.approx(flops(record, sum(looked), 1), rel=1e-6)
    assert plain["tflops"] == pytest.approx(flops(plain, 0, 0), rel=1e-6)


DISTILLM = {"name": "distillm", "share": 0.6, "share_step": 0.04, "loss_tolerance": 0.0, "max_response_tokens": 12}
LONG = TRAINING.model_copy(update={"steps": 12, "lr": 0.05, "eval_every": 1, "clip": None})


def distillm(variant: str) -> Method:
    return method_of(DISTILLM | {"capacity": 24, "variant": variant}, divergence="skew_kl", **COMPONENTS)


METHODS = {"gkd": gkd(0.5), "authors": distillm("authors"), "paper": distillm("paper")}
ROWS = {"gkd": "gkd", "authors": "distillm", "paper": "distillm_paper"}
"""Of the page of evidence."""


@pytest.fixture
def rising(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dev loss that rises as the student learns: its own with the other sign."""
    monkeypatch.setattr(loop, "dev_nll", lambda *arguments: -dev_nll(*arguments))


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Uninterrupted runs under a rising dev loss."""
    outputs = {name: tmp_path_factory.mktemp(name) for name in METHODS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "dev_nll", lambda *arguments: -dev_nll(*arguments))
        for name, method in METHODS.items():
            run(tiny, outputs[name], method, LONG)
    return outputs


@pytest.mark.parametrize("variant", ["authors", "paper"])
def test_distillm_uses_data_new_text_and_the_buffer(whole: dict[str, Path], variant: str) -> None:
    record = json.loads((whole[variant] / "run.json").read_text(encoding="utf-8"))
    logged = [row for row in rows(whole[variant]) if "loss" in row]
    on_policy, generated = (np.array([row[name] for row in logged]) for name in ("on_policy", "generated"))
    assert record["on_policy_steps"] == on_policy.sum() < 12
    assert 0 < generated.sum() < on_policy.sum()
    replayed = on_policy.sum() if variant == "paper" else on_policy.sum() - generated.sum()
    assert record["replayed_steps"] == replayed
    assert 0 < record["generated_tokens"] < record["teacher_tokens_online"]
    # every evaluation raised φ, the first time after the first step; the draws followed it
    np.testing.assert_allclose([row["share"] for row in logged], 0.6 + 0.04 * np.minimum(np.arange(12), 10), rtol=1e-6)


@pytest.mark.usefixtures("rising")
@pytest.mark.parametrize("name", METHODS)
def test_components_that_do_nothing_change_nothing(tiny, tmp_path: Path, name: str) -> None:
    """κ = 0, c = 0, and features of no token: of no text that the student writes either, however uncertain of it the
    teacher is."""
    off = {"curriculum": {"kappa": 0}, "temperature": {"c": 0}, "features": {"threshold": 1.0}}
    bare = METHODS[name].model_copy(update=dict.fromkeys(off))
    training = TRAINING.model_copy(update={"steps": 8})
    record = run(tiny, tmp_path / "bare", bare, training)
    run(tiny, tmp_path / "off", Method.model_validate(bare.model_dump() | off), training)
    assert_same_training(tmp_path / "off", tmp_path / "bare")
    assert 0 < record["on_policy_steps"] < 8
    assert (record["replayed_steps"] > 0) == (name != "gkd")


@pytest.mark.usefixtures("rising")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("calls", [3, 9])
def test_an_interrupted_run_ends_bit_for_bit_the_same(
    tiny, whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, calls: int, evidence
) -> None:
    """Stopped inside a step, after the state of the step before was written; φ, buffer and ledger go on."""
    method = METHODS[name]
    original, left = loop.clip_gradients, [calls]

    def dies(*arguments):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(loop, "clip_gradients", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path, method, LONG, save_minutes=1e-9)
    monkeypatch.setattr(loop, "clip_gradients", original)
    record, expected = run(tiny, tmp_path, method, LONG), json.loads((whole[name] / "run.json").read_text())
    assert (record["resumed"], expected["resumed"]) == (1, 0)
    for key in ("weights_sha256", "tokens", "positions", "tflops", "generated_tokens", "teacher_tokens_online"):
        assert record[key] == expected[key], key
    assert (record["on_policy_steps"], record["replayed_steps"]) == (
        expected["on_policy_steps"],
        expected["replayed_steps"],
    )
    assert without_seconds(tmp_path) == without_seconds(whole[name])
    evidence(ROWS[name], "resumes", "yes")


def test_the_buffer_drops_the_oldest_and_survives_its_state() -> None:
    buffer = ReplayBuffer(3)
    buffer.add([([1, 2], [3]), ([4], [5, 6]), ([7], [8])])
    buffer.add([([9], [10, 11, 12])])
    other = ReplayBuffer(3)
    other.load_state(buffer.state())
    kept = [([4], [5, 6]), ([7], [8]), ([9], [10, 11, 12])]
    for one in (buffer, other):
        drawn = one.draw(3, np.random.default_rng(0))
        assert sorted(drawn) == kept  # without replacement, none of the dropped
        assert one.draw(2, np.random.default_rng(1)) == buffer.draw(2, np.random.default_rng(1))
    empty = ReplayBuffer(3)
    empty.load_state(ReplayBuffer(3).state())
    assert len(empty) == 0
    with pytest.raises(ValueError, match="positive integer"):
        empty.draw(1, np.random.default_rng(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_draws_no_global_random_number(tiny, dtype: torch.dtype) -> None:
    source, _, steps = source_of(tiny, gkd(1.0))
    source.writer.dtype = dtype
    before = torch.get_rng_state()
    source.step(1, steps[0], [], 0.5)
    assert torch.equal(torch.get_rng_state(), before)


def test_in_bf16_the_weights_of_the_step_write_in_bf16(tiny, tmp_path: Path) -> None:
    """The copy follows the student: its text is that of a bf16 model with the present weights."""
    method = method_of({"name": "gkd", "temperature": 1e-6, "max_response_tokens": 9})
    source, student, _ = source_of(tiny, method)
    source.writer.dtype = torch.bfloat16
    prompts = prompts_of(tiny, 6)
    before = source.writer(prompts, 1)
    with torch.no_grad():
        for index, weight in enumerate(student.parameters()):
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(index)), alpha=0.1)
    after = source.writer(prompts, 1)
    assert after != before
    student.save_pretrained(tmp_path)
    limits = {"max_new_tokens": 9, "max_length": 64, "temperature": 1e-6, "batch": 6, "eos_token_id": 2}
    other, ties = load_model(tmp_path, dtype=torch.bfloat16), torch_stream(0, "student text 1")
    expected = generate(other, source.writer.tokenizer, prompts, generator=ties, **limits)
    assert after == list(zip(prompts, expected, strict=True))
    assert student.training
    assert {weight.dtype for weight in student.parameters()} == {torch.float32}


CHILD = """
import sys
from pathlib import Path
import torch
from entkd.config import Method, Training
from entkd.distill import distill

torch.set_num_threads(1)
method, training, student, data, signals, teacher, output = sys.argv[1:]
method, training = Method.model_validate_json(method), Training.model_validate_json(training)
inputs = (Path(student), Path(data), Path(signals), Path(output))
distill(method, training, 0, *inputs, log_every=4, teacher=Path(teacher))
"""


@pytest.mark.parametrize("name", ["gkd", "paper"])
def test_two_processes_train_what_one_trains(tiny, tmp_path: Path, name: str) -> None:
    method = gkd(1.0, **COMPONENTS) if name == "gkd" else distillm(name)
    training = TRAINING.model_copy(update={"micro_blocks": 1, "blocks_per_step": 2, "steps": 4})
    run(tiny, tmp_path / "one", method, training)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folders = [str(path) for path in (tiny.student, tiny.data, tiny.signals, tiny.teacher, tmp_path / "two")]
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, canonical_json(method), canonical_json(training), *folders],
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "RANK": str(rank)}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for child in children:
        _, stderr = child.communicate(timeout=240)
        assert child.returncode == 0, stderr
    found = load_file(tmp_path / "two" / "model" / "model.safetensors")
    for key, tensor in load_file(tmp_path / "one" / "model" / "model.safetensors").items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=1e-4)
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        if "loss" in one:
            assert (two["positions"], two["on_policy"], two["hard"]) == (
                one["positions"],
                one["on_policy"],
                one["hard"],
            )
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
            assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_refusals_name_the_setting(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"method\.on_policy: gkd has the teacher read .* give --teacher"):
        run(dataclasses.replace(tiny, teacher=None), tmp_path / "a", gkd(0.5))
    with pytest.raises(UserError, match=r"--teacher: .* is missing; run `entkd prepare-teacher`"):
        run(dataclasses.replace(tiny, teacher=tmp_path), tmp_path / "b", gkd(0.5))
    (tmp_path / "manifest.json").write_text(json.dumps({"sha256": "1" * 64}), encoding="utf-8")
    with pytest.raises(UserError, match=r"has sha256 111111111111, the signals are of a teacher with 000000000000"):
        run(dataclasses.replace(tiny, teacher=tmp_path), tmp_path / "c", gkd(0.5))
    with pytest.raises(UserError, match=r"method\.on_policy\.capacity: 3 documents, and a step has up to \d+"):
        run(tiny, tmp_path / "d", method_of({"name": "distillm", "capacity": 3}))
    # The default of the release: in a run this short its buffer would never be full, and the arm would be another one.
    with pytest.raises(UserError, match=r"capacity: 1000 documents, and the steps of this run have \d+ in all"):
        run(tiny, tmp_path / "e", method_of({"name": "distillm"}))

    source, _, steps = source_of(tiny, gkd(1.0, divergence="reverse_kl"))
    original = source.teacher._pass.forward

    def broken(value):
        def forward(*arguments):
            hidden_NE, captured, found, _ = original(*arguments)
            return hidden_NE, captured, found | {"logsumexp": found["logsumexp"] + value}, value == 0

        return forward

    monkeypatch.setattr(source.teacher._pass, "forward", broken(0))
    with pytest.raises(UserError, match=r"method\.divergence: reverse_kl contains KL\(q‖p\), which is infinite"):
        source.step(1, steps[0], [], 0.5)
    monkeypatch.setattr(source.teacher._pass, "forward", broken(float("nan")))
    with pytest.raises(UserError, match=r"NaN or infinite output on text that the student wrote"):
        source.step(1, steps[0], [], 0.5)


def test_sparse_signals_are_refused_by_the_run_too(tiny, tmp_path: Path) -> None:
    signals = tmp_path / "signals" / "manifest.json"
    needs = {"features": None, "splits": ["train"]}
    write_signals(Signals(mode="sparse"), needs, tiny.teacher, tiny.data, tmp_path / "cache", signals, "fp32")
    with pytest.raises(UserError, match=r"method\.on_policy: gkd meets the teacher's whole distribution"):
        run(dataclasses.replace(tiny, signals=signals), tmp_path / "out", gkd(0.5))

"""A whole training run: outputs, pairing, resume after a kill, several processes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from entkd.config import Method, Training, canonical_json
from entkd.data import Corpus
from entkd.data.packing import plan_steps
from entkd.distill import distill
from entkd.distill.evaluate import dev_nll
from entkd.errors import UserError
from entkd.models import load_model

FULL = Method.model_validate({"divergence": "forward_kl", "curriculum": {}, "temperature": {}, "features": {}})
TRAINING = Training(steps=6, block=64, blocks_per_step=4, micro_blocks=2, lr=3e-3, precision="fp32", eval_every=2)

CHILD = """
import os, signal, sys
import torch
from pathlib import Path
from entkd.config import Method, Training
from entkd.distill import distill, loop
import entkd.checkpoint

torch.set_num_threads(1)
method, training, seed, student, data, signals, output, event, count = sys.argv[1:]
calls = 0

def trap(original, partial=False):
    def trapped(*args, **kwargs):
        global calls
        calls += 1
        if calls == int(count):
            if partial:
                args[1].write(b"half a state")
                args[1].flush()
            os.kill(os.getpid(), signal.SIGTERM if event == "sigterm" else signal.SIGKILL)
        return original(*args, **kwargs)
    return trapped

if event in ("kill", "sigterm"):
    loop.clip_gradients = trap(loop.clip_gradients)
if event == "kill-in-write":
    torch.save = trap(torch.save, partial=True)
method, training = Method.model_validate_json(method), Training.model_validate_json(training)
often = 1e-9 if event.startswith("kill") else 100.0  # a kill needs a state to continue from, SIGTERM makes its own
distill(method, training, int(seed), Path(student), Path(data), Path(signals), Path(output), often, log_every=4)
"""


def run_child(
    tiny, output: Path, training: Training, event: str = "", count: int = 0, env: dict[str, str] | None = None
):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, canonical_json(FULL), canonical_json(training), "0"]
        + [str(path) for path in (tiny.student, tiny.data, tiny.signals, output)]
        + [event, str(count)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
        stderr=subprocess.PIPE,
        text=True,
    )


def run(tiny, output: Path, training: Training = TRAINING, method: Method = FULL, log_every: int = 4) -> dict:
    torch.set_num_threads(1)
    signals = tiny.signals if method.needs_signals else None
    distill(method, training, 0, tiny.student, tiny.data, signals, output, log_every=log_every)
    return json.loads((output / "run.json").read_text(encoding="utf-8"))


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of the full method."""
    output = tmp_path_factory.mktemp("whole")
    run(tiny, output)
    return output


def test_outputs_and_record(tiny, whole: Path) -> None:
    record = json.loads((whole / "run.json").read_text(encoding="utf-8"))
    corpus = Corpus.open(tiny.data, "train")
    trained = sum(
        int(corpus.response_lengths[block].sum()) for step in plan_steps(corpus, TRAINING, 0) for block in step
    )
    assert record["positions"] == trained
    assert record["tokens"] == 6 * 4 * 64
    assert (record["steps"], record["resumed"], record["threads"]) == (6, 0, [1])
    assert record["arm"]["method"] == FULL.model_dump(mode="json")
    for name in ("tflops", "peak_gib", "teacher_tokens"):
        assert record[name] > 0
    assert not (whole / "resume").exists()
    logged = rows(whole)
    steps = [row for row in logged if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in logged if "dev_nll" in row] == [2, 4, 6]
    for row in steps:
        assert row["loss"] == pytest.approx(row["kd"] + 0.5 * row["features"], rel=1e-5)
        assert row["weight_mean"] == pytest.approx(1.0, abs=1e-5)
    assert steps[0]["progress"] < 0.5 < steps[-1]["progress"]
    assert steps[-1]["kd"] < steps[0]["kd"]
    assert load_model(whole).config.num_hidden_layers == 3


def test_same_seed_same_weights_and_logging_changes_nothing(tiny, whole: Path, tmp_path: Path) -> None:
    """Pitfall 22, and limit 11 for the accumulation: other log intervals, other micro-batches."""
    record = run(tiny, tmp_path / "same", log_every=1)
    assert record["weights_sha256"] == json.loads((whole / "run.json").read_text(encoding="utf-8"))["weights_sha256"]
    run(tiny, tmp_path / "split", TRAINING.model_copy(update={"micro_blocks": 1}))
    for name, tensor in load_file(whole / "model" / "model.safetensors").items():
        split = load_file(tmp_path / "split" / "model" / "model.safetensors")[name]
        torch.testing.assert_close(split, tensor, rtol=1e-3, atol=1e-4)


def test_arms_of_one_seed_see_the_same_batches(tiny, whole: Path, tmp_path: Path) -> None:
    """Paired by seed: a component switched off does not shift the data order."""
    run(tiny, tmp_path, method=Method.model_validate({"ce": {}}))
    full, ce = ([row["positions"] for row in rows(folder) if "loss" in row] for folder in (whole, tmp_path))
    assert full == ce


@pytest.mark.parametrize(("event", "count"), [("kill", 4), ("kill-in-write", 3), ("sigterm", 3)])
def test_interrupted_run_ends_bit_for_bit_the_same(tiny, whole: Path, tmp_path: Path, event: str, count: int) -> None:
    """3 steps + kill −9 + 3 steps == 6 steps; a kill inside the checkpoint write; SIGTERM between two steps."""
    child = run_child(tiny, tmp_path, TRAINING, event, count)
    _, stderr = child.communicate(timeout=120)
    assert child.returncode == (143 if event == "sigterm" else -signal.SIGKILL), stderr
    assert (tmp_path / "resume" / "state.pt").exists()
    assert not (tmp_path / "run.json").exists()

    record = run(tiny, tmp_path)
    assert record["resumed"] == 1
    expected, found = (load_file(folder / "model" / "model.safetensors") for folder in (whole, tmp_path))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    for before, after in zip(rows(whole), rows(tmp_path), strict=True):
        assert {k: v for k, v in before.items() if k != "seconds"} == {k: v for k, v in after.items() if k != "seconds"}
    assert record["positions"] == json.loads((whole / "run.json").read_text(encoding="utf-8"))["positions"]


def test_interrupted_run_with_dropout_and_best_checkpoint(tiny, tmp_path: Path) -> None:
    """Pitfall 26: the generator of the dropout masks and the best evaluation so far are part of the state."""
    student = tmp_path / "student"
    shutil.copytree(tiny.student, student)
    config = json.loads((student / "model/config.json").read_text(encoding="utf-8"))
    (student / "model/config.json").write_text(json.dumps(config | {"attention_dropout": 0.3}), encoding="utf-8")
    tiny = dataclasses.replace(tiny, student=student)
    training = TRAINING.model_copy(update={"checkpoint": "best", "eval_every": 1})
    training = training.model_copy(update={"lr": 0.3, "clip": None})  # wrecks the student after the first steps
    child = run_child(tiny, tmp_path / "killed", training, "kill", 5)
    child.communicate(timeout=120)
    resumed, straight = run(tiny, tmp_path / "killed", training), run(tiny, tmp_path / "whole", training)
    assert (resumed["resumed"], straight["resumed"]) == (1, 0)
    assert straight["best_step"] < 5  # the best weights were those of a step before the kill
    assert resumed["weights_sha256"] == straight["weights_sha256"]
    losses = [[row["loss"] for row in rows(tmp_path / name) if "loss" in row] for name in ("killed", "whole")]
    assert losses[0] == losses[1]


def test_a_diverging_run_stops_with_the_step_and_a_remedy(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("entkd.distill.loop.dev_nll", lambda *_: float("nan"))
    with pytest.raises(UserError, match=r"dev loss is nan at step 2; lower training\.lr"):
        run(tiny, tmp_path)
    assert not (tmp_path / "run.json").exists()


def test_state_of_other_settings_is_not_continued(tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    child = run_child(tiny, tmp_path, TRAINING, "kill", 4)
    child.communicate(timeout=120)
    record = run(tiny, tmp_path, TRAINING.model_copy(update={"lr": 1e-3}))
    assert record["resumed"] == 0
    assert "starting anew" in capsys.readouterr().err


def test_two_processes_train_what_one_trains(tiny, whole: Path, tmp_path: Path) -> None:
    """Limit 11 and pitfall 20: DDP over gloo; a forward past the wrapper would leave the gradients unaveraged."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [
        run_child(
            tiny,
            tmp_path,
            TRAINING.model_copy(update={"micro_blocks": 1}),  # two micro-batches for each process
            env={"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        )
        for rank in range(2)
    ]
    for child in children:
        _, stderr = child.communicate(timeout=120)
        assert child.returncode == 0, stderr
    found = load_file(tmp_path / "model" / "model.safetensors")
    for name, tensor in load_file(whole / "model" / "model.safetensors").items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["processes"] == 2
    for one, two in zip(rows(whole), rows(tmp_path), strict=True):
        assert one["step"] == two["step"]
        if "loss" in one:
            # AdamW does not see the scale of a gradient, and the loss is not what is averaged: the norm tells
            assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)


def test_best_checkpoint_is_the_one_with_the_lowest_dev_nll(tiny, tmp_path: Path) -> None:
    # A learning rate that wrecks the student after the first steps makes an early evaluation the best.
    training = TRAINING.model_copy(update={"checkpoint": "best", "lr": 0.3, "eval_every": 1, "clip": None})
    record = run(tiny, tmp_path, training)
    evaluated = {row["step"]: row["dev_nll"] for row in rows(tmp_path) if "dev_nll" in row}
    assert record["best_step"] == min(evaluated, key=evaluated.__getitem__) < 6
    nll = dev_nll(
        load_model(tmp_path), Corpus.open(tiny.data, "dev"), training, 300, 2, torch.device("cpu"), torch.float32
    )
    assert nll == pytest.approx(min(evaluated.values()), rel=1e-5)


def test_dev_nll_is_on_the_scale_of_the_training_loss(tiny) -> None:
    """Pitfall 25: the same documents, the same number."""
    corpus, student = Corpus.open(tiny.data, "dev"), load_model(tiny.student)
    nll = dev_nll(student, corpus, TRAINING, 300, 2, torch.device("cpu"), torch.float32)
    total = 0.0
    for index in range(len(corpus)):
        ids, prompt_length = corpus.document(index)
        ids = torch.as_tensor(ids.astype(np.int64))
        with torch.no_grad():
            logprob = torch.log_softmax(student(input_ids=ids[None]).logits[0].double(), -1)
        total -= sum(logprob[i - 1, ids[i]].item() for i in range(prompt_length, len(ids)))
    assert nll == pytest.approx(total / corpus.response_tokens, rel=1e-5)

"""Budgets as steps, and the runs that come of tuning: trials without weights, patches on the settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from entkd import cli
from entkd.config import Method, Training, canonical_json
from entkd.data import Corpus
from entkd.data.packing import pack, stream_steps
from entkd.distill import calibrate, distill
from entkd.distill.flops import training_tflops, trunk_flops_per_token
from entkd.distill.plan import Costs, plan_run
from entkd.distill.targets import TeacherTargets
from entkd.errors import UserError
from entkd.features import Projectors
from entkd.models import load_model
from entkd.signals import SignalStore

SHORT = {"block": 64, "blocks_per_step": 2, "micro_blocks": 1, "lr": 1e-3, "precision": "fp32", "eval_every": 50}
ARMS = {
    "sft": {"ce": {}},
    "kd": {"divergence": "forward_kl"},
    "full": {"divergence": "forward_kl", "curriculum": {}, "temperature": {}, "features": {}},
    "all": {"divergence": "forward_kl", "features": {"tokens": "all"}},
    "random": {"divergence": "forward_kl", "features": {"tokens": "random", "threshold": 0.6}},
    "easy": {"divergence": "forward_kl", "features": {"tokens": "easy"}},
    "moving": {
        "divergence": "forward_kl",
        "curriculum": {"progress": "hard"},
        "features": {"threshold": 1.0, "threshold_end": 0.0},
    },
    "initial_kl": {"divergence": "forward_kl", "curriculum": {}, "difficulty": {"source": "initial_kl"}},
    "initial_entropy": {
        "divergence": "forward_kl",
        "curriculum": {},
        "difficulty": {"source": "initial_student_entropy"},
    },
}


def method(arm: str) -> Method:
    return Method.model_validate(ARMS[arm])


def training(**length) -> Training:
    return Training.model_validate(SHORT | length)


def costs_of(tiny, arm: str, seed: int = 0) -> tuple[Corpus, Costs]:
    corpus = Corpus.open(tiny.data, "train")
    signals = tiny.signals if method(arm).needs_signals else None
    targets = TeacherTargets(method(arm), signals, tiny.data, corpus, seed)
    if targets.store is not None and targets.waits_for_student:
        targets.use_student(torch.rand(corpus.response_tokens))
    return corpus, Costs.of(load_model(tiny.student), corpus, targets, training(steps=1), 300)


def trained(tiny, output: Path, arm: str, settings: Training, **more) -> dict:
    torch.set_num_threads(1)
    signals = tiny.signals if method(arm).needs_signals else None
    distill(method(arm), settings, 0, tiny.student, tiny.data, signals, output, **more)
    return json.loads((output / "run.json").read_text(encoding="utf-8"))


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("arm", ARMS)
def test_arms_spend_the_same_flops_but_for_a_step(tiny, arm: str) -> None:
    budget = 0.05
    for seed in (0, 3):
        corpus, costs = costs_of(tiny, arm, seed)
        steps = plan_run(corpus, training(budget={"tflops": budget}), seed, costs)
        spent = costs.beforehand + costs.tflops(steps)
        largest = max(costs.tflops([step]) for step in steps)
        assert len(steps) > 15
        assert budget - largest < spent <= budget


def test_costlier_arms_take_fewer_steps(tiny) -> None:
    lengths = {}
    for arm in ARMS:
        corpus, costs = costs_of(tiny, arm)
        lengths[arm] = len(plan_run(corpus, training(budget={"tflops": 0.2}), 0, costs))
    assert lengths["sft"] > lengths["kd"] > lengths["full"] > lengths["all"]


def test_a_budget_of_tokens_is_the_same_for_every_arm_and_is_kept(tiny) -> None:
    budget = 1000
    plans = []
    for arm in ("sft", "full"):
        corpus, costs = costs_of(tiny, arm)
        steps = plan_run(corpus, training(budget={"tokens": budget}), 0, costs)
        plans.append([[block.tolist() for block in step] for step in steps])
        spent = sum(int(corpus.response_lengths[block].sum()) for step in steps for block in step)
        stream = stream_steps(corpus, training(steps=1), 0)
        after = [next(stream) for _ in range(len(steps) + 1)][-1]
        more = sum(int(corpus.response_lengths[block].sum()) for block in after)
        assert spent <= budget < spent + more
    assert plans[0] == plans[1]


def test_record_states_the_analytic_cost_and_the_steps_are_the_planned_ones(tiny, tmp_path: Path) -> None:
    budget = {"tflops": 0.004}
    corpus, costs = costs_of(tiny, "random")
    record = trained(tiny, tmp_path, "random", training(budget=budget))
    steps = plan_run(corpus, training(budget=budget), 0, costs)
    logged = [row for row in rows(tmp_path) if "loss" in row]
    assert record["steps"] == len(steps) == len(logged)
    assert logged[0]["progress"] < 0.5 < logged[-1]["progress"]
    hard = sum(row["hard"] for row in logged)
    student, pairs = load_model(tiny.student), method("random").features.points
    sizes = (record["tokens"], record["positions"], 64, 300)
    expected = training_tflops(student, *sizes, teacher_width=32, projected=pairs * int(hard), projector_width=32)
    assert record["tflops"] == pytest.approx(expected, rel=1e-9)
    assert record["tflops"] <= 0.004
    assert record["arm"]["training"]["budget"] == {"tokens": None, "tflops": 0.004, "seconds": None}


@pytest.mark.parametrize("arm", ["initial_kl", "initial_entropy"])
def test_the_untrained_students_pass_over_the_data_is_counted(tiny, tmp_path: Path, arm: str) -> None:
    """One forward pass more over every block: the trunk's and the heads' share of what torch counts."""
    record = trained(tiny, tmp_path / arm, arm, training(steps=3))
    plain = trained(tiny, tmp_path / "kd", "kd", training(steps=3))
    assert (record["tokens"], record["positions"]) == (plain["tokens"], plain["positions"])
    corpus, student = Corpus.open(tiny.data, "train"), load_model(tiny.student)
    blocks = pack(corpus.lengths, 64, np.arange(len(corpus)))
    heads = 2 * 300 * (student.config.hidden_size + (32 if arm == "initial_kl" else 0))
    whole = trunk_flops_per_token(student, 64) * 64 * len(blocks) + heads * corpus.response_tokens
    assert record["tflops"] - plain["tflops"] == pytest.approx(whole / 1e12, rel=1e-9)
    assert record["seconds_beforehand"] > 0 == plain["seconds_beforehand"]


@pytest.mark.parametrize("arm", ["full", "all", "random", "easy"])
def test_feature_tokens_are_known_before_training(tiny, arm: str) -> None:
    corpus = Corpus.open(tiny.data, "train")
    targets = TeacherTargets(method(arm), tiny.signals, tiny.data, corpus, 5)
    known = targets.feature_tokens(len(corpus))
    assert known.shape == (len(corpus),)
    from entkd.data.packing import collate

    for documents in ([3], [7, 2], [0, 11, 30]):
        batch = collate(corpus, [np.array([d]) for d in documents], 64, 2)
        assert targets.step([batch], 0.5).hard == known[documents].sum()


def test_projector_flops_equal_the_counted_ones() -> None:
    tokens, width, teacher_width = 7, 24, 40
    projectors = Projectors(width, teacher_width, 3)
    hidden_ND = torch.randn(tokens, width, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        sum(projector(hidden_ND).sum() for projector in projectors).backward()

    class Student(torch.nn.Module):
        class config:  # noqa: N801
            hidden_size, num_hidden_layers = width, 0

        def get_output_embeddings(self):
            return torch.nn.Linear(1, 1)

    analytic = training_tflops(Student(), 0, 0, 1, 1, None, projected=3 * tokens, projector_width=teacher_width)
    assert 1e12 * analytic == pytest.approx(counter.get_total_flops())


@pytest.mark.parametrize("progress", ["easy", "hard"])
def test_a_moving_threshold_that_stands_still_is_planned_where_it_stands(tiny, tmp_path: Path, progress: str) -> None:
    moving = ARMS["moving"] | {"curriculum": {"progress": progress}}
    corpus = Corpus.open(tiny.data, "train")
    targets = TeacherTargets(Method.model_validate(moving), tiny.signals, tiny.data, corpus, 0)
    known = targets.feature_tokens(len(corpus)).sum()
    assert known == (0 if progress == "easy" else corpus.response_tokens)


def test_a_budget_below_one_step_is_refused(tiny) -> None:
    corpus, costs = costs_of(tiny, "kd")
    with pytest.raises(UserError, match=r"training\.budget: 3 tokens is less than a run of one step costs"):
        plan_run(corpus, training(budget={"tokens": 3}), 0, costs)
    with pytest.raises(UserError, match=r"training\.budget: 1e-09 TFLOPs is less"):
        plan_run(corpus, training(budget={"tflops": 1e-9}), 0, costs)
    with pytest.raises(UserError, match=r"budget\.seconds: .* run `entkd calibrate`"):
        plan_run(corpus, training(budget={"seconds": 9}), 0, costs)


def test_a_budget_of_seconds_becomes_a_number_of_steps_before_training(tiny, tmp_path: Path) -> None:
    arguments = [method("kd"), training(budget={"seconds": 2.0}), 0, tiny.student, tiny.data, tiny.signals]
    threads = torch.get_num_threads()
    calibrate(*arguments, tmp_path / "kd.json", threads=1)
    torch.set_num_threads(threads)
    patch = json.loads((tmp_path / "kd.json").read_text(encoding="utf-8"))
    steps = patch["training"]["steps"]
    assert patch == {"training": {"budget": None, "steps": steps}}
    assert 5 < steps < 5000  # a step of the tiny model takes some milliseconds
    with pytest.raises(UserError, match="seconds are less than a step takes"):
        calibrate(method("kd"), training(budget={"seconds": 1e-6}), *arguments[2:], tmp_path / "none.json")
    with pytest.raises(UserError, match="5 steps; only `budget"):
        calibrate(method("kd"), training(steps=5), *arguments[2:], tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()


def test_steps_are_the_budget_over_the_median_of_timed_steps(tiny, tmp_path: Path, monkeypatch) -> None:
    """Slow first steps and one hiccup do not count: 11 steps, the first three of 5 s, one of 7 s, others of 0.25 s."""

    def slow(method, training, seed, student, data, signals, output, *rest, **more) -> None:
        assert (training.steps, training.budget, more["trial"]) == (11, None, True)
        output.mkdir()
        clock = np.cumsum([5, 5, 5, 0.25, 0.25, 7, 0.25, 0.25, 0.25, 0.25, 0.25])
        lines = [json.dumps({"step": i, "seconds": s}) for i, s in enumerate(clock.tolist(), 1)]
        (output / "metrics.jsonl").write_text("\n".join([*lines, json.dumps({"step": 11, "dev_nll": 3.0})]))
        beforehand = 4.0 if method.difficulty.of_student else 0.0
        (output / "run.json").write_text(json.dumps({"seconds_beforehand": beforehand}))

    monkeypatch.setattr("entkd.distill.calibration.distill", slow)
    inputs = (0, tiny.student, tiny.data, tiny.signals)
    calibrate(method("kd"), training(budget={"seconds": 10.1}), *inputs, tmp_path / "kd.json", torch.get_num_threads())
    assert json.loads((tmp_path / "kd.json").read_text())["training"]["steps"] == 40
    # the untrained student's pass over the data is of the same budget
    calibrate(method("initial_kl"), training(budget={"seconds": 10.1}), *inputs, tmp_path / "initial.json", 1)
    assert json.loads((tmp_path / "initial.json").read_text())["training"]["steps"] == 24
    with pytest.raises(UserError, match=r"3 seconds are less than a step takes, 0\.25 after 4 for the untrained"):
        calibrate(method("initial_kl"), training(budget={"seconds": 3}), *inputs, tmp_path / "none.json", 1)


def test_patches_decide_the_run_and_are_in_its_record(tiny, tmp_path: Path) -> None:
    settings = {"method": ARMS["full"], "training": SHORT | {"budget": {"seconds": 9.0}}}
    patches = {
        "budget.json": {"training": {"budget": None, "steps": 3}},
        "choice.json": {"training": {"lr": 7e-3}, "method": {"curriculum": {"kappa": 0.25}}},
    }
    for name, patch in patches.items():
        (tmp_path / name).write_text(json.dumps(patch), encoding="utf-8")
    common = ["--seed", "0", "--student", str(tiny.student), "--data", str(tiny.data), "--signals", str(tiny.signals)]
    files = [str(tmp_path / name) for name in patches]
    command = ["distill", "--settings", json.dumps(settings), "--patches", *files, *common]
    assert cli.main([*command, "--output", str(tmp_path / "patched")]) == 0
    record = json.loads((tmp_path / "patched/run.json").read_text(encoding="utf-8"))
    assert (record["steps"], record["arm"]["training"]["lr"]) == (3, 7e-3)
    assert record["arm"]["method"]["curriculum"]["kappa"] == 0.25
    assert "budget" not in record["arm"]["training"]
    # what was merged is the same run as what is written
    written = {"method": ARMS["full"] | {"curriculum": {"kappa": 0.25}}, "training": SHORT | {"steps": 3, "lr": 7e-3}}
    command = ["distill", "--settings", json.dumps(written), "--patches", *common]
    assert cli.main([*command, "--output", str(tmp_path / "written")]) == 0
    again = json.loads((tmp_path / "written/run.json").read_text(encoding="utf-8"))
    assert (again["identity"], again["weights_sha256"]) == (record["identity"], record["weights_sha256"])


def test_a_patch_that_does_not_fit_is_named(tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patch = tmp_path / "kd.json"
    patch.write_text(json.dumps({"training": {"budget": None}}), encoding="utf-8")
    settings = canonical_json({"method": ARMS["kd"], "training": SHORT | {"steps": 1}})
    common = ["--seed", "0", "--student", "s", "--data", "d", "--output", "o"]
    assert cli.main(["distill", "--settings", settings, "--patches", str(patch), *common]) == 2
    assert f"{patch}.training.budget: null removes `budget`" in capsys.readouterr().err


def test_a_trial_is_the_run_without_its_weights_and_sees_no_test_split(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = training(steps=4)
    whole = trained(tiny, tmp_path / "whole", "full", settings)
    blind = tmp_path / "data"
    shutil.copytree(tiny.data, blind)
    for file in blind.glob("test.*"):
        file.unlink()
    split = SignalStore.split

    def no_test(store: SignalStore, name: str):
        assert name != "test"
        return split(store, name)

    monkeypatch.setattr(SignalStore, "split", no_test)
    distill(method("full"), settings, 0, tiny.student, blind, tiny.signals, tmp_path / "trial", trial=True)
    trial = json.loads((tmp_path / "trial/run.json").read_text(encoding="utf-8"))
    assert sorted(path.name for path in (tmp_path / "trial").iterdir()) == ["metrics.jsonl", "run.json"]
    assert trial["dev_nll"] == whole["dev_nll"] == rows(tmp_path / "whole")[-1]["dev_nll"]
    same = ("identity", "tflops", "positions", "steps")
    assert [trial[key] for key in same] == [whole[key] for key in same]
    assert "weights_sha256" in whole
    assert "weights_sha256" not in trial


def test_dev_loss_of_a_trial_is_that_of_the_student_it_would_keep(tiny, tmp_path: Path) -> None:
    wild = training(steps=6, eval_every=1, lr=0.3, clip=None, checkpoint="best")
    record = trained(tiny, tmp_path, "kd", wild, trial=True)
    evaluated = [row["dev_nll"] for row in rows(tmp_path) if "dev_nll" in row]
    assert record["dev_nll"] == min(evaluated) < evaluated[-1]


def test_a_diverging_trial_is_a_result(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("entkd.distill.loop.dev_nll", lambda *_: float("nan"))
    record = trained(tiny, tmp_path, "kd", training(steps=6, eval_every=2), trial=True)
    assert record["dev_nll"] is None
    assert record["steps"] == record["best_step"] == 2  # those it did
    assert record["tflops"] == pytest.approx(costs_of(tiny, "kd")[1].tflops(
        plan_run(Corpus.open(tiny.data, "train"), training(steps=2), 0, costs_of(tiny, "kd")[1])
    ))  # fmt: skip

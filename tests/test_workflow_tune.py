"""Tuning and timed budgets in the workflow: what trials depend on, and what they never see."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from test_workflow import COLLECT, EXPERIMENT, ROOT, ROW, snakemake_in, would_run
from test_workflow import write_experiment as write_any

from entkd.config import Experiment

TUNE = {"trials": 3, "arms": ["kd", "full"], "grids": {"training.lr": [1e-4, 1e-3, 1e-2]}}
TUNE["grids"]["method.features.weight"] = [0.25, 0.5]


def tuned(change: Callable[[dict], object] = lambda _: None) -> Callable[[dict], None]:
    def apply(experiment: dict) -> None:
        experiment["tune"] = json.loads(json.dumps(TUNE))
        change(experiment)

    return apply


def write_experiment(folder: Path, change: Callable[[dict], object]) -> None:
    """Without the arm that writes text of its own: a budget cannot be planned for it."""

    def apply(experiment: dict) -> None:
        del experiment["arms"]["gkd"]
        change(experiment)

    write_any(folder, apply)


def calls_of(folder: Path, stage: str) -> list[list[str]]:
    lines = (folder / "calls.txt").read_text(encoding="utf-8").splitlines()
    return [call for line in lines if (call := line.split())[0] == stage]


def copy_workflow(folder: Path) -> None:
    shutil.copy(ROOT / "Snakefile", folder)
    for name in ("workflow", "profiles"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "bin").mkdir()
    shutil.copy(ROOT / "tests/fake_entkd.sh", folder / "bin/entkd")
    (folder / "train.jsonl").write_text(ROW, encoding="utf-8")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the workflow in which a tuned experiment has run once."""
    folder = tmp_path_factory.mktemp("tuned")
    copy_workflow(folder)
    write_experiment(folder, tuned())
    run = snakemake_in(folder)
    assert run.returncode == 0, run.stderr
    return folder


def rerun(folder: Path, change: Callable[[dict], object]) -> Counter[str]:
    write_experiment(folder, change)
    return would_run(folder)[0]


def test_every_tuned_arm_is_tried_chosen_and_trained_at_its_choice(finished: Path) -> None:
    trials = [call for call in calls_of(finished, "distill") if "--trial" in call]
    arms = Counter(call[-1].split("/")[2] for call in trials)
    assert arms == {"kd": 3, "full": 3}
    assert {call[call.index("--seed") + 1] for call in trials} == {"1000"}
    assert len(calls_of(finished, "choose")) == 2
    for call in calls_of(finished, "distill"):
        patches = call[call.index("--patches") + 1 : call.index("--seed")]
        if "--trial" in call or "/seqkd/" in call[-1]:
            assert patches == []
        else:
            assert patches == [f"results/tuning/{call[-1].split('/')[2]}.json"]
    for stage in ("table", "figures"):
        (call,) = calls_of(finished, stage)
        assert call[call.index("--tuning") + 1] == "results/tuning.csv"
    assert would_run(finished) == (Counter(), Counter())


def test_the_choice_gets_nothing_but_records_of_trials(finished: Path) -> None:
    """What reads the test split is the scoring, and nothing of the tuning depends on it."""
    for call in calls_of(finished, "choose"):
        arm = call[call.index("--arm") + 1]
        names = [trial["name"] for trial in json.loads(call[call.index("--settings") + 1])["trials"]]
        files = call[call.index("--table") + 2 :]
        assert files == [f"results/tuning/{arm}/{name}/seed1000/run.json" for name in names]
    write_experiment(finished, tuned())
    dry = snakemake_in(finished, "--dry-run", "--forceall", "results/tuning.csv")
    assert dry.returncode == 0, dry.stderr
    rules = set(re.findall(r"^(?:local)?rule (\w+):", dry.stdout + dry.stderr, flags=re.M))
    assert rules == {
        "prepare_teacher", "prepare_data", "teacher_signals", "init_student", "trial", "choose", "collect_tuning",
    }  # fmt: skip


def test_seeds_tasks_and_other_arms_rerun_no_trial(finished: Path) -> None:
    assert rerun(finished, tuned(lambda e: e["seeds"].append(2))) == {
        "distill": 2, "seqkd": 1, "score": 3, "collect_runs": 1, **COLLECT,
    }  # fmt: skip
    task = {"name": "blimp", "metric": "acc", "direction": "higher"}
    assert rerun(finished, tuned(lambda e: e["suites"]["tiny"]["tasks"].append(task))) == {"score": 8, **COLLECT}
    new = {"divergence": "reverse_kl"}
    assert rerun(finished, tuned(lambda e: e["arms"].update(new=new))) == {
        "distill": 2, "score": 2, "collect_runs": 1, **COLLECT,
    }  # fmt: skip


def test_one_more_tuned_arm_is_tried_alone(finished: Path) -> None:
    def change(experiment: dict) -> None:
        experiment["arms"]["new"] = {"divergence": "reverse_kl"}
        experiment["tune"]["arms"].append("new")

    assert rerun(finished, tuned(change)) == {
        "trial": 3, "choose": 1, "collect_tuning": 1, "distill": 2, "score": 2, "collect_runs": 1, **COLLECT,
    }  # fmt: skip


def test_editing_a_grid_runs_only_the_points_that_are_new(finished: Path) -> None:
    def change(experiment: dict) -> None:
        experiment["tune"]["grids"]["training.lr"] = [1e-4, 1e-3, 2e-2]

    names = []
    for grid in (lambda _: None, change):
        experiment = json.loads(json.dumps(EXPERIMENT))
        tuned(grid)(experiment)
        trials = Experiment.model_validate(experiment).trials
        names.append({(arm, trial.name) for arm, own in trials.items() for trial in own})
    new = len(names[1] - names[0])
    assert 2 <= new < 6  # one value of three is another one
    assert rerun(finished, tuned(change))["trial"] == new
    # the grid of another component leaves `kd` alone
    weights = [0.75, 1.0]
    rules = rerun(finished, tuned(lambda e: e["tune"]["grids"].update({"method.features.weight": weights})))
    assert (rules["trial"], rules["choose"], rules["distill"]) == (3, 1, 2)
    more = rerun(finished, tuned(lambda e: e["tune"].update(trials=2)))
    assert (more["trial"], more["choose"]) == (0, 2)


def test_without_tuning_the_arms_train_as_written(finished: Path) -> None:
    rules = rerun(finished, lambda _: None)
    assert rules == {"distill": 4, "score": 4, "collect_runs": 1, **COLLECT}


def test_a_pipeline_on_other_data_is_tuned_on_it(finished: Path) -> None:
    write_experiment(finished, tuned(lambda e: e["tune"].update(arms="all")))
    dry = snakemake_in(finished, "--dry-run", "--printshellcmds")
    assert dry.returncode == 0, dry.stderr
    lines = [line for line in (dry.stdout + dry.stderr).splitlines() if "--trial" in line]
    assert len(lines) == 3
    assert all("results/tuning/seqkd/" in line and "--data results/data/json.seqkd " in line for line in lines)


def test_trials_of_text_that_the_student_writes_have_the_teacher_read_it(finished: Path) -> None:
    def change(experiment: dict) -> None:
        experiment["arms"]["gkd"] = {"pipeline": "onpolicy", "on_policy": "gkd"}
        experiment["tune"]["arms"].append("gkd")
        experiment["tune"]["grids"]["method.on_policy.share"] = [0.25, 0.5]

    write_experiment(finished, tuned(change))
    dry = snakemake_in(finished, "--dry-run", "--printshellcmds")
    assert dry.returncode == 0, dry.stderr
    lines = [line for line in (dry.stdout + dry.stderr).splitlines() if "entkd distill" in line]
    teacher = " --teacher results/teachers/smollm2-135m-instruct "
    trials = [line for line in lines if "--trial" in line]
    assert {("/gkd/" in line, teacher in line) for line in trials} == {(True, True)}
    assert len(trials) == 3
    runs = [line for line in lines if "--trial" not in line and "/gkd/" in line]
    assert len(runs) == 2
    assert all("--patches results/tuning/gkd.json " in line and teacher in line for line in runs)


def test_a_pipeline_that_cannot_be_tried_is_refused(finished: Path) -> None:
    rules = finished / "workflow/rules/baselines/seqkd.smk"
    text = rules.read_text(encoding="utf-8")
    rules.write_text(text.replace('training_data["seqkd"] = "<data>.seqkd"', ""), encoding="utf-8")
    try:
        for change, message in (
            (
                tuned(lambda e: e["tune"].update(arms="all")),
                "arm `seqkd` has the pipeline `seqkd`, which has no trials",
            ),
            (lambda e: e.update(training={"budget": {"seconds": 9}}), "the pipeline `seqkd`, which is not timed"),
        ):
            write_experiment(finished, change)
            run = snakemake_in(finished, "--dry-run")
            assert run.returncode == 1
            assert message in run.stderr + run.stdout
    finally:
        rules.write_text(text, encoding="utf-8")


def test_pipelines_with_trials_take_what_is_chosen() -> None:
    """A rules file that lets its arms be tuned and forgets to hand on the choice would train them as written."""
    found = [file for file in (ROOT / "workflow/rules").rglob("*.smk") if "training_data[" in file.read_text()]
    assert len(found) > 1
    for file in found:
        assert file.name == "common.smk" or "patches=patches_of_arm," in file.read_text(), file


def test_a_budget_of_seconds_is_measured_once_for_each_arm(tmp_path: Path) -> None:
    copy_workflow(tmp_path)

    def change(experiment: dict) -> None:
        experiment["training"] = {"budget": {"seconds": 9}}

    write_experiment(tmp_path, tuned(change))
    run = snakemake_in(tmp_path)
    assert run.returncode == 0, run.stderr
    timed = calls_of(tmp_path, "calibrate")
    assert sorted(call[call.index("--output") + 1] for call in timed) == [
        f"results/budget/{arm}.json" for arm in ("full", "kd", "seqkd")
    ]
    for call in calls_of(tmp_path, "distill"):
        arm = call[-1].split("/")[2]
        patches = call[call.index("--patches") + 1 : call.index("--seed")]
        chosen = [f"results/tuning/{arm}.json"] if arm != "seqkd" and "--trial" not in call else []
        assert patches == [f"results/budget/{arm}.json", *chosen]
    assert would_run(tmp_path) == (Counter(), Counter())
    more = rerun(tmp_path, tuned(lambda e: (change(e), e["seeds"].append(2))))
    assert (more["calibrate"], more["trial"], more["distill"]) == (0, 0, 2)

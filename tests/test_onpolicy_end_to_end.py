"""GKD and DistiLLM through the real workflow: from a random teacher to the table, in the folder of ``tests/tiny``."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from tiny_experiment import copy_experiment, run

ON_POLICY = {"pipeline": "onpolicy", "divergence": "skew_kl"}
ARMS = {
    "kd": {},
    "gkd": ON_POLICY | {"on_policy": {"name": "gkd", "max_response_tokens": 16}},
    "distillm": ON_POLICY
    | {"curriculum": {}, "temperature": {}, "features": {"points": 2}}
    | {"on_policy": {"name": "distillm", "share": 0.6, "capacity": 12, "max_response_tokens": 16}},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """The folder after the whole workflow."""
    folder = tmp_path_factory.mktemp("onpolicy")
    tune = {"trials": 2, "arms": ["gkd"], "grids": {"method.on_policy.share": [0.4, 0.6]}}
    copy_experiment(folder, tiny_teacher, {"arms": ARMS, "seeds": [0], "tune": tune})
    run(folder)
    return folder


def test_table_and_ledger(finished: Path) -> None:
    table = pd.read_csv(finished / "results/tiny/ablation_table.csv")
    assert set(table["arm"]) == {*ARMS, "teacher", "untrained"}
    runs = pd.read_csv(finished / "results/tiny/runs.csv").set_index("arm")
    assert (runs.loc[["gkd", "distillm"], ["generated_tokens", "teacher_tokens_online"]] > 0).all(axis=None)
    assert (runs.loc["kd", ["generated_tokens", "teacher_tokens_online"]] == 0).all()
    assert runs["teacher_tokens"].nunique() == 1  # the stored pass is one and the same
    shown = (finished / "results/tiny/ablation_table.md").read_text(encoding="utf-8")
    read = int(runs.loc["gkd", "teacher_tokens_online"])
    assert f"The teacher ran again for gkd: on average it read {read:,} tokens a run" in shown
    record = json.loads((finished / "results/tiny/students/gkd/seed0/run.json").read_text(encoding="utf-8"))
    assert 0 < record["on_policy_steps"] < 6


def test_trials_write_text_and_the_student_has_the_chosen_share(finished: Path) -> None:
    trials = pd.read_csv(finished / "results/tiny/tuning.csv")
    assert list(trials["arm"]) == ["gkd", "gkd"]
    records = [json.loads(file.read_text()) for file in (finished / "results/tiny/tuning/gkd").rglob("run.json")]
    assert {record["arm"]["method"]["on_policy"]["share"] for record in records} == {0.4, 0.6}
    assert all(record["generated_tokens"] > 0 for record in records)
    best = min(records, key=lambda record: record["dev_nll"])
    final = json.loads((finished / "results/tiny/students/gkd/seed0/run.json").read_text(encoding="utf-8"))
    assert final["arm"]["method"]["on_policy"]["share"] == best["arm"]["method"]["on_policy"]["share"]


def test_second_call_does_nothing(finished: Path) -> None:
    assert "Nothing to be done" in run(finished)

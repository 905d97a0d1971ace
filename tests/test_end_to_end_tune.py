"""A tuned experiment under a budget of seconds, really run: from the timing of steps to the table's notes."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from tiny_experiment import copy_experiment, run

CHANGES = {
    "training": {
        "budget": {"seconds": 0.3}, "block": 128, "blocks_per_step": 2, "micro_blocks": 1, "eval_every": 500,
        "precision": "fp32", "clip": None,
    },
    "arms": {"sft": {"divergence": None, "ce": {}}, "kd": {}, "full": {"temperature": {}, "features": {"points": 2}}},
    "tune": {
        "trials": 2,
        "arms": ["kd", "full"],
        # The second wrecks any student: a trial like every other.
        "grids": {"training.lr": [3e-3, 1e3], "method.temperature.c": [-0.25, 0.25]},
    },
    "seeds": [3],
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    copy_experiment(folder, tiny_teacher, CHANGES)
    run(folder)
    return folder / "results/tiny"


def record(path: Path) -> dict:
    return json.loads((path / "run.json").read_text(encoding="utf-8"))


def test_arms_are_trained_at_the_best_of_their_trials(finished: Path) -> None:
    tuning = pd.read_csv(finished / "tuning.csv")
    assert tuning.groupby("arm").size().to_dict() == {"kd": 2, "full": 2}
    for arm, own in tuning.groupby("arm"):
        best = own.sort_values("dev_nll").iloc[0]
        assert own[own["chosen"]]["trial"].tolist() == [best["trial"]]
        point = json.loads(best["settings"])
        assert ("method.temperature.c" in point) == (arm == "full")
        for row in own.itertuples():
            trial = record(finished / f"tuning/{arm}/{row.folder}/seed1000")
            assert trial["arm"]["training"]["lr"] == json.loads(row.settings)["training.lr"]
            assert (trial["dev_nll"] == pytest.approx(row.dev_nll)) or trial["dev_nll"] is None
        trained = record(finished / f"students/{arm}/seed3")["arm"]
        assert trained["training"]["lr"] == point["training.lr"] == 3e-3
        if arm == "full":
            assert trained["method"]["temperature"]["c"] == point["method.temperature.c"]
    assert record(finished / "students/sft/seed3")["arm"]["training"]["lr"] == 5e-4


def test_every_run_takes_the_steps_that_were_measured_for_its_arm(finished: Path) -> None:
    for arm in CHANGES["arms"]:
        patch = json.loads((finished / f"budget/{arm}.json").read_text(encoding="utf-8"))
        steps = patch["training"]["steps"]
        assert steps > 3
        runs = [record(folder.parent) for folder in (finished / "students" / arm).glob("seed*/run.json")]
        runs += [record(folder.parent) for folder in (finished / "tuning" / arm).glob("*/seed*/run.json")]
        assert {one["steps"] for one in runs} == {steps}
        assert len(runs) == (1 if arm == "sft" else 3)


def test_the_table_says_what_was_tuned(finished: Path) -> None:
    text = (finished / "ablation_table.md").read_text(encoding="utf-8")
    assert "Tuned: kd, full, each with 2 trials" in text
    assert "; sft had none and trained as written." in text
    assert "Every run had a budget of 0.3 seconds" in text
    c = json.loads((finished / "tuning/full.json").read_text(encoding="utf-8"))["method"]["temperature"]["c"]
    table = pd.read_csv(finished / "ablation_table.csv", keep_default_na=False)
    assert set(table[table["arm"] == "full"]["temperature"]) == {f"c={c:g}"}

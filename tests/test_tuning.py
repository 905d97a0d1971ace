"""The choice among trials: by dev NLL alone, with every trial on record."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from fake_results import fake_results

from entkd.errors import UserError
from entkd.tables import make_tables
from entkd.tuning import choose, collect_tuning

POINTS = {
    "dd": {"training.lr": 1e-3, "method.temperature.c": 0.5},
    "bb": {"training.lr": 2e-3, "method.temperature.c": -0.5},
    "cc": {"training.lr": 4e-3, "method.temperature.c": 0.5},
}


def asked_for(points: dict[str, dict]) -> dict:
    """The settings of a choice, as the command line hands them over: as JSON with sorted keys."""
    trials = {"trials": [{"name": name, "point": point} for name, point in points.items()]}
    return json.loads(json.dumps(trials, sort_keys=True))


def records(folder: Path, nlls: dict[str, float | None]) -> list[Path]:
    """The records of trials; what a test split would say of them must be of no importance, so it is not there."""
    paths = []
    for name, nll in nlls.items():
        path = folder / name / "seed1000" / "run.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"dev_nll": nll, "steps": 3, "seconds": 2.5, "tflops": 0.25}), encoding="utf-8")
        paths.append(path)
    return paths


def chosen(folder: Path, nlls: dict[str, float | None]) -> tuple[dict, pd.DataFrame]:
    runs = records(folder, nlls)
    choose("kd", asked_for(POINTS), runs, folder / "kd.json", folder / "kd.csv")
    return json.loads((folder / "kd.json").read_text(encoding="utf-8")), pd.read_csv(folder / "kd.csv")


def test_lowest_dev_loss_becomes_the_patch_and_all_trials_are_recorded(tmp_path: Path) -> None:
    patch, table = chosen(tmp_path, {"cc": 3.2, "bb": 3.1, "dd": 3.3})
    assert patch == {"training": {"lr": 2e-3}, "method": {"temperature": {"c": -0.5}}}
    assert table["folder"].tolist() == ["dd", "bb", "cc"]  # in the order in which they were drawn
    assert table["trial"].tolist() == [1, 2, 3]
    assert table["chosen"].tolist() == [False, True, False]
    assert table["dev_nll"].tolist() == [3.3, 3.1, 3.2]
    assert [json.loads(text) for text in table["settings"]] == list(POINTS.values())


def test_a_trial_that_diverged_is_recorded_and_not_chosen(tmp_path: Path) -> None:
    patch, table = chosen(tmp_path, {"dd": None, "bb": 3.3, "cc": 3.3})
    assert patch["training"]["lr"] == 2e-3  # of two that are equal the first
    assert table["dev_nll"].isna().tolist() == [True, False, False]


def test_no_choice_without_a_finite_loss_or_with_other_trials(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"arm kd: none of its 3 trials has a finite dev loss; lower tune\.grids"):
        chosen(tmp_path / "none", dict.fromkeys(POINTS, None))
    with pytest.raises(UserError, match="arm kd: trial cc has no record or is not asked for"):
        chosen(tmp_path / "few", {"dd": 3.0, "bb": 3.1})


def test_trials_of_all_arms_in_one_table(tmp_path: Path) -> None:
    runs = records(tmp_path / "runs", {"dd": 3.0, "bb": 3.1, "cc": 3.2})
    for arm in ("kd", "full"):
        choose(arm, asked_for(POINTS), runs, tmp_path / f"{arm}.json", tmp_path / f"{arm}.csv")
    collect_tuning([tmp_path / "kd.csv", tmp_path / "full.csv"], tmp_path / "tuning.csv")
    table = pd.read_csv(tmp_path / "tuning.csv")
    assert table.groupby("arm", sort=False).size().to_dict() == {"kd": 3, "full": 3}
    assert table.groupby("arm")["chosen"].sum().to_dict() == {"kd": 1, "full": 1}


def test_the_table_tells_who_was_tuned_what_it_cost_and_what_was_spent(tmp_path: Path) -> None:
    settings = fake_results(tmp_path, n_items=6)
    runs = records(tmp_path / "runs", {"dd": 3.0, "bb": 2.9, "cc": 3.2})
    choose("temperature", asked_for(POINTS), runs, tmp_path / "t.json", tmp_path / "t.csv")
    lr = {name: {"training.lr": point["training.lr"]} for name, point in POINTS.items()}
    choose("kd", asked_for(lr), runs, tmp_path / "k.json", tmp_path / "k.csv")
    collect_tuning([tmp_path / "k.csv", tmp_path / "t.csv"], tmp_path / "tuning.csv")
    arm = {"name": "temperature", "role": "factorial", "pipeline": "distill"}
    arms = {
        "kd": arm | {"name": "kd", "method": {"divergence": {"name": "forward_kl"}}},
        "temperature": arm | {"method": {"divergence": {"name": "forward_kl"}, "temperature": {}}},
    }
    settings |= {"budget": "7 TFLOPs", "tune": {"arms": arms, "training": {"steps": 3}}}
    outputs = [tmp_path / name for name in ("table.csv", "table.md", "table.tex", "effects.csv")]
    inputs = [tmp_path / name for name in ("scores.csv", "items.parquet", "runs.csv")]
    make_tables(settings, *inputs, *outputs, tuning=tmp_path / "tuning.csv")
    text = outputs[1].read_text(encoding="utf-8")
    assert (
        "Tuned: kd, temperature, each with 3 trials, chosen by the lowest NLL of the dev split, never by test" in text
    )
    assert "sft, seqkd, curriculum, features," in text.partition("never by test; ")[2].partition("had none")[0]
    assert "cost 1.5 TFLOPs, 15 seconds in all" in text  # 2 arms × 3 trials × (0.25 TFLOPs, 2.5 s)
    assert "Chosen: kd: lr 0.002; temperature: temperature.c -0.5, lr 0.002." in text
    assert "Every run had a budget of 7 TFLOPs and took as many whole steps as fit into it." in text
    assert "No tuning.csv was given" not in text
    table = pd.read_csv(outputs[0], keep_default_na=False)
    shown = table.drop_duplicates("arm").set_index("arm")["temperature"]
    assert (shown["temperature"], shown["full"]) == ("c=-0.5", "c=0.5")


def test_a_table_without_the_trials_says_that_the_choice_is_not_known(tmp_path: Path) -> None:
    settings = fake_results(tmp_path, n_items=6)
    outputs = [tmp_path / name for name in ("table.csv", "table.md", "table.tex", "effects.csv")]
    inputs = [tmp_path / name for name in ("scores.csv", "items.parquet", "runs.csv")]
    note = "No tuning.csv was given, so what was chosen for them is not known here"
    make_tables(settings, *inputs, *outputs)
    assert note not in outputs[1].read_text(encoding="utf-8")
    make_tables(settings | {"tune": {"arms": {"kd": {}, "full": {}}, "training": {}}}, *inputs, *outputs)
    for path in outputs[1:3]:
        assert f"Tuned: kd, full. {note}: their settings in this table are those as written" in path.read_text()

"""Names that pandas takes for missing values or numbers, through every file that is read again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pytest
from fake_results import fake_results
from test_collect import write_run, write_scores
from test_tables import ORDER, tables

from entkd.collect import collect_runs, collect_scores
from entkd.figures import make_figures
from entkd.frames import read_csv
from entkd.tuning import chosen_points, collect_tuning

ODD = {"sft": "nan", "seqkd": "null", "reverse_kl": "1", "reverse_kl_full": "1e5"}


def test_names_are_text_and_numbers_may_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("arm,seed,task,value,note,folder\nnan,0,null,,nan,007\n007,1,,nan,b,nan\n,2,NA,1.5,,1e3\n")
    frame = read_csv(path, text=("folder",))
    assert frame["arm"].to_list() == ["nan", "007", ""]
    assert frame["task"].to_list() == ["null", "", "NA"]
    assert frame["seed"].to_list() == [0, 1, 2]
    assert frame["value"].isna().to_list() == [True, True, False]
    assert frame["note"].isna().to_list() == [True, False, True]
    assert frame["folder"].to_list()[0] == "007"


def test_arms_of_any_name_keep_their_scores_and_runs(tmp_path: Path) -> None:
    names = list(ODD.values())
    files = [write_scores(tmp_path, arm) for arm in names]
    collect_scores(files, tmp_path / "scores.csv", tmp_path / "items.parquet")
    assert read_csv(tmp_path / "scores.csv")["arm"].to_list() == names
    assert pd.read_parquet(tmp_path / "items.parquet")["arm"].unique().tolist() == names
    runs = [write_run(tmp_path / "runs", arm) for arm in names]
    collect_runs(runs, tmp_path / "runs.csv", tmp_path / "curves.csv")
    for written in ("runs.csv", "curves.csv"):
        assert read_csv(tmp_path / written)["arm"].unique().tolist() == names


def test_trials_of_arms_of_any_name_are_kept(tmp_path: Path) -> None:
    row = {"trial": 1, "settings": json.dumps({"training.lr": 0.1}), "dev_nll": math.nan, "chosen": True, "folder": "x"}
    for arm in ODD.values():
        pd.DataFrame([{"arm": arm} | row]).to_csv(tmp_path / f"{arm}.csv", index=False)
    collect_tuning([tmp_path / f"{arm}.csv" for arm in ODD.values()], tmp_path / "tuning.csv")
    assert set(chosen_points(read_csv(tmp_path / "tuning.csv"))) == set(ODD.values())


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """Fake results with arms of odd names."""
    folder = tmp_path_factory.mktemp("odd")
    settings = fake_results(folder, n_items=6)
    for arm in settings["arms"]:
        arm["name"] = ODD.get(arm["name"], arm["name"])
    for name in ("scores.csv", "runs.csv", "curves.csv"):
        frame = read_csv(folder / name)
        frame.assign(arm=frame["arm"].replace(ODD)).to_csv(folder / name, index=False)
    items = pd.read_parquet(folder / "items.parquet")
    items.assign(arm=items["arm"].replace(ODD)).to_parquet(folder / "items.parquet", index=False)
    settings["tasks"] = [task for task in settings["tasks"] if task["metric"] in ("kl", "rougeL")]
    return folder, settings


def test_arms_of_any_name_are_in_the_table(odd: tuple[Path, dict]) -> None:
    folder, settings = odd
    tables(folder, settings)
    table = read_csv(folder / "out" / "ablation_table.csv")
    assert table["arm"].unique().tolist() == [ODD.get(name, name) for name in ORDER]
    for name in ODD.values():
        rows = table[(table["arm"] == name) & (table["metric"] != "ratio")]
        assert rows[["mean", "delta", "p_holm", "tflops"]].notna().all(axis=None)


def test_arms_of_any_name_are_in_the_figures(odd: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, settings = odd
    tables(folder, settings)
    given = {}
    monkeypatch.setattr(
        "entkd.figures._draw", lambda output, name, function, arguments: given.update({name: arguments})
    )
    files = [folder / "out" / "ablation_table.csv", folder / "out" / "effects.csv", folder / "runs.csv"]
    make_figures(settings, folder / "scores.csv", *files, folder / "curves.csv", None, folder)
    study, curves, costs = given["curves"]
    for frame in (study.scores, study.table, curves, costs):
        assert set(ODD.values()) <= set(frame["arm"])

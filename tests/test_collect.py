"""Collection of single results into tables."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from entkd.collect import CURVE_COLUMNS, RUN_COLUMNS, collect_runs, collect_scores
from entkd.errors import UserError


def write_scores(folder, arm="kd", seed=0, version="1.0", value=0.5):
    path = folder / arm / f"seed{seed}" / "demo.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    key = {"arm": arm, "seed": seed, "suite": "demo", "task": "t", "metric": "acc"}
    pd.DataFrame([key | {"value": value, "stderr": 0.1, "n": 2, "task_version": version}]).to_csv(path, index=False)
    items = [key | {"item": str(i), "value": value} for i in range(2)]
    pd.DataFrame(items).to_parquet(path.with_suffix(".items.parquet"), index=False)
    return path


def write_run(folder, arm="kd", seed=0, recorded=None):
    run = folder / arm / f"seed{seed}"
    run.mkdir(parents=True)
    record = dict.fromkeys(RUN_COLUMNS[2:], 1) | {"seed": seed if recorded is None else recorded, "device": "cpu"}
    (run / "run.json").write_text(json.dumps(record | {"arm": {"method": {}}, "git_sha": "x"}))
    rows = [{"step": 1, "seconds": 2.0, "loss": 3.0, "lr": 0.1}, {"step": 1, "dev_nll": 4.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_scores_and_items_of_all_files(tmp_path):
    files = [write_scores(tmp_path, arm, seed, value=seed / 7) for arm in ("kd", "1.5") for seed in (0, 1)]
    collect_scores(files, tmp_path / "out" / "scores.csv", tmp_path / "out" / "items.parquet")
    scores = pd.read_csv(tmp_path / "out" / "scores.csv", dtype={"arm": str, "task_version": str})
    items = pd.read_parquet(tmp_path / "out" / "items.parquet")
    assert list(scores["arm"]) == ["kd", "kd", "1.5", "1.5"]
    assert list(scores["value"]) == [0, 1 / 7, 0, 1 / 7]
    assert set(scores["task_version"]) == {"1.0"}
    assert len(items) == 8
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["items.parquet", "scores.csv"]


def test_a_result_that_occurs_twice_is_refused(tmp_path):
    path = write_scores(tmp_path)
    with pytest.raises(UserError, match="1 results occur twice, the first is arm kd, seed 0"):
        collect_scores([path, path], tmp_path / "scores.csv", tmp_path / "items.parquet")


def test_versions_of_a_task_do_not_mix(tmp_path):
    files = [write_scores(tmp_path, "a", version="1.0"), write_scores(tmp_path, "b", version="2.0")]
    with pytest.raises(UserError, match=r"demo/t: scored in versions 1.0 \(e.g. arm a\), 2.0 \(e.g. arm b\)"):
        collect_scores(files, tmp_path / "scores.csv", tmp_path / "items.parquet")


def test_other_files_are_refused(tmp_path):
    path = write_scores(tmp_path)
    with pytest.raises(UserError, match="not a score file"):
        collect_scores([path, tmp_path / "x.parquet"], tmp_path / "scores.csv", tmp_path / "items.parquet")


@pytest.mark.parametrize("name", ["", "run.json"])
def test_runs_and_curves(tmp_path, name):
    folders = [write_run(tmp_path, arm, seed) / name for arm in ("kd", "full") for seed in (0, 1)]
    collect_runs(folders, tmp_path / "runs.csv", tmp_path / "curves.csv")
    runs, curves = pd.read_csv(tmp_path / "runs.csv"), pd.read_csv(tmp_path / "curves.csv")
    assert list(runs) == RUN_COLUMNS
    assert list(curves) == CURVE_COLUMNS
    assert list(zip(runs["arm"], runs["seed"], strict=True)) == [("kd", 0), ("kd", 1), ("full", 0), ("full", 1)]
    first = curves.query("arm == 'kd' and seed == 0")
    assert dict(zip(first["metric"], first["value"], strict=True)) == {"loss": 3.0, "lr": 0.1, "dev_nll": 4.0}
    assert first["seconds"].tolist()[:2] == [2.0, 2.0]
    assert first["seconds"].isna().tolist() == [False, False, True]


def test_runs_from_before_there_was_student_text_count_none(tmp_path):
    folder = write_run(tmp_path)
    record = json.loads((folder / "run.json").read_text())
    del record["generated_tokens"], record["teacher_tokens_online"]
    (folder / "run.json").write_text(json.dumps(record))
    collect_runs([folder], tmp_path / "runs.csv", tmp_path / "curves.csv")
    assert pd.read_csv(tmp_path / "runs.csv")[["generated_tokens", "teacher_tokens_online"]].values.tolist() == [[0, 0]]


def test_a_run_in_the_wrong_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="made with seed 7, but its folder is seed0"):
        collect_runs([write_run(tmp_path, recorded=7)], tmp_path / "runs.csv", tmp_path / "curves.csv")

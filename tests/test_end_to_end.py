"""Every stage, really run: from a random teacher and 72 rows of text to table and figures."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from tiny_experiment import copy_experiment, run
from transformers import AutoModelForCausalLM, AutoTokenizer

FACTORIAL = ["kd", "curriculum", "temperature", "curriculum_temperature"]
ARMS = ["sft", "seqkd", *FACTORIAL, "full"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """The folder after `snakemake results/tiny/ablation_table.csv` and the figures."""
    folder = tmp_path_factory.mktemp("end_to_end")
    copy_experiment(folder, tiny_teacher)
    run(folder)
    return folder


def test_table_has_every_arm_and_task(finished: Path) -> None:
    table = pd.read_csv(finished / "results/tiny/ablation_table.csv")
    tasks = {"entkd_heldout", "entkd_rouge", "entkd_fidelity", "gap_closed"}
    assert set(table["arm"]) == {*ARMS, "teacher", "untrained"}
    assert set(table["task"]) == tasks
    students = table[table["arm"].isin(ARMS) & (table["task"] == "entkd_heldout")]
    assert (students["n"] == 2).all()
    assert students["mean"].notna().all()
    assert (students[["tokens", "seconds", "tflops", "peak_gib"]] > 0).all(axis=None)
    effects = pd.read_csv(finished / "results/tiny/effects.csv")
    assert {"curriculum", "temperature", "curriculum:temperature"} <= set(effects["effect"])
    assert r"\toprule" in (finished / "results/tiny/ablation_table.tex").read_text(encoding="utf-8")


def test_students_are_paired_by_seed_and_differ_by_arm(finished: Path) -> None:
    records = {
        (arm, seed): json.loads((finished / f"results/tiny/students/{arm}/seed{seed}/run.json").read_text())
        for arm in ARMS
        for seed in (0, 1)
    }
    for seed in (0, 1):  # the same documents in the same order; seqkd has the same prompts but other responses
        assert len({records[arm, seed]["positions"] for arm in ARMS if arm != "seqkd"}) == 1
    hashes = [record["weights_sha256"] for record in records.values()]
    assert len(set(hashes)) == len(hashes)  # no arm silently trains what another one trains
    # The teacher ran once: every arm that reads its signals reports the same pass over the data.
    assert len({record["teacher_tokens"] for (arm, _), record in records.items() if arm not in ("sft", "seqkd")}) == 1
    assert records["sft", 0]["teacher_tokens"] == 0


def test_a_job_that_loads_everything_itself_trains_the_same_student(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs are forked from a process that has the libraries loaded: that must not change a bit."""
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder, symlinks=True)
    record = folder / "results/tiny/students/full/seed0/run.json"
    before = json.loads(record.read_text(encoding="utf-8"))
    record.unlink()
    monkeypatch.setenv("ENTKD_PRELOADED", "0")
    run(folder, str(record.relative_to(folder)))
    after = json.loads(record.read_text(encoding="utf-8"))
    assert after["started"] != before["started"]
    assert after["weights_sha256"] == before["weights_sha256"]


def test_held_out_score_of_the_teacher_is_its_own_likelihood(finished: Path) -> None:
    """Bits per byte of the test responses, from the plain model: nothing was lost between data and table."""
    folder = finished / "results/tiny"
    model = AutoModelForCausalLM.from_pretrained(finished / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(finished / "teacher")
    nats = size = 0.0
    for line in (folder / "data/rows/test.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt, response = (
            tokenizer(row[key], add_special_tokens=False)["input_ids"] for key in ("prompt", "response")
        )
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            logprob = torch.log_softmax(model(ids).logits[0].double(), -1)
        nats -= sum(logprob[i - 1, ids[0, i]].item() for i in range(len(prompt), ids.shape[1]))
        size += len(row["response"].encode())
    scores = pd.read_csv(folder / "scores.csv")
    value = scores[(scores["arm"] == "teacher") & (scores["metric"] == "bits_per_byte")]["value"].item()
    assert value == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    fidelity = scores[(scores["arm"] == "teacher") & (scores["task"] == "entkd_fidelity") & (scores["metric"] == "kl")]
    assert abs(fidelity["value"].item()) < 1e-3  # the teacher against itself: the rounding of the stored states


def test_figures_are_written_in_three_formats(finished: Path) -> None:
    written = sorted(path.name for path in (finished / "results/tiny/figures").iterdir())
    names = ("cost", "curves", "effects", "entropy", "forest", "tasks")
    assert written == sorted(f"{name}.{ending}" for name in names for ending in ("pdf", "png", "svg"))


def test_second_call_does_nothing_and_a_new_arm_trains_only_itself(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder, symlinks=True)
    assert "Nothing to be done" in run(folder)
    path = folder / "config/config.yaml"
    experiment = yaml.safe_load(path.read_text(encoding="utf-8"))
    experiment["arms"]["jsd"] = {"divergence": {"name": "jsd", "beta": 0.3}}
    # a control that asks the untrained student, from which each of its runs starts
    experiment["arms"]["initial_kl"] = {
        "role": "control", "curriculum": {}, "temperature": {}, "difficulty": {"source": "initial_kl"}
    }  # fmt: skip
    path.write_text(yaml.safe_dump(experiment, sort_keys=False), encoding="utf-8")
    printed = run(folder)
    assert printed.count("rule distill:") == printed.count("rule score:") == 4  # two arms, two seeds
    table = pd.read_csv(folder / "results/tiny/ablation_table.csv")
    assert {"jsd", "initial_kl"} < set(table["arm"])
    log = (folder / "results/tiny/logs/distill.initial_kl.seed0.log").read_text(encoding="utf-8")
    assert "difficulty by initial_kl" in log

"""Every method and every divergence through the real workflow, in the folder of ``tests/tiny``, to the table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from evidence import ROWS
from methods.cases import CASES
from tiny_experiment import ROOT, copy_experiment, run

from entkd.config import DIVERGENCE_NAMES

pytestmark = pytest.mark.slow

FULL = {"curriculum": {}, "temperature": {}, "features": {"points": 2}}  # the tiny teacher has no three
FOCUSING = {"focusing": {"warmup": 0.2, "tolerance": 0.001, "decay": 0.2}}
TEXT = {"max_response_tokens": 16}
DISTILLM = {"name": "distillm", "share": 0.6, "capacity": 12} | TEXT
ON_POLICY = {"pipeline": "onpolicy", "divergence": "skew_kl"}
CASES_ALONE = {name: {"divergence": case.divergence, "approach": case.approach} for name, case in CASES.items()}
CHANGED = {
    "full": FULL,
    # States that move within six steps: by the defaults, LATF would keep all tokens and TAID be at its line.
    **{
        name: CASES_ALONE[name] | {"approach": CASES[name].approach | further}
        for names, further in (
            (("adakd", "adakd_forward", "adakd_release", "adakd_latf"), FOCUSING),
            (("taid", "taid_paper"), {"alpha": 0.5}),
        )
        for name in names
    },
    "gkd": {"pipeline": "onpolicy", "divergence": "jsd", "on_policy": {"name": "gkd"} | TEXT},
    "distillm": ON_POLICY | {"on_policy": DISTILLM},
    "distillm_paper": ON_POLICY | {"on_policy": DISTILLM | {"variant": "paper"}},
}
BASELINES = yaml.safe_load((ROOT / "config/experiments/baselines.yaml").read_text(encoding="utf-8"))["arms"]
DIVERGENCES = {
    name + suffix: {"divergence": name} | components
    for name in DIVERGENCE_NAMES[1:]
    for suffix, components in (("", {}), ("_full", FULL))
}
ARMS = CASES_ALONE | DIVERGENCES | BASELINES | CHANGED
NAMES = {"forward_kl": "kd", "forward_kl_full": "full"}
"""Rows of the page of evidence whose arm has another name."""
TASKS = ("entkd_heldout", "entkd_rouge", "entkd_fidelity", "gap_closed")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """The folder after the whole workflow: table, scores, students."""
    folder = tmp_path_factory.mktemp("every_arm")
    copy_experiment(folder, tiny_teacher, {"arms": ARMS, "seeds": [0]})
    run(folder, "results/tiny/ablation_table.csv")
    return folder / "results/tiny"


@pytest.fixture(scope="module")
def weights(finished: Path) -> dict[str, str]:
    records = {arm: finished / f"students/{arm}/seed0/run.json" for arm in ARMS}
    return {arm: json.loads(path.read_text(encoding="utf-8"))["weights_sha256"] for arm, path in records.items()}


def test_every_row_has_an_arm(finished: Path) -> None:
    table = pd.read_csv(finished / "ablation_table.csv")
    assert set(table["arm"]) == {*ARMS, "teacher", "untrained"}
    assert {NAMES.get(row, row) for row in ROWS} == set(ARMS) - {"kd_t2"}


@pytest.mark.parametrize("row", ROWS)
def test_it_is_in_the_table_with_weights_of_its_own(
    finished: Path, weights: dict[str, str], row: str, evidence
) -> None:
    arm = NAMES.get(row, row)
    table = pd.read_csv(finished / "ablation_table.csv").set_index(["arm", "task"]).loc[arm]
    assert set(table.index) == set(TASKS)
    assert (table["n"] == 1).all()
    assert np.isfinite(table.loc[["entkd_heldout", "entkd_rouge", "entkd_fidelity"], "mean"]).all()
    assert (table[["tokens", "seconds", "tflops", "peak_gib"]] > 0).all(axis=None)
    # no arm silently trains what another one trains
    assert [other for other in ARMS if weights[other] == weights[arm]] == [arm]
    evidence(row, "tiny", "yes")


def test_methods_with_a_schedule_wrote_text(finished: Path) -> None:
    for arm in ("gkd", "distillm", "distillm_paper"):
        record = json.loads((finished / f"students/{arm}/seed0/run.json").read_text(encoding="utf-8"))
        assert 0 < record["on_policy_steps"] < 6
        assert record["generated_tokens"] > 0

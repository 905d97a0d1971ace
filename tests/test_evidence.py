"""The page of evidence is in step with the code and the tests, and a cell that nobody fills fails the run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
from evidence import COLUMNS, METHODS, NO_ARMS, ROWS, Collector
from methods import test_bases as bases
from methods import test_formulas as formulas
from methods.cases import CASES
from test_student_text_schedules import GOLDEN as SCHEDULES

from entkd.config import DIVERGENCE_NAMES, Method, load_experiment
from entkd.config.method import OnPolicy
from entkd.methods import APPROACHES

ROOT = Path(__file__).parents[1]
REMEDY = "complete ROWS in tests/evidence.py and run `make evidence`"


def cells(page: Path) -> dict[str, dict[str, str]]:
    """Row → column → text."""
    lines = [line.strip("| ").split(" | ") for line in page.read_text(encoding="utf-8").splitlines() if "| `" in line]
    return {row.strip("`"): dict(zip(COLUMNS, values, strict=True)) for row, *values in lines}


def test_every_method_and_every_divergence_has_a_full_row() -> None:
    found = cells(ROOT / "docs/evidence.md")
    on_policy = {settings.model_fields["name"].default for settings in get_args(get_args(OnPolicy)[0])}
    assert {*APPROACHES, *on_policy, *DIVERGENCE_NAMES, *(f"{name}_full" for name in DIVERGENCE_NAMES)} <= set(found), (
        REMEDY
    )
    assert tuple(found) == ROWS, REMEDY
    assert all(value.strip() for row in found.values() for value in row.values())


def test_rows_are_the_arms_of_the_baselines() -> None:
    """With their divergence and their approach: a golden value on another base would be that of another arm."""
    arms = load_experiment(ROOT / "config/experiments/baselines.yaml").resolved_arms
    lacking = (
        "give it an arm of its name in config/experiments/baselines.yaml, or an entry in NO_ARMS of tests/evidence.py"
    )
    assert set(METHODS) - set(arms) == set(NO_ARMS), lacking
    assert set(arms) - set(ROWS) == {"kd_t2", "full"}, REMEDY  # no row, and the row forward_kl_full
    approaches = {name for name, arm in arms.items() if arm.method.approach is not None}
    assert approaches <= set(CASES)
    for name, case in CASES.items():
        method = Method.model_validate({"divergence": case.divergence, "approach": case.approach})
        if name in approaches:
            assert method == arms[name].method, name
        else:
            assert method.divergence == arms[name.removesuffix("_release").removesuffix("_paper")].method.divergence


def test_golden_values_are_those_of_the_tests() -> None:
    found = {row: values["golden"] for row, values in cells(ROOT / "docs/evidence.md").items()}
    expected = {}
    for (name, _), value in sorted(bases.GOLDEN.items()):  # of several versions the last one counts
        expected |= dict.fromkeys(bases.ROWS.get(name, [name]), f"{value:.12g}")
    expected |= {name: f"{value:.12g}" for (name, _), value in sorted(formulas.GOLDEN.items()) if name in CASES}
    expected |= {name: f"`{value}`" for (name, _), value in sorted(SCHEDULES.items())}
    assert found == expected, "run `make evidence`"


def test_references_import_nothing_of_the_package() -> None:
    files = list((ROOT / "tests/references").glob("*.py"))
    assert len(files) == 5
    for file in files:
        assert not re.search(r"^\s*(from|import) entkd", file.read_text(encoding="utf-8"), re.MULTILINE), file


def reported(when: str = "call", passed: bool = True, row: str = "sft", column: str = "loss", value: object = 0.5):
    return SimpleNamespace(when=when, passed=passed, user_properties=[("evidence", [row, column, value])])


@pytest.fixture
def collector(tmp_path: Path) -> Collector:
    """After a run in which every cell was reported, errors twice."""
    made = Collector(tmp_path / "page.md")
    for size in (3e-12, 2e-9, 1e-16):
        for row in ROWS:
            for column in COLUMNS:
                value = size if column in ("loss", "gradient") else "yes"
                made.pytest_runtest_logreport(reported(row=row, column=column, value=value))
    return made


def test_the_largest_error_of_passed_tests_is_written(collector: Collector) -> None:
    collector.pytest_runtest_logreport(reported(passed=False))
    collector.pytest_runtest_logreport(reported(when="teardown"))
    session = SimpleNamespace(exitstatus=0)
    collector.pytest_sessionfinish(session, 0)
    assert session.exitstatus == 0
    found = cells(collector.path)
    assert tuple(found) == ROWS
    expected = dict.fromkeys(COLUMNS, "yes") | {"loss": "2e-09", "gradient": "2e-09"}
    assert all(values == expected for values in found.values())


def test_empty_cells_are_named_and_fail_the_run(collector: Collector) -> None:
    del collector.cells["todi_full", "tiny"], collector.cells["kd", "golden"]
    session = SimpleNamespace(exitstatus=0)
    collector.pytest_sessionfinish(session, 0)
    assert session.exitstatus == 1
    assert collector.says.splitlines()[1:] == ["  kd: golden", "  todi_full: tiny"]
    assert not collector.path.exists()


def test_nothing_is_written_where_a_test_failed(collector: Collector) -> None:
    collector.pytest_sessionfinish(SimpleNamespace(exitstatus=1), 1)
    assert not collector.path.exists()


def test_a_row_that_is_not_in_the_table_is_refused(evidence) -> None:
    with pytest.raises(AssertionError, match="no row sftt"):
        evidence("sftt", "loss", 0.5)


def test_cells_arrive_from_another_process(tmp_path: Path) -> None:
    """The real option and fixture, in a run that lacks most cells."""
    test = """
from evidence import COLUMNS

def test_sft(evidence):
    for column in COLUMNS:
        evidence("sft", column, "yes")
"""
    (tmp_path / "test_it.py").write_text(test, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "evidence", "--evidence", "page.md", "-n", "1"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    assert "  kd: loss\n" in done.stdout
    assert "sft: loss" not in done.stdout
    assert not (tmp_path / "page.md").exists()

"""What the benchmarks put on docs/performance.md, and the experiments and figures behind it."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import arms, pages, scaling
from entkd.config import load_experiment
from entkd.errors import UserError

ROOT = Path(__file__).parents[1]


def test_a_table_takes_the_place_of_the_one_before() -> None:
    page = "before\n<!-- a -->\nold\n<!-- /a -->\n<!-- b -->\n<!-- /b -->\nafter"
    once = pages.fill(page, "a", "| new |\n")
    assert once == page.replace("old", "| new |")
    assert pages.fill(once, "a", "| new |\n") == once
    with pytest.raises(UserError, match="no marks <!-- c -->"):
        pages.fill(page, "c", "x")


def test_the_page_has_a_place_for_every_table_and_figure() -> None:
    page = pages.PAGE.read_text(encoding="utf-8")
    for name in ("step", "head", "profile", "scaling_head", "scaling_step", "generate", "startup", "arms"):
        pages.fill(page, name, "x")
    for figure in re.findall(r"\]\(images/(.*?)\)", page):
        assert (ROOT / "docs/images" / figure).is_file(), figure
        assert figure in {f"performance_{name}.png" for name in pages.FIGURES}


def test_numbers_of_a_csv_are_shown_with_three_digits(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("some_name,b,c\nx,0.123456,12345\n,1234.5,2\n")
    assert pages.table_of(tmp_path / "x.csv").splitlines()[0] == "| some name | b | c |"
    assert pages.table_of(tmp_path / "x.csv").splitlines()[2:] == ["| x | 0.123 | 12,345 |", "|  | 1,234 | 2 |"]


def test_a_column_with_gaps_has_its_numbers_shown_as_others(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b\n1,0.123456789\n2,\n")
    assert pages.table_of(tmp_path / "x.csv").splitlines()[2:] == ["| 1 | 0.123 |", "| 2 |  |"]


def test_the_workflow_is_asked_for_every_student_once(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def fails(command: list[str], **_options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "stopped here")

    monkeypatch.setattr(arms.subprocess, "run", fails)
    with pytest.raises(SystemExit, match="4 arms failed:\nstopped here"):
        arms.measure(ROOT / "tests/tiny/train.jsonl", 4)
    (command,) = commands
    targets = command[command.index("--") + 1 :]
    assert targets == [f"results/arms/students/{arm}/seed0/run.json" for arm in ("kd", "t0", "t1", "t2")]


@pytest.mark.parametrize("count", [1, 4, 24])
def test_experiments_have_as_many_arms_as_asked_for(count: int, tmp_path: Path) -> None:
    (tmp_path / "arms.yaml").write_text(json.dumps(arms.experiment(ROOT / "tests/tiny/train.jsonl", count)))
    experiment = load_experiment(tmp_path / "arms.yaml", {})
    assert len(experiment.arms) == count
    assert len(experiment.seeds) == 1


def test_figures_can_be_drawn(tmp_path: Path) -> None:
    rows = [{"arms": count, "teacher_tokens": 100, "teacher_tokens_without_store": 200 * count} for count in (4, 24)]
    arms.figure(rows, tmp_path / "arms")
    assert (tmp_path / "arms.png").is_file()
    head = [
        {"tokens": n, "vocabulary": v, "bound_seconds": 1.0}
        | {
            f"{who}_{what}": 2.0 if who == "entkd" or v < 1e5 else ""
            for who in ("entkd", "dense")
            for what in ("seconds", "mib")
        }
        for n, v in ((512, 49152), (1024, 49152), (512, 151936))
    ]
    step = [{"length": length, "seconds": 2.0, "bound_seconds": 1.0} for length in (64, 128)]
    assert len(scaling.figure(head, step).axes) == 4

"""The recipes of CONTRIBUTING.md: their diffs are the code's own, and their sizes those of baselines added by them.

The guide shows diffs that add what is there. `tests/recipes` holds some that add what is not, so that they can be
counted and tried.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CODE, TESTS, DOCS = ("entkd/", "workflow/"), ("tests/",), ("docs/method.md",)
REAL = ["anti_curriculum", "skew_kl", "eakd", "seqkd"]
"""What the diff of each recipe adds."""


def shown(name: str) -> str:
    """The diff that the guide shows for it: all blocks of its recipe, one after the other."""
    recipe = GUIDE.split("\n### ")[1 + REAL.index(name)]
    return "".join(re.findall(r"^```diff\n(.*?)^```", recipe, re.M | re.S))


def toy(name: str) -> str:
    return (ROOT / f"tests/recipes/{name}.diff").read_text(encoding="utf-8")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The project's files, without what was made from them."""
    for name in ("entkd", "tests", "workflow", "config", "docs", "profiles"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Snakefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def git_apply(folder: Path, diff: str, *options: str) -> None:
    outside = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}  # no repository changes the paths
    command = ["git", "apply", *options, "-"]
    run = subprocess.run(command, cwd=folder, env=outside, input=diff, text=True, capture_output=True)
    assert run.returncode == 0, (
        f"the code moved away from a diff in CONTRIBUTING.md or tests/recipes; change both:\n{run.stderr}"
    )


def python(folder: Path, *arguments: str) -> str:
    """What a module says that fails or not, run in the copy."""
    environment = os.environ | {"PYTHONPATH": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, "-m", *arguments]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return run.stdout + run.stderr


def pytest_in(folder: Path, *arguments: str) -> str:
    return python(folder, "pytest", "-v", "-p", "no:cacheprovider", *arguments)


@pytest.mark.parametrize("name", REAL)
def test_the_diff_of_a_real_one_takes_it_out_and_puts_it_back(name: str, copy: Path) -> None:
    before, diff = contents(copy), shown(name)
    git_apply(copy, diff, "--reverse")
    left = {path for path in re.findall(r"^\+\+\+ b/(\S+)$", diff, re.M) if (copy / path).exists()}
    for path in left - {"docs/method.md"}:  # whose prose may mention it elsewhere
        assert not re.search(rf"\b{name}\b", (copy / path).read_text(encoding="utf-8")), path
    for path in (path for path in left if path.endswith(".py")):
        compile((copy / path).read_text(encoding="utf-8"), path, "exec")
    git_apply(copy, diff)
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("name", "command", "refusal"),
    [
        ("skew_kl", "entkd.cli check", r"arms.skew_kl.divergence.name: unknown name `skew_kl`; .* Known: forward_kl, "),
        ("eakd", "entkd.cli check", r"arms.eakd.approach.name: unknown name `eakd`; .* Known: adakd, "),
        ("seqkd", "snakemake -n --cores 1 --config", r"arms.seqkd.pipeline: unknown name `seqkd`\. Known: distill, on"),
    ],
)
def test_without_it_an_arm_that_names_it_is_refused(name: str, command: str, refusal: str, copy: Path) -> None:
    git_apply(copy, shown(name), "--reverse")
    experiment = "config/experiments/baselines.yaml"
    module, *words = [*command.split(), experiment]
    words[-1] = f"experiment={experiment}" if module == "snakemake" else experiment
    assert re.search(refusal, python(copy, module, *words))


def size(diff: str, folders: tuple[str, ...]) -> str:
    """Places (runs of added lines) and lines that a diff adds in files of these folders, in words."""
    files = re.findall(r"^\+\+\+ b/(\S+)\n(.*?)(?=^--- |\Z)", diff, re.M | re.S)
    bodies = [body for path, body in files if path.startswith(folders)]
    places = [place for body in bodies for place in re.findall(r"(?:^\+.*\n)+", body, re.M)]
    counts = {"place": len(places), "line": sum(place.count("\n") for place in places)}
    return ", ".join(f"{count} {word}{'s' * (count > 1)}" for word, count in counts.items()) if places else ""


@pytest.mark.parametrize("name", ["hellinger", "certainty", "warm_start"])
def test_the_guide_states_the_size_of_a_new_one(name: str) -> None:
    row = next(line for line in GUIDE.splitlines() if f"(tests/recipes/{name}.diff)" in line)
    assert [cell.strip() for cell in row.split("|")[2:5]] == [
        size(toy(name), folders) for folders in (CODE, TESTS, DOCS)
    ]
    assert not re.search(r"^-(?!-- )", toy(name), re.M)  # nothing is changed or removed


def test_places_and_lines_are_counted_by_hand() -> None:
    one, other = "--- a/entkd/x.py\n+++ b/entkd/x.py\n@@ @@\n", "--- /dev/null\n+++ b/tests/y.py\n@@ @@\n+d\n"
    diff = f"{one} a\n+b\n+\n\n+c\n{other}"
    assert [size(diff, folders) for folders in (CODE, TESTS, DOCS)] == ["2 places, 3 lines", "1 place, 1 line", ""]


def test_a_pipeline_is_at_most_25_lines() -> None:
    assert int(re.search(r"(\d+) lines", size(toy("warm_start"), CODE))[1]) <= 25


def test_a_new_pipeline_trains_its_arms(copy: Path) -> None:
    git_apply(copy, toy("warm_start"))
    path = copy / "config/config.yaml"
    experiment = yaml.safe_load(path.read_text(encoding="utf-8"))
    experiment["arms"]["warm_kd"] = {"pipeline": "warm_start"}
    path.write_text(yaml.safe_dump(experiment, sort_keys=False), encoding="utf-8")
    student = "results/students/warm_kd/seed1/run.json"
    job = python(copy, "snakemake", "-n", "--cores", "1", student).partition("rule warm_start:")[2]
    assert job.split()[:2] == ["input:", "results/students/sft/seed1/run.json,"]
    assert student in job.partition("output:")[2]


DIVERGENCES = [
    "tests/test_divergences.py",
    "tests/methods/test_bases.py",
    "tests/test_kernels.py",
    "tests/test_fused.py",
    "tests/test_limits.py",
]
METHODS = ["tests/methods/test_formulas.py", "tests/distill/test_approaches.py", "tests/test_references.py"]


@pytest.mark.slow
def test_a_new_divergence_and_a_new_method_pass_the_tests(copy: Path) -> None:
    """By the definition, in tiles, in a `Method` and in the loop; with another formula they do not."""
    for name in ("hellinger", "certainty"):
        git_apply(copy, toy(name))
    python(copy, "entkd.cli", "config-docs", "--output", "config")
    said = pytest_in(
        copy,
        *DIVERGENCES,
        *METHODS,
        "tests/test_config_docs.py",
        "tests/test_readme.py::test_the_method_names_everything_that_can_be_set",
    )
    assert " failed" not in said, said[-3000:]
    for test in (
        "test_divergences.py::test_value_and_gradient[1.0-hellinger-",
        "test_divergences.py::test_golden_values[hellinger]",
        "test_bases.py::test_golden_values[hellinger_full]",
        "test_fused.py::test_value_and_gradients_follow_the_definition[dtype0-1e-05-hellinger-",
        "test_limits.py::test_14",
        "test_formulas.py::test_loss_and_gradient[certainty-0]",
        "test_formulas.py::test_golden_values[certainty]",
        "test_approaches.py::test_it_runs_and_is_not_plain_distillation[certainty]",
    ):
        assert re.search(rf"{re.escape(test)}\S* PASSED", said), test
    for path, right, wrong in (
        ("entkd/divergences.py", "(0.5 * (log_p + log_q))", "(0.4 * (log_p + log_q))"),
        ("entkd/methods/certainty.py", "1 - entropy_N", "1 + entropy_N"),
    ):
        text = (copy / path).read_text(encoding="utf-8")
        assert right in text
        (copy / path).write_text(text.replace(right, wrong), encoding="utf-8")
    said = pytest_in(copy, DIVERGENCES[0], METHODS[0], "-k", "hellinger or certainty")
    for test in ("test_value_and_gradient[1.0-hellinger-", "test_loss_and_gradient[certainty-0]"):
        assert re.search(rf"{re.escape(test)}\S* FAILED", said), test


@pytest.mark.slow
def test_without_the_real_ones_all_other_tests_of_their_kind_pass(copy: Path) -> None:
    """Their diffs leave nothing behind."""
    for name in ("skew_kl", "eakd"):
        git_apply(copy, shown(name), "--reverse")
    said = pytest_in(copy, *DIVERGENCES, *METHODS)
    assert re.search(r"\d{3} passed", said)
    assert " failed" not in said, said[-3000:]

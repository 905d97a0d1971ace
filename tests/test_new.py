"""The skeleton of a new method runs and its test passes; the suite then asks for what only its author can write."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from entkd.errors import UserError
from entkd.new import new

ROOT = Path(__file__).parents[1]


def test_the_skeleton_passes_its_own_test_and_lacks_a_reference(tmp_path: Path) -> None:
    for name in ("entkd", "tests/methods", "tests/references"):
        shutil.copytree(ROOT / name, tmp_path / name)

    def python(*arguments: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-m", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout

    written = ("entkd/methods/my_method.py", "tests/methods/test_my_method.py")
    first, second, *what_is_left = python("entkd.cli", "new", "method", "my_method").splitlines()
    assert [first, second] == [str(tmp_path / path) for path in written]
    named = re.findall(r"[\w/]+\.(?:py|md|yaml)", "\n".join(what_is_left))
    assert len(named) == 5
    assert all((ROOT / path).is_file() for path in named)
    reference = "tests/methods/test_formulas.py::test_every_approach_has_a_reference"
    suite = python("pytest", "-q", "-p", "no:cacheprovider", written[1], reference)
    assert "1 failed, 3 passed" in suite
    assert re.search(r"AssertionError: write its loss .* tests/methods/cases.py\n.*\{'my_method'\}", suite)


@pytest.mark.parametrize(
    "name",
    [
        "Mine",
        "my-method",
        "class",
        "../x",
        "adakd",
        "none",
        "true",
        "literal",
        "tokens",
        "method",
        "factors",
        "exception",
        "todi",
    ],
)
def test_names_that_cannot_be(name: str, tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    with pytest.raises(UserError, match=f"new method {name}"):
        new("method", name, tmp_path)


def test_only_in_a_checkout(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkout"):
        new("method", "mine", tmp_path)

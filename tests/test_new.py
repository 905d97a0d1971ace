"""The skeleton of a new method is one that can be used, and its test one that passes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from entkd.errors import UserError
from entkd.new import new

ROOT = Path(__file__).parents[1]


def test_the_skeleton_passes_its_own_test(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "entkd", tmp_path / "entkd", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests").mkdir()
    written = new("method", "my_method", tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in written] == [
        "entkd/methods/my_method.py",
        "tests/methods/test_my_method.py",
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)})
    assert "3 passed" in run.stdout, run.stdout + run.stderr


@pytest.mark.parametrize("name", ["Mine", "my-method", "class", "../x", "adakd"])
def test_names_that_cannot_be(name: str, tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    with pytest.raises(UserError, match=f"new method {name}"):
        new("method", name, tmp_path)


def test_only_in_a_checkout(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkout"):
        new("method", "mine", tmp_path)

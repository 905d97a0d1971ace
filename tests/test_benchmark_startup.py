"""The benchmark of a job's start: both ways really start, and the table has a row for each."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from benchmarks import startup
from entkd import preloaded


def test_both_ways_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(preloaded.VARIABLE, "")  # and back to what it was afterwards
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    path = tmp_path / "new" / "startup.csv"
    startup.main(["--rounds", "1", "--output", str(path)])
    process = preloaded._processes.pop()
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(30) == 0
    table = pd.read_csv(path).set_index("job")
    assert list(table.index) == ["by itself", "forked"]
    assert (table[["seconds", "first_seconds"]] > 0).all(axis=None)
    assert table.loc["by itself", "ratio"] == 1


def test_a_job_that_cannot_start_ends_it() -> None:
    with pytest.raises(SystemExit, match="ModuleNotFoundError"):
        startup.seconds("import nothing_of_this_name")

"""CSV files whose names stay text: an arm may be called `nan`, `null` or `1`, which pandas takes for other things."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

NAMES = ("arm", "suite", "task", "metric")
"""Columns of text that somebody chose; blank is an empty string there."""
MISSING = ["", "nan", "NaN", "NA", "N/A", "n/a", "null", "NULL", "None", "<NA>", "-nan", "-NaN", "#N/A"]
"""What stands for a missing value in all other columns."""


def read_csv(path: Path, text: tuple[str, ...] = ()) -> pd.DataFrame:
    """A CSV with the columns ``NAMES`` as they are written; those in ``text`` are text as well, where not missing."""
    columns = pd.read_csv(path, nrows=0).columns
    missing = {column: MISSING for column in columns if column not in NAMES}
    types = dict.fromkeys((*NAMES, *text), str)
    return pd.read_csv(path, dtype=types, keep_default_na=False, na_values=missing)

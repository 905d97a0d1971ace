"""What the table says of a matched budget: what it was, and what the arms made of it."""

from __future__ import annotations

from typing import Any

import pandas as pd


def budget_notes(settings: dict[str, Any], runs: pd.DataFrame | None) -> tuple[str, ...]:
    """One note, where the experiment has a budget: steps and spending of the runs, the smallest to the largest."""
    if "budget" not in settings or runs is None:
        return ()
    spent = [
        f"{_range(runs['positions'])} tokens",
        f"{_range(runs['tflops'], 2)} TFLOPs",
        f"{_range(runs['seconds'])} seconds",
    ]
    steps = "; ".join(f"{arm} {_range(own)}" for arm, own in runs.groupby("arm", sort=False)["steps"])
    return (
        f"Every run had a budget of {settings['budget']} and took as many whole steps as fit into it. Spent per run: "
        f"{', '.join(spent)} (seconds with start and evaluations). Steps: {steps}.",
    )


def _range(values: pd.Series[Any], digits: int = 0) -> str:
    low, high = (f"{value:,.{digits}f}" for value in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"

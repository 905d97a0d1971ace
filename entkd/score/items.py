"""From lm-eval's results to rows of scores and values per item.

The mean of the item values of a task is the value reported for it, so that differences between arms can be paired by
item. A ratio of sums Σx/Σy (bits per byte) has items x_i / mean(y) of weight y_i / mean(y); an item of a plain mean
weighs 1, and weights have mean 1. The statistics need them: a long document has a large value because it is long, which
is no noise of the ratio. A metric that is no mean over items (F1, corpus BLEU, perplexity) has no items.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from lm_eval.api.metrics import bits_per_byte, mean
from numpy.typing import NDArray

from entkd.score.tasks import LoadedTask

SCORE_COLUMNS = ["arm", "seed", "suite", "task", "metric", "value", "stderr", "n", "task_version"]
ITEM_COLUMNS = ["arm", "seed", "suite", "task", "metric", "item", "value", "weight"]


def ratio_items(
    numerator_N: NDArray[np.float64], denominator_N: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Items whose mean is Σ numerator / Σ denominator, their weights, and the ratio's standard error (linearised)."""
    scale = float(denominator_N.mean())
    items_N, weights_N = numerator_N / scale, denominator_N / scale
    return items_N, weights_N, standard_error(items_N - items_N.mean() * weights_N)


def standard_error(values_N: NDArray[np.float64]) -> float:
    """Of their mean; NaN below two values."""
    return float(values_N.std(ddof=1) / math.sqrt(len(values_N))) if len(values_N) > 1 else math.nan


def task_rows(task: LoadedTask, results: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of scores and of items of one task of the suite.

    A group gives its own row, one for each of its tasks, and the items of all its tasks, named ``task/document``.

    Parameters
    ----------
    results
        What ``lm_eval.evaluator.evaluate`` returned with logged samples.
    """
    leaves = {name: _leaf(name, task, results) for name in task.leaves if task.key in results["results"][name]}
    if not task.is_group:
        score, items = leaves[task.name]
        return [score], [{"task": task.name, "metric": task.metric} | item for item in items]
    value = float(results["results"][task.name][task.key])
    # Weights make the mean over all items the group's value, which may be a mean over its tasks.
    (aggregate,) = [
        entry
        for entry in task.loaded["groups"][task.name].aggregate_metric_list
        if entry.metric == task.key.split(",")[0]
    ]
    n = sum(score["n"] for score, _ in leaves.values())
    rows = []
    for name, (score, items) in leaves.items():
        weight = 1.0 if aggregate.weight_by_size else n / (len(leaves) * score["n"])
        for item in items:
            own = {"item": f"{name}/{item['item']}"} | {key: item[key] * weight for key in ("value", "weight")}
            rows.append({"task": task.name, "metric": task.metric} | own)
    if len(rows) != n:  # a task of the group has no items
        rows = []
    stderr = _number(results["results"][task.name].get(_stderr_key(task.key)))
    version = str(results["versions"].get(task.name, ""))
    own_row = {
        "task": task.name,
        "metric": task.metric,
        "value": value,
        "stderr": stderr,
        "n": n,
        "task_version": version,
    }
    return [own_row, *(score for score, _ in leaves.values())], rows


def _leaf(name: str, task: LoadedTask, results: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score row and items of one lm-eval task."""
    metric, filter_ = task.key.split(",", 1)
    found = results["results"][name]
    samples = [sample for sample in results["samples"][name] if sample["filter"] == filter_ and metric in sample]
    aggregation = task.leaves[name].aggregation().get(metric, mean)
    stderr = _number(found.get(_stderr_key(task.key)))
    values_N: NDArray[np.float64] = np.empty(0)
    weights_N = values_N
    if aggregation is mean:
        values_N = np.asarray([sample[metric] for sample in samples], dtype=np.float64)
        weights_N = np.ones_like(values_N)
    elif aggregation is bits_per_byte:
        pairs_N2 = np.asarray([sample[metric] for sample in samples], dtype=np.float64)
        values_N, weights_N, stderr = ratio_items(-pairs_N2[:, 0] / math.log(2), pairs_N2[:, 1])
    items = [
        {"item": str(sample["doc_id"]), "value": float(value), "weight": float(weight)}
        for sample, value, weight in zip(samples, values_N, weights_N, strict=len(values_N) > 0)
    ]
    score = {
        "task": name,
        "metric": task.metric,
        "value": float(found[task.key]),
        "stderr": stderr,
        "n": len(samples),
        "task_version": str(results["versions"][name]),
    }
    return score, items


def _stderr_key(key: str) -> str:
    metric, filter_ = key.split(",", 1)
    return f"{metric}_stderr,{filter_}"


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def frames(
    scores: list[dict[str, Any]], items: list[dict[str, Any]], arm: str, seed: int, suite: str
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of one student as tables in the columns of the result files."""
    own = {"arm": arm, "seed": seed, "suite": suite}
    unique = {(row["task"], row["metric"]): row for row in reversed(scores)}  # a task may be in a group, and alone
    return (
        pd.DataFrame([own | unique[key] for key in reversed(unique)], columns=SCORE_COLUMNS),
        pd.DataFrame([own | row for row in items], columns=ITEM_COLUMNS),
    )

"""The score stage: one model, one suite, one process."""

from __future__ import annotations

import logging
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lm_eval.evaluator import evaluate

from entkd.config import Suite
from entkd.files import replacing
from entkd.models import load_model, load_tokenizer
from entkd.runtime import device_slot, resolve_dtype
from entkd.score.fidelity import fidelity
from entkd.score.items import frames, task_rows
from entkd.score.lm import LanguageModel
from entkd.score.tasks import LoadedTask, load_tasks

_BOOTSTRAP = 1000
"""Resamples of lm-eval's standard errors, for the metrics that have no closed form."""


def score(
    suite: Suite,
    model: Path,
    data: Path,
    signals: Path | None,
    output_csv: Path,
    output_items: Path,
    arm: str,
    seed: int,
    suite_name: str,
    memory_gib: float = 2.0,
) -> None:
    """Score a model on a suite and write its scores, and its values per item.

    Parameters
    ----------
    model
        Transformers folder with its tokenizer.
    data
        Prepared data: its test split is what ``entkd_heldout``, ``entkd_rouge`` and fidelity use.
    signals
        Manifest of the teacher signals of ``data``; without it, or with ``suite.fidelity`` off, no fidelity.
    output_csv
        arm, seed, suite, task, metric, value, stderr, n, task_version. Beside the suite's metrics: the tasks of its
        groups, and task ``entkd_fidelity``.
    output_items
        Parquet: arm, seed, suite, task, metric, item, value; the mean over a task's items is its value.
    memory_gib
        Memory from which the batch size follows.

    Raises
    ------
    UserError
        For unknown tasks or metrics, before the model is loaded.
    """
    _set_threads()
    with _quiet(), device_slot() as device:
        tasks = load_tasks(suite, data)
        loaded = load_model(model, resolve_dtype(suite.precision, device))
        torch.nn.Module.to(loaded, device)  # what Transformers wraps around this method hides its type
        lm = LanguageModel(loaded, load_tokenizer(model), memory_gib)
        scores: list[dict[str, Any]] = []
        items: list[dict[str, Any]] = []
        # Chat templates are wrapped by the call, and ours carry their own.
        for own in (True, False):
            results = _evaluate(lm, [task for task in tasks if task.own is own], suite, own)
            for task in tasks:
                if task.own is own:
                    task_scores, task_items = task_rows(task, results)
                    scores += task_scores
                    items += task_items
        if suite.fidelity and signals is not None:
            task_scores, task_items = fidelity(loaded, data, signals, lm.batch_tokens, suite.limit)
            scores += task_scores
            items += task_items
    score_table, item_table = frames(scores, items, arm, seed, suite_name)
    _write(score_table, item_table, output_csv, output_items)


def _evaluate(lm: LanguageModel, tasks: list[LoadedTask], suite: Suite, own: bool) -> dict[str, Any]:
    """lm-eval's results of these tasks; all of them share the batches of their request type."""
    if not tasks:
        return {}
    _seed()
    task_dict: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for task in tasks:
        for part, entries in task_dict.items():
            entries.update(task.loaded.get(part, {}))
    results: dict[str, Any] = evaluate(
        lm,
        task_dict,
        limit=suite.limit,
        bootstrap_iters=_BOOTSTRAP,
        log_samples=True,
        apply_chat_template=suite.apply_chat_template and not own,
        fewshot_as_multiturn=suite.apply_chat_template and not own,
    )
    return results


def _seed() -> None:
    """The seeds of lm-eval's command line, for tasks that draw."""
    random.seed(0)
    np.random.seed(1234)
    torch.manual_seed(1234)


def _set_threads() -> None:
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > 0:
        torch.set_num_threads(int(threads))


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval warns about the ordinary here: a model that is loaded already, data that come from a function."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        logger.setLevel(before)


def _write(scores: pd.DataFrame, items: pd.DataFrame, output_csv: Path, output_items: Path) -> None:
    """The scores last: where they are, everything is."""
    with replacing(output_items) as temporary:
        items.to_parquet(temporary, index=False)
    with replacing(output_csv) as temporary:
        scores.to_csv(temporary, index=False)

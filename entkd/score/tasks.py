"""Find and load the tasks of a suite: ours, the suite's own folder, and lm-eval's only where needed."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.task import Task as LmEvalTask
from lm_eval.tasks import TaskManager

import entkd.tasks
from entkd.config import Suite
from entkd.errors import UserError

OWN_TASKS = Path(entkd.tasks.__file__).parent
_FEWSHOT_SEED = 1234
"""lm-eval's default, so that few-shot prompts are those of its command line."""


@dataclass(frozen=True)
class LoadedTask:
    """A task of the suite, resolved: what to run and which result to read."""

    name: str
    """Task or group name."""
    metric: str
    """Metric as the suite names it; what is reported."""
    key: str
    """``metric,filter``: lm-eval's name of the result."""
    loaded: dict[str, Any]
    """What TaskManager.load gives: tasks, groups, group_map."""

    @property
    def leaves(self) -> dict[str, LmEvalTask]:
        """Name → task; one entry, or those of a group."""
        leaves: dict[str, LmEvalTask] = self.loaded["tasks"]
        return leaves

    @property
    def own(self) -> bool:
        """Whether its prompts come with their template already."""
        return self.name.startswith("entkd_")

    @property
    def is_group(self) -> bool:
        """Whether it is a group with an aggregate of its own."""
        return self.name in self.loaded["groups"]


def load_tasks(suite: Suite, data: Path) -> list[LoadedTask]:
    """The suite's tasks, in order. Several metrics of one task share its loading.

    Raises
    ------
    UserError
        For a task or metric that does not exist, with the nearest that does; for data that cannot be fetched.
    """
    manager = _manager(suite, data)
    loaded: dict[str, dict[str, Any]] = {}
    tasks = []
    for task in suite.tasks:
        if task.name not in loaded:
            try:
                loaded[task.name] = dict(manager.load([task.name]))
            except ConnectionError as error:
                raise UserError(
                    f"tasks.{task.name}: its data are not on this machine and cannot be fetched ({error}); "
                    "run this once with a network, or give a task file with local data_files in include_path"
                ) from error
            for leaf in loaded[task.name]["tasks"].values():
                _prepare(leaf, suite)
        key = _result_key(task.name, task.metric, loaded[task.name])
        tasks.append(LoadedTask(task.name, task.metric, key, loaded[task.name]))
    return tasks


def _manager(suite: Suite, data: Path) -> TaskManager:
    paths = [OWN_TASKS]
    if suite.include_path is not None:
        if not suite.include_path.is_dir():
            raise UserError(f"include_path: {suite.include_path} is not a folder; give one with lm-eval task files")
        paths.append(suite.include_path)

    def manager(defaults: bool) -> TaskManager:
        return TaskManager(include_path=list(paths), include_defaults=defaults, metadata={"data": str(data)})

    found = manager(False)
    unknown = [task.name for task in suite.tasks if task.name not in found.task_index]
    if not unknown:
        return found
    near = difflib.get_close_matches(unknown[0], found.all_tasks, n=1)
    found = manager(True)  # indexing lm-eval's 14,000 tasks takes many seconds
    for name in unknown:
        if name not in found.task_index:
            near = near or difflib.get_close_matches(name, found.all_tasks, n=1)
            hint = f"did you mean `{near[0]}`?" if near else "see `lm_eval ls tasks` for its names"
            own = ", ".join(entry for entry in manager(False).all_tasks if not entry.startswith("entkd_pairs_"))
            raise UserError(
                f"tasks: unknown task `{name}`; {hint} Known: every lm-eval task, {own}; "
                "or set include_path to the folder of its task file"
            )
    return found


def _prepare(task: LmEvalTask, suite: Suite) -> None:
    """What lm-eval's command line does to a task before it evaluates it."""
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    if task.task_name == "entkd_rouge":
        task.set_config(key="generation_kwargs", value={"max_gen_toks": suite.max_generated_tokens}, update=True)


def _result_key(name: str, metric: str, loaded: dict[str, Any]) -> str:
    """lm-eval's ``metric,filter`` of a metric; the filter may be left out where there is one."""
    if name in loaded["groups"]:
        aggregates = loaded["groups"][name].aggregate_metric_list or []
        found = {filter_.name: None for task in loaded["tasks"].values() for filter_ in task._filters}
        keys = [f"{entry.metric},{filter_}" for entry in aggregates for filter_ in entry.filter_list or found]
    else:
        if len(loaded["tasks"]) != 1:
            raise UserError(
                f"tasks.{name}: a tag of {len(loaded['tasks'])} tasks has no result; name the tasks themselves"
            )
        (task,) = loaded["tasks"].values()
        keys = [f"{entry},{filter_.name}" for entry in task.aggregation() for filter_ in task._filters]
    matching = [key for key in keys if metric in (key, key.split(",")[0])]
    if len(matching) != 1:
        names = sorted(matching or {key.split(",")[0] for key in keys})
        near = difflib.get_close_matches(metric, names, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        known = f"it reports {', '.join(names)}" if names else "it reports no aggregate; name its tasks themselves"
        raise UserError(f"tasks.{name}.metric: `{metric}` is not one result of this task{hint} {known}")
    return matching[0]

"""What files and packages say against an experiment, known before any job runs and without torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from entkd import rows
from entkd.config import folders
from entkd.config.components import Features
from entkd.config.errors import show, unknown_name
from entkd.config.experiment import Experiment
from entkd.config.stages import JsonData
from entkd.errors import UserError
from entkd.tasks import OWN_TASKS, task_names


def local_problems(experiment: Experiment) -> Iterator[str]:
    """One line for each problem of the data files, model folders, packages and tasks that the experiment names."""
    if isinstance(experiment.data, JsonData):
        yield from _data_problems(experiment.data)
    yield from _model_problems(experiment)
    for name, suite in experiment.suites.items():
        if suite.include_path is not None and not suite.include_path.is_dir():
            yield f"suites.{name}.include_path: no folder `{suite.include_path}` (working directory {Path.cwd()})"
    yield from _task_problems(experiment)


def _data_problems(data: JsonData) -> Iterator[str]:
    for split, file in data.files.items():
        path = f"data.files.{split}"
        if not file.is_file():
            yield f"{path}: no file `{file}` (working directory {Path.cwd()})"
            continue
        try:
            rows.check_file(data, file)
        except UserError as error:
            yield f"{path}: {error}"


def _model_problems(experiment: Experiment) -> Iterator[str]:
    teacher, student = experiment.teacher, experiment.student
    if teacher.source == "bundled" and not folders.bundled_is_installed():
        yield f"teacher.source: {folders.NOT_INSTALLED}"
    known, here = {}, Path.cwd()
    for key, folder in (("teacher", teacher.path), ("student", student.path)):
        if folder is None:
            continue
        if not (folder / "config.json").is_file():
            yield f"{key}.path: `{folder}` is not a model folder: it has no config.json (working directory {here})"
            continue
        try:
            known[key] = folders.read_model(folder)
        except UserError as error:
            yield f"{key}.path: {error}"
    bundled = teacher.source == "bundled"
    depth, width = (folders.BUNDLED_LAYERS, folders.BUNDLED_WIDTH) if bundled else (None, None)
    if "teacher" in known:
        depth, width = known["teacher"].layers, known["teacher"].width
    if student.init == "layers" and depth is not None:
        problem = folders.layers_problem(student.layers, depth)
        if problem:
            yield problem
    yield from _layer_problems(experiment, depth, _student_depth(experiment, known.get("student"), depth))
    yield from _width_problems(experiment, width, _student_width(experiment, known.get("student"), width))
    vocabularies = {key: model.vocabulary for key, model in known.items() if model.vocabulary is not None}
    if len(vocabularies) == 2:
        problem = folders.tokenizer_problem(vocabularies["student"], vocabularies["teacher"], str(student.path))
        if problem:
            yield f"student.path: {problem}"
            return
    for key, model in known.items():  # a student may come without a tokenizer: the teacher's is used
        tokens = len(vocabularies.get("teacher") or vocabularies.get(key) or {})
        if model.rows is not None and model.rows < tokens:
            yield (
                f"{key}.path: `{getattr(experiment, key).path}` has {model.rows} rows in its vocabulary (config.json: "
                f"vocab_size), fewer than the {tokens} tokens of the tokenizer; use the model that belongs to it"
            )


def _student_depth(experiment: Experiment, known: folders.ModelFolder | None, teacher_depth: int | None) -> int | None:
    """The student's decoder layers, where they can be known."""
    student = experiment.student
    if student.init == "layers":
        return len(student.layers)
    if student.init == "scratch":
        written = any(key in student.config for key in folders.LAYER_KEYS)
        return folders.whole_number(student.config, folders.LAYER_KEYS) if written else teacher_depth
    return None if known is None else known.layers


def _student_width(experiment: Experiment, known: folders.ModelFolder | None, teacher_width: int | None) -> int | None:
    """The width of the student's hidden states, where it can be known."""
    student = experiment.student
    if student.init == "scratch" and any(key in student.config for key in folders.WIDTH_KEYS):
        return folders.whole_number(student.config, folders.WIDTH_KEYS)
    if student.init in ("layers", "scratch"):
        return teacher_width
    return None if known is None else known.width


def _layer_problems(experiment: Experiment, teacher_depth: int | None, student_depth: int | None) -> Iterator[str]:
    """Layers that arms compare and the student, or the signals of the teacher, will not have."""
    stored, features = None, experiment.signals.features
    if features is not None and teacher_depth is not None:
        problem = folders.points_problem(features.points, teacher_depth, "teacher")
        if not problem:
            stored = folders.layer_points(teacher_depth, features.points)
        elif _writes_signals(experiment):
            yield f"signals.features.points: {problem}"
    for path, wanted in _features(experiment, "layers"):
        if wanted.layers is not None:
            problem = folders.layer_pairs_problem(wanted.layers, student_depth, stored)
            if problem:
                yield f"{path}.layers: {problem}"
    for path, wanted in _features(experiment, "points"):
        if wanted.layers is None and student_depth is not None:
            problem = folders.points_problem(wanted.points, student_depth, "student")
            if problem:
                yield f"{path}.points: {problem}"


def _writes_signals(experiment: Experiment) -> bool:
    """Whether an arm, or the fidelity of a suite, reads the teacher's signals."""
    arms, suites = experiment.resolved_arms.values(), experiment.suites.values()
    return any(arm.method.needs_signals for arm in arms) or any(suite.fidelity for suite in suites)


def _width_problems(experiment: Experiment, teacher_width: int | None, student_width: int | None) -> Iterator[str]:
    """Arms that compare hidden states as they are, where the models have other widths."""
    if None in (teacher_width, student_width) or teacher_width == student_width:
        return
    for path, wanted in _features(experiment, "projector"):
        if wanted.projector == "identity":
            yield (
                f"{path}.projector: identity needs equal widths; the student has {student_width} and the teacher "
                f"{teacher_width}; use linear"
            )


def _features(experiment: Experiment, key: str) -> Iterator[tuple[str, Features]]:
    """The feature losses of arms, and of their trials with other values of ``key``, each with where it is written."""
    for arm in experiment.resolved_arms.values():
        if arm.method.features is None:
            continue
        yield f"arms.{arm.name}.features", arm.method.features
        seen = [getattr(arm.method.features, key)]
        for trial in experiment.trials.get(arm.name, ()):
            tried = trial.arm.method.features
            if tried is not None and getattr(tried, key) not in seen:
                seen.append(getattr(tried, key))
                grid_key = f"method.features.{key}"
                at = show({grid_key: trial.point[grid_key]})
                yield f"tune: arm {arm.name} at {at}: method.features", tried


def _task_problems(experiment: Experiment) -> Iterator[str]:
    """Unknown names and metrics among our own tasks; other names are lm-eval's, which only the scoring can look up."""
    for name, suite in experiment.suites.items():
        further = task_names(suite.include_path) if suite.include_path is not None else set()
        for number, task in enumerate(suite.tasks):
            path = f"suites.{name}.tasks[{number}]"
            if not task.name.startswith("entkd_") or task.name in further:
                continue
            if task.name not in OWN_TASKS:
                yield unknown_name(f"{path}.name", task.name, {*OWN_TASKS, *further})
            elif task.metric.partition(",")[0] not in OWN_TASKS[task.name]:
                yield unknown_name(f"{path}.metric", task.metric, OWN_TASKS[task.name])

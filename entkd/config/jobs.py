"""What each job of the workflow is told: settings as plain data, without anything that should not rerun it.

Snakemake reruns a job when its settings change, so each function leaves out the names, roles and notes that decide
nothing about the job's output.
"""

from __future__ import annotations

from typing import Any

from entkd.config.arms import ResolvedArm
from entkd.config.components import Curriculum, Difficulty, Features, Temperature
from entkd.config.experiment import Experiment
from entkd.config.scoring import ReportedSuite, Suite, Task
from entkd.config.stages import SyntheticData, Training
from entkd.config.tune import Trial, at_point
from entkd.config.words import changed as _changed
from entkd.names import FIDELITY

FIDELITY_METRICS = (("kl", "lower"), ("top1_agreement", "higher"))
"""Metrics that scoring adds where `fidelity` is on, and which way is better."""


def teacher_settings(experiment: Experiment) -> dict[str, Any]:
    """For importing the teacher; fine-tuning and precision belong to other jobs."""
    return experiment.teacher.model_dump(mode="json", exclude={"name", "prepare", "finetune", "precision"})


def data_settings(experiment: Experiment) -> dict[str, Any]:
    """For preparing the data."""
    return experiment.data.model_dump(mode="json", exclude={"name"})


def seqkd_settings(experiment: Experiment) -> dict[str, Any]:
    """For the teacher's greedy responses to the training prompts."""
    data = experiment.data
    if isinstance(data, SyntheticData):
        return {"max_response_tokens": data.max_response_tokens, "batch": data.batch}
    return {"max_response_tokens": data.max_tokens, "batch": 32}


def signal_needs(experiment: Experiment) -> dict[str, Any]:
    """What the store keeps; both splits always, so that turning `fidelity` on reruns no teacher."""
    features = experiment.signals.features
    return {"features": features and features.model_dump(mode="json"), "splits": ["train", "test"]}


def arm_settings(experiment: Experiment, arm: ResolvedArm) -> dict[str, Any]:
    """For training one arm: its method and the training settings, without its name and role."""
    return {"method": arm.trained_method, "training": experiment.training.model_dump(mode="json")}


def trial_settings(trial: Trial) -> dict[str, Any]:
    """For training one trial: what its arm would be told if it were written with these settings."""
    return {"method": trial.arm.trained_method, "training": trial.training.model_dump(mode="json")}


def choice_settings(experiment: Experiment, arm: str) -> dict[str, Any]:
    """For choosing among an arm's trials."""
    return {"trials": [{"name": trial.name, "point": trial.point} for trial in experiment.trials[arm]]}


def suite_settings(suite: ReportedSuite) -> dict[str, Any]:
    """For scoring; direction, `min_gap` and `scale` are the table's business."""
    settings = suite.model_dump(mode="json", include=set(Suite.model_fields))
    settings["tasks"] = [{key: task[key] for key in Task.model_fields} for task in settings["tasks"]]
    return settings


def analysis_settings(experiment: Experiment) -> dict[str, Any]:
    """For table and figures: arms in words, tasks with their directions, the primary family.

    Arms have their ``base`` where the factorial arms stand on more than one, and it is a factor.
    """
    resolved = experiment.resolved_arms.values()
    arms = [_arm_in_words(arm) for arm in resolved]
    if len({arm.base for arm in resolved if arm.role == "factorial"}) > 1:
        arms = [words | {"base": arm.base} for words, arm in zip(arms, resolved, strict=True)]
    tasks = []
    for name, suite in experiment.suites.items():
        for task in suite.tasks:
            tasks.append({"suite": name, "task": task.name} | task.model_dump(mode="json", exclude={"name"}))
        if suite.fidelity:
            for metric, direction in FIDELITY_METRICS:
                shared = {"metric": metric, "direction": direction, "min_gap": 0.0, "scale": 1.0}
                tasks.append({"suite": name, "task": FIDELITY} | shared)
    settings = {
        "analysis": experiment.analysis.model_dump(mode="json"),
        "arms": arms,
        "tasks": tasks,
        "primary": experiment.factorial.primary if experiment.factorial else [],
    }
    if experiment.training.budget is not None:
        settings["budget"] = experiment.training.budget.words
    if experiment.tune is not None:
        arms_settings = {name: experiment.resolved_arms[name].model_dump(mode="json") for name in experiment.trials}
        training = experiment.training.model_dump(mode="json")
        settings["tune"] = {"arms": arms_settings, "training": training}
    return settings


def with_choices(settings: dict[str, Any], points: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Analysis or figure settings with the tuned arms as they were trained.

    Parameters
    ----------
    settings
        Of :func:`analysis_settings` or :func:`figure_settings`.
    points
        Tuned arm → the point that was chosen.
    """
    training = Training.model_validate(settings["tune"]["training"])
    tuned = {
        name: at_point(ResolvedArm.model_validate(arm), training, points[name])[0]
        for name, arm in settings["tune"]["arms"].items()
        if name in points
    }
    # The base as it was written: a tuned weight of the divergence leaves the arm in its cell of the design.
    arms = [arm | _arm_in_words(tuned[arm["name"]]) if arm["name"] in tuned else arm for arm in settings["arms"]]
    changed = settings | {"arms": arms}
    if "method" in settings:
        drawn = {}
        for component, shown in settings["method"].items():
            first = next(arm["name"] for arm in settings["arms"] if arm[component])
            drawn[component] = (
                getattr(tuned[first].method, component).model_dump(mode="json") if first in tuned else shown
            )
        changed["method"] = drawn
    return changed


def figure_settings(experiment: Experiment) -> dict[str, Any]:
    """For the figures: the analysis, and the curriculum and temperature that the entropy figure draws."""
    shown: dict[str, Any] = {}
    for name in ("curriculum", "temperature"):
        given = [getattr(arm.method, name) for arm in experiment.resolved_arms.values()]
        first = next((settings for settings in given if settings is not None), None)
        if first is not None:
            shown[name] = first.model_dump(mode="json")
    return analysis_settings(experiment) | {"method": shown}


def _arm_in_words(arm: ResolvedArm) -> dict[str, str]:
    method = arm.method
    return {
        "name": arm.name,
        "role": arm.role,
        "curriculum": _curriculum(method.curriculum),
        "temperature": _temperature(method.temperature),
        "features": _features(method.features),
        "divergence": _terms(arm),
    }


def _curriculum(curriculum: Curriculum | None) -> str:
    if curriculum is None:
        return ""
    width = f" width={curriculum.window}" if curriculum.shape == "window" else f" κ={curriculum.kappa:g}"
    return f"{curriculum.shape}{width}{_changed(curriculum, 'shape', 'kappa', 'window')}"


def _temperature(temperature: Temperature | None) -> str:
    return "" if temperature is None else f"c={temperature.c:g}{_changed(temperature, 'c')}"


def _features(features: Features | None) -> str:
    if features is None:
        return ""
    where = "" if features.tokens == "all" else f" θ={features.threshold:g}"
    return f"{features.loss}{where}{_changed(features, 'loss', 'threshold')}"


def _terms(arm: ResolvedArm) -> str:
    """The logits terms, with what else tells arms apart: the pipeline, and a difficulty that is not the default."""
    method, terms = arm.method, []
    if method.divergence is not None:
        terms.append(f"{method.divergence.name}{_changed(method.divergence, 'name')}")
    if method.ce is not None:
        terms.append(f"ce{_changed(method.ce)}")
    if method.approach is not None:
        terms.append(f"{method.approach.name}{_changed(method.approach, 'name')}")
    pipeline = "" if arm.pipeline == "distill" else f"{arm.pipeline}: "
    if method.on_policy is not None:
        pipeline = f"{method.on_policy.name}{_changed(method.on_policy, 'name')}: "
    by = _difficulty(method.difficulty) if method.needs_difficulty else ""
    return f"{pipeline}{' + '.join(terms)}{by}"


def _difficulty(difficulty: Difficulty) -> str:
    defaults = Difficulty()
    named = [
        getattr(difficulty, key) for key in ("source", "scale") if getattr(difficulty, key) != getattr(defaults, key)
    ]
    return f", difficulty {' '.join(named)}" if named else ""

"""What jobs are told: enough to do their work, nothing that would rerun them without need."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from entkd.config import Experiment, Suite, Teacher, canonical_json, jobs, load_experiment
from entkd.config.summary import summary

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def demo() -> Experiment:
    return load_experiment(ROOT / "config/config.yaml")


def changed_demo(overrides: dict) -> Experiment:
    return load_experiment(ROOT / "config/config.yaml", overrides)


def test_canonical_json_is_one_text_per_value() -> None:
    assert canonical_json({"b": [1, 2.5], "a": None}) == '{"a":null,"b":[1,2.5]}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"a": float("nan")})


def test_settings_survive_the_command_line(demo: Experiment) -> None:
    teacher = Teacher.model_validate_json(canonical_json(jobs.teacher_settings(demo)))
    assert teacher.source == demo.teacher.source
    suite = demo.suites["demo"]
    again = Suite.model_validate_json(canonical_json(jobs.suite_settings(suite)))
    assert again.tasks[0].metric == suite.tasks[0].metric


def test_names_roles_and_gaps_stay_out(demo: Experiment) -> None:
    for arm in demo.resolved_arms.values():
        assert re.search(r'"(role|pipeline)"', canonical_json(jobs.arm_settings(demo, arm))) is None
    assert re.search(r'"(min_gap|scale)"', canonical_json(jobs.suite_settings(demo.suites["demo"]))) is None
    assert "name" not in jobs.data_settings(demo)
    assert not {"name", "precision"} & set(jobs.teacher_settings(demo))


def test_arms_in_words(demo: Experiment) -> None:
    words = {arm["name"]: arm for arm in jobs.analysis_settings(demo)["arms"]}
    assert words["full"] == {
        "name": "full", "role": "factorial", "divergence": "forward_kl",
        "curriculum": "soft κ=0.8", "temperature": "c=0.5", "features": "cosine θ=0.8",
    }  # fmt: skip
    assert (words["sft"]["divergence"], words["sft"]["curriculum"]) == ("ce", "")
    assert words["seqkd"]["divergence"] == "seqkd: ce"
    own = {"a": {"ce": {"weight": 0.5}}, "b": {"curriculum": {}, "difficulty": {"scale": "logv"}}}
    words = {arm["name"]: arm for arm in jobs.analysis_settings(changed_demo({"arms": own}))["arms"]}
    assert (words["a"]["divergence"], words["b"]["divergence"]) == (
        "forward_kl + ce weight=0.5", "forward_kl, difficulty logv",
    )  # fmt: skip
    told = [tuple(value for key, value in arm.items() if key not in ("name", "role")) for arm in words.values()]
    assert len(set(told)) == len(told)


def test_settings_off_their_defaults_are_in_the_words(demo: Experiment) -> None:
    overrides = {"arms": {"x": {
        "divergence": {"name": "jsd", "beta": 0.2}, "curriculum": {"shape": "window", "progress": "step"},
        "temperature": {"c": -0.5, "t2": "linear"}, "features": {"loss": "mse", "weight": 1.5},
    }}}  # fmt: skip
    changed = load_experiment(ROOT / "config/config.yaml", overrides)
    words = {arm["name"]: arm for arm in jobs.analysis_settings(changed)["arms"]}["x"]
    assert words["divergence"] == "jsd beta=0.2"
    assert words["curriculum"] == "window width=0.3 progress=step"
    assert words["temperature"] == "c=-0.5 t2=linear"
    assert words["features"] == "mse θ=0.8 weight=1.5"


def test_a_block_within_says_what_is_off_its_defaults_alone() -> None:
    """And not all of it, as Python would print it."""
    adakd = {"divergence": "reverse_kl", "approach": {"name": "adakd", "tempering": {"c": 1.0}}}
    arms = {"x": adakd, "y": {"divergence": "reverse_kl", "approach": "adakd"}}
    changed = load_experiment(ROOT / "config/config.yaml", {"arms": arms})
    words = {arm["name"]: arm["divergence"] for arm in jobs.analysis_settings(changed)["arms"]}
    assert (words["x"], words["y"]) == ("reverse_kl + adakd tempering.c=1.0", "reverse_kl + adakd")


def test_primary_family_needs_the_whole_factorial(demo: Experiment) -> None:
    assert jobs.analysis_settings(demo)["primary"] == ["curriculum", "temperature", "features", "full-kd"]
    other = load_experiment(ROOT / "config/config.yaml", {"analysis": {"reference": "sft"}})
    assert jobs.analysis_settings(other)["primary"][-1] == "full-kd"
    broken = load_experiment(ROOT / "config/config.yaml", {"arms": {"features": {"role": "control"}}})
    assert jobs.analysis_settings(broken)["primary"] == []
    assert demo.lacking_cells == ""
    assert broken.lacking_cells == "the factorial arms lack features"
    assert "none: the factorial arms lack features" in summary(broken)


def test_fidelity_is_a_task_of_the_table(demo: Experiment) -> None:
    tasks = [(task["task"], task["metric"], task["direction"]) for task in jobs.analysis_settings(demo)["tasks"]]
    assert tasks[-2:] == [("entkd_fidelity", "kl", "lower"), ("entkd_fidelity", "top1_agreement", "higher")]


def test_signals_keep_what_the_setting_says_not_what_arms_need(demo: Experiment) -> None:
    assert jobs.signal_needs(demo) == {
        "features": {"points": 3, "tokens": "hard", "threshold": 0.8},
        "splits": ["train", "test"],
    }
    off = json.loads((ROOT / "config/schema.json").read_text())["$defs"]["Signals"]["properties"]["features"]
    assert {"type": "null"} in off["anyOf"]

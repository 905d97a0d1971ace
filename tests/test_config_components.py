"""Settings of difficulty and features: what they refuse, and that arms that do not use the later ones keep results."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from entkd.config import DIVERGENCE_NAMES, Arm, Experiment, Method, jobs, load_experiment
from entkd.config.arms import resolve_arms
from entkd.config.errors import ConfigError
from entkd.config.folders import layer_pairs_problem
from entkd.config.local import local_problems

ROOT = Path(__file__).parents[1]
CONTROLS = ROOT / "config/experiments/controls.yaml"


def test_arms_without_the_new_keys_are_written_as_before() -> None:
    """An arm's identity is this text: a further key in it would train every student anew."""
    method = Method.model_validate({"divergence": "forward_kl", "curriculum": {}, "temperature": {}, "features": {}})
    full = resolve_arms(method, {"full": Arm()}, {})["full"].trained_method
    assert full["difficulty"] == {"scale": "rank", "version": 1}
    assert full["features"] == {
        "weight": 0.5, "threshold": 0.8, "tokens": "hard", "loss": "cosine", "projector": "linear",
        "projector_lr": 1e-3, "points": 3, "version": 1,
    }  # fmt: skip
    written_out = method.model_copy(update={"difficulty": type(method.difficulty)(source="teacher_entropy")})
    assert resolve_arms(written_out, {"full": Arm()}, {})["full"].trained_method == full


def test_new_keys_are_written_and_read_again() -> None:
    patch = {
        "curriculum": {},
        "features": {"layers": [[0, 9], [5, 29]], "threshold_end": 0.5},
        "difficulty": {"source": "unigram"},
    }
    method = Method.model_validate({"divergence": "forward_kl"} | patch)
    trained = resolve_arms(Method(divergence="forward_kl"), {"x": Arm(**patch)}, {})["x"].trained_method
    assert trained["difficulty"]["source"] == "unigram"
    assert trained["features"]["layers"] == [[0, 9], [5, 29]]
    assert trained["features"]["threshold_end"] == 0.5
    assert "points" not in trained["features"]  # it means nothing beside layers
    assert Method.model_validate_json(json.dumps(trained)) == Method.model_validate_json(method.model_dump_json())


@pytest.mark.parametrize(
    ("features", "problem"),
    [
        ({"points": 3, "layers": [[0, 9]]}, "points and layers both choose the layer pairs; keep one"),
        ({"layers": [[0, 9], [1, 2], [0, 9]]}, r"layers: \[\[0, 9\], \[1, 2\], \[0, 9\]\] names a pair twice"),
        ({"layers": []}, "at least 1"),
        ({"layers": [[0, -1]]}, "greater than or equal to 0"),
        ({"layers": [[0, 1, 2]]}, "at most 2"),
        ({"threshold_end": 1.5}, "less than or equal to 1"),
        ({"threshold_end": 0.5, "tokens": "all"}, "`threshold_end` means nothing with `tokens: all`"),
        ({"threshold": 0.5, "tokens": "all"}, "`threshold` means nothing with `tokens: all`"),
        ({"projector_lr": 1e-2, "projector": "identity"}, "`projector_lr` means nothing with `projector: identity`"),
    ],
)
def test_features_that_mean_nothing_are_refused(features: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Method.model_validate({"divergence": "forward_kl", "features": features})


@pytest.mark.parametrize(
    ("patch", "problem"),
    [
        ({"curriculum": {"shape": "window", "kappa": -0.8}}, "`kappa` means nothing with `shape: window`"),
        ({"curriculum": {"window": 0.5}}, "`window` means nothing with `shape: soft`"),
        ({"curriculum": {"shape": "exp", "window": 0.5}}, "`window` means nothing with `shape: exp`"),
        ({"approach": {"name": "adakd", "parts": "focusing", "tempering": {"c": 1}}}, "`tempering` means nothing"),
        ({"approach": {"name": "adakd", "parts": "focusing", "detach": False}}, "`detach` means nothing"),
        ({"approach": {"name": "adakd", "parts": "tempering", "focusing": {"least": 0}}}, "`focusing` means nothing"),
        (
            {"approach": {"name": "taid", "adaptive": False, "alpha": 0.1}},
            "`alpha` means nothing with `adaptive: false`",
        ),
        ({"approach": {"name": "taid", "adaptive": False, "variant": "paper"}}, "`variant` means nothing"),
    ],
)
def test_keys_that_mean_nothing_are_refused(patch: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Method.model_validate({"divergence": "forward_kl"} | patch)


def test_keys_that_mean_nothing_are_read_again_where_settings_were_written_whole() -> None:
    for patch in ({"curriculum": {"shape": "window"}}, {"approach": {"name": "adakd", "parts": "focusing"}}):
        method = Method.model_validate({"divergence": "forward_kl"} | patch)
        assert Method.model_validate_json(method.model_dump_json()) == method


def test_a_difficulty_that_nothing_reads_makes_no_other_arm() -> None:
    method = Method.model_validate({"divergence": "forward_kl"})
    for tokens, same in (("all", True), ("random", True), ("hard", False), ("easy", False)):
        plain = {"features": {"tokens": tokens}}
        arms = {"plain": Arm(**plain), "permuted": Arm(**plain, difficulty={"source": "permuted"})}
        if same:
            with pytest.raises(ValueError, match=r"arms\.permuted: the same experiment as arms\.plain"):
                resolve_arms(method, arms, {})
        else:
            assert len(resolve_arms(method, arms, {})) == 2


def test_points_of_the_method_make_room_for_layers_of_an_arm() -> None:
    method = Method.model_validate({"divergence": "forward_kl", "features": {"points": 3}})
    arms = {"x": Arm(features={"points": None, "layers": [[0, 9]]})}
    assert resolve_arms(method, arms, {})["x"].method.features.layers == ((0, 9),)
    with pytest.raises(ValueError, match=r"arms.x.features: points and layers both choose"):
        resolve_arms(method, {"x": Arm(features={"layers": [[0, 9]]})}, {})


@pytest.fixture
def demo(tmp_path: Path) -> Callable[..., Experiment]:
    """The demo with one more arm, and other settings at the top level."""

    def load(arm: dict[str, Any], **changes: Any) -> Experiment:
        experiment = yaml.safe_load((ROOT / "config/config.yaml").read_text(encoding="utf-8")) | changes
        experiment["arms"] |= {"x": arm}
        (tmp_path / "x.yaml").write_text(yaml.safe_dump(experiment), encoding="utf-8")
        return load_experiment(tmp_path / "x.yaml")

    return load


def refusal(load: Callable[..., Experiment], arm: dict[str, Any], **changes: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(arm, **changes)
    return caught.value.problems


HARD = {"mode": "hidden", "features": {"points": 3, "tokens": "hard", "threshold": 0.8}}
ALL = {"mode": "hidden", "features": {"points": 3, "tokens": "all"}}


@pytest.mark.parametrize("source", ["permuted", "permuted_within", "unigram", "label_nll", "initial_kl"])
def test_hard_tokens_of_another_source_need_the_features_of_all(demo, source: str) -> None:
    arm = {"features": {}, "difficulty": {"source": source}}
    assert refusal(demo, arm, signals=HARD) == [
        f"arms.x.features: hard tokens by difficulty.source {source} need `signals.features.tokens: all`"
    ]
    assert demo(arm, signals=ALL).resolved_arms["x"].method.difficulty.source == source
    demo({"curriculum": {}, "temperature": {}, "difficulty": {"source": source}}, signals=HARD)  # reads no features


def test_a_threshold_that_moves_below_the_stored_one_is_refused(demo) -> None:
    (problem,) = refusal(demo, {"features": {"threshold_end": 0.5}}, signals=HARD)
    assert problem.startswith("arms.x.features.threshold_end: 0.5 is below signals.features.threshold 0.8")
    assert problem.endswith("set `signals.features.threshold: 0.5`")
    (problem,) = refusal(demo, {"features": {"threshold": 0.6, "threshold_end": 0.9}}, signals=HARD)
    assert problem.startswith("arms.x.features.threshold: 0.6 is below")
    demo({"features": {"threshold_end": 0.95}}, signals=HARD)
    demo({"features": {"threshold_end": 0.5}}, signals=ALL)


def test_initial_kl_needs_whole_distributions(demo) -> None:
    sparse = {"mode": "sparse", "features": ALL["features"]}
    arm = {"curriculum": {}, "difficulty": {"source": "initial_kl"}}
    assert "arms.x.difficulty.source: initial_kl needs the teacher's whole distribution" in "\n".join(
        refusal(demo, arm, signals=sparse)
    )
    for source in ("initial_student_entropy", "unigram", "permuted"):  # only the other arms of the demo are refused
        problems = refusal(demo, arm | {"difficulty": {"source": source}}, signals=sparse)
        assert not [problem for problem in problems if problem.startswith("arms.x")]
    problems = refusal(demo, {"ce": {}, "difficulty": {"source": "initial_kl"}}, signals=sparse)
    assert not [problem for problem in problems if problem.startswith("arms.x")]  # nothing reads it


def test_layers_are_checked_before_anything_runs(demo) -> None:
    arm = {"features": {"layers": [[1, 9], [2, 14]]}}
    (problem,) = refusal(demo, arm)
    assert problem == (
        "arms.x.features.layers: the states of teacher layer 14 are not stored; stored are those of [9, 19, 29], which "
        "signals.features.points chooses: use these, or change it"
    )
    demo(arm, signals={"features": {"points": 6, "threshold": 0.8}})  # layers 4, 9, 14, 19, 24, 29
    (problem,) = refusal(demo, {"features": {"layers": [[6, 9]]}})
    assert problem == "arms.x.features.layers: student layer 6 is out of range; the student has layers 0 to 5"
    scratch = {"init": "scratch", "config": {"num_hidden_layers": 2}}
    assert "layers 0 to 1" in refusal(demo, {"features": {"layers": [[2, 9]]}}, student=scratch)[0]
    deep = {"init": "scratch", "config": {"hidden_size": 192}}
    demo({"features": {"layers": [[29, 9]]}}, student=deep)
    hub = {"init": "hub", "repo": "a/b", "revision": "c"}
    assert not list(local_problems(demo({"features": {"layers": [[99, 9]]}}, student=hub)))  # known when it is there


def test_problems_of_layer_pairs() -> None:
    assert layer_pairs_problem([(2, 3)], 3, (1, 3)) == layer_pairs_problem([(9, 9)], None, None) == ""
    assert "student layer 3" in layer_pairs_problem([(2, 3), (3, 3)], 3, (1, 3))
    assert "teacher layer 2" in layer_pairs_problem([(2, 2)], 3, (1, 3))


def test_difficulty_in_words(demo) -> None:
    def words(difficulty: dict[str, str], **arm: Any) -> str:
        arms = jobs.analysis_settings(demo({"difficulty": difficulty} | arm))["arms"]
        return next(found for found in arms if found["name"] == "x")["divergence"]

    exp = {"curriculum": {"shape": "exp"}}
    assert words({"source": "permuted"}, **exp) == "forward_kl, difficulty permuted"
    assert words({"source": "label_nll", "scale": "minmax"}, **exp) == "forward_kl, difficulty label_nll minmax"
    assert words({"scale": "logv"}, **exp) == "forward_kl, difficulty logv"
    assert words({}, **exp) == "forward_kl"
    assert words({"source": "permuted"}, ce={}) == "forward_kl + ce"


def test_each_control_differs_from_full_in_one_component() -> None:
    experiment = load_experiment(CONTROLS)
    assert experiment.analysis.reference == "full"
    arms = dict(experiment.resolved_arms)
    full, kd = arms.pop("full").method.model_dump(), arms.pop("kd").trained_method
    assert set(kd) == {"divergence"}
    assert {arm.role for arm in arms.values()} == {"control"}
    for name, arm in arms.items():
        found = arm.method.model_dump()
        assert [key for key in full if found[key] != full[key]] != [], name
        assert len([key for key in full if found[key] != full[key]]) == 1, name
    # the list of docs/method.md
    assert {arm.method.difficulty.source for arm in arms.values()} >= {
        "permuted", "permuted_within", "unigram", "label_nll", "initial_kl", "initial_student_entropy",
    }  # fmt: skip
    assert {arm.method.features.tokens for arm in arms.values()} == {"hard", "all", "random", "easy"}
    assert {arm.method.temperature.t2 for arm in arms.values()} == {"per_token", "linear", "off"}
    assert {arm.method.curriculum.progress for arm in arms.values()} == {"lr", "easy", "hard"}
    assert min(arm.method.curriculum.kappa for arm in arms.values()) < 0
    assert min(arm.method.temperature.c for arm in arms.values()) < 0


def test_the_fixed_temperature_is_the_mean_of_full() -> None:
    arms = load_experiment(CONTROLS).resolved_arms
    full, fixed = (arms[name].method.temperature for name in ("full", "temperature_fixed"))
    assert fixed.c == 0
    assert fixed.base == pytest.approx(full.base * math.sinh(full.c) / full.c, abs=5e-5)
    assert fixed.t2 == full.t2


def test_divergences_are_the_baselines_alone_and_with_all_components() -> None:
    experiment, baselines = (
        load_experiment(CONTROLS.with_name(f"{name}.yaml")) for name in ("divergences", "baselines")
    )
    for name in ("teacher", "data", "signals", "student", "training", "suites", "seeds"):
        assert getattr(experiment, name) == getattr(baselines, name), name
    assert experiment.analysis == baselines.analysis.model_copy(update={"reference": "forward_kl"})
    alone = {name: Method(divergence={"name": name}) for name in DIVERGENCE_NAMES}
    on = baselines.resolved_arms["full"].method
    full = {f"{name}_full": on.model_copy(update={"divergence": alone[name].divergence}) for name in alone}
    assert {name: arm.method for name, arm in experiment.resolved_arms.items()} == alone | full


def test_controls_and_baselines_are_on_what_the_demo_is_on() -> None:
    """With half its batch; their `kd` and `full` are the same ones: their tables can be read beside each other."""
    demo, controls, baselines = (
        load_experiment(ROOT / path) for path in ("config/config.yaml", CONTROLS, CONTROLS.with_name("baselines.yaml"))
    )
    for experiment in (controls, baselines):
        for name in ("teacher", "data", "student", "seeds"):
            assert getattr(experiment, name) == getattr(demo, name), name
        halved = demo.training.model_copy(update={"blocks_per_step": 1, "micro_blocks": 1})
        assert experiment.training == halved
        (ours,), (theirs,) = experiment.suites.values(), demo.suites.values()
        assert ours.model_copy(update={"limit": None}) == theirs
        assert experiment.signals.mode == demo.signals.mode
    for arm in ("kd", "full"):
        methods = [experiment.resolved_arms[arm].trained_method for experiment in (demo, controls, baselines)]
        assert methods[0] == methods[1] == methods[2]

"""Arms: merge patches against RFC 7396's own examples, sweeps, and what decides that a student is trained again."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entkd.config import Arm, Method
from entkd.config.arms import expand_sweeps, merge_patch, resolve_arms
from entkd.config.errors import ProblemsError

# RFC 7396, appendix A, without the cases that remove what is not there, which we refuse.
RFC = [
    ({"a": "b"}, {"a": "c"}, {"a": "c"}),
    ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
    ({"a": "b"}, {"a": None}, {}),
    ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
    ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
    ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
    ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    (["a", "b"], ["c", "d"], ["c", "d"]),
    ({"a": "foo"}, "bar", "bar"),
    ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
    ([1, 2], {"a": "b"}, {"a": "b"}),
    ({"a": {"b": "c"}}, {"a": {"b": "d"}}, {"a": {"b": "d"}}),
]


@pytest.mark.parametrize(("target", "patch", "result"), RFC)
def test_merge_patch_follows_rfc_7396(target: object, patch: object, result: object) -> None:
    assert merge_patch(target, patch, "") == result


@settings(max_examples=50, deadline=None)
@given(
    st.recursive(
        st.none() | st.integers(),
        lambda value: st.dictionaries(st.sampled_from("abc"), value, max_size=2),
        max_leaves=4,
    )
)
def test_merging_leaves_the_target_as_it_was(patch: object) -> None:
    target = {"a": {"b": 1}}
    with contextlib.suppress(ValueError):  # it removed what is not there
        merge_patch(target, patch, "")
    assert target == {"a": {"b": 1}}


def test_null_removes_a_component_of_the_method() -> None:
    method = Method.model_validate({"divergence": "forward_kl", "curriculum": {"kappa": 0.5}})
    arms = resolve_arms(method, {"kd": Arm(curriculum=None), "all": Arm()}, {})
    assert arms["kd"].method.curriculum is None
    assert arms["all"].method.curriculum.kappa == 0.5


def test_changing_one_setting_keeps_the_others() -> None:
    method = Method.model_validate({"divergence": {"name": "jsd", "beta": 0.2}, "curriculum": {"kappa": 0.5}})
    arm = resolve_arms(method, {"x": Arm(divergence={"weight": 2.0}, curriculum={"shape": "exp"})}, {})["x"].method
    assert (arm.divergence.name, arm.divergence.beta, arm.divergence.weight) == ("jsd", 0.2, 2.0)
    assert (arm.curriculum.kappa, arm.curriculum.shape) == (0.5, "exp")


@pytest.mark.parametrize(
    ("divergence", "problem"),
    [
        ({"name": "jsd", "beta": 1e-7}, "beta 1e-07 gives a loss of nearly 0.*use 0, which is forward KL, or 0.01"),
        ({"name": "jsd", "beta": 0.995}, "use 1, which is reverse KL"),
        ({"name": "alpha_beta", "alpha": 1e-6}, "greater than or equal to 0.05"),
        ({"name": "alpha_beta", "beta": 100}, "less than or equal to 4"),
    ],
)
def test_settings_that_would_train_rounding_are_refused(divergence: dict, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Method.model_validate({"divergence": divergence})
    for beta in (0, 0.01, 0.5, 0.99, 1):
        Method.model_validate({"divergence": {"name": "jsd", "beta": beta}})


def test_another_divergence_replaces_the_name_alone_or_the_whole() -> None:
    method = Method.model_validate({"divergence": {"name": "jsd", "beta": 0.2}})
    assert resolve_arms(method, {"x": Arm(divergence="todi")}, {})["x"].method.divergence.name == "todi"
    with pytest.raises(ValueError, match=r"arms.x.divergence: unknown key `beta`"):
        resolve_arms(method, {"x": Arm(divergence={"name": "todi"})}, {})


def test_training_settings_know_no_name_and_no_role() -> None:
    method = Method.model_validate({"divergence": "forward_kl"})
    arms = resolve_arms(method, {"a": Arm(role="control", ce={}), "b": Arm()}, {})
    assert set(arms["a"].trained_method) == {"divergence", "ce"}
    again = resolve_arms(method, {"c": Arm(role="baseline", ce={})}, {})
    assert again["c"].trained_method == arms["a"].trained_method


def test_difficulty_counts_only_where_it_is_used() -> None:
    method = Method.model_validate({"divergence": "forward_kl"})
    with pytest.raises(ValueError, match=r"arms.b: the same experiment as arms.a"):
        resolve_arms(method, {"a": Arm(), "b": Arm(difficulty={"scale": "logv"})}, {})
    arms = {"a": Arm(curriculum={}), "b": Arm(curriculum={}, difficulty={"scale": "logv"})}
    assert len(resolve_arms(method, arms, {})) == 2


def test_sweeps_expand_to_the_product() -> None:
    arms = {"t": Arm(role="factorial", temperature={})}
    grid = expand_sweeps(arms, {"t": {"temperature.c": [-0.5, 0.25], "temperature.t2": ["linear", "off"]}})
    assert list(grid) == ["t", "t.c=-0.5.t2=linear", "t.c=-0.5.t2=off", "t.c=0.25.t2=linear", "t.c=0.25.t2=off"]
    assert grid["t.c=0.25.t2=off"].patch == {"temperature": {"c": 0.25, "t2": "off"}}
    assert {arm.role for name, arm in grid.items() if name != "t"} == {"control"}


def test_a_mistake_in_a_sweep_is_named_as_one() -> None:
    with pytest.raises(ProblemsError, match=r"sweeps, arm t\.kapa=0\.1\.curriculum: unknown key `kapa`.* `kappa`"):
        resolve_arms(Method(divergence="forward_kl"), {"t": Arm()}, {"t": {"curriculum.kapa": [0.1]}})


def test_sweeps_that_make_no_new_arm_are_refused() -> None:
    arms = {"t": Arm(temperature={}), "t.c=1": Arm(ce={})}
    with pytest.raises(ValueError, match=r"makes an arm `t.c=1`, which is there already"):
        expand_sweeps(arms, {"t": {"temperature.c": [1]}})
    with pytest.raises(ValueError, match="make no arm name; write these arms out"):
        expand_sweeps(arms, {"t": {"divergence": [{"name": "jsd"}]}})

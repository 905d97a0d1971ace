"""Tuning and budgets as settings: every tuned arm has the same number of trials, and nothing else changes."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from entkd.config import Experiment, Training, canonical_json, jobs, load_experiment
from entkd.config.components import Curriculum, Difficulty, Features
from entkd.config.errors import ConfigError
from entkd.config.method import CrossEntropy, ForwardKL
from entkd.config.summary import summary
from entkd.config.tune import draw
from entkd.methods.taid import TAID

ROOT = Path(__file__).parents[1]
DEMO = yaml.safe_load((ROOT / "config/config.yaml").read_text(encoding="utf-8"))
LR = {"training.lr": [5e-4, 1e-3, 2e-3, 4e-3]}
ARMS = ("sft", "kd", "curriculum", "full", "reverse_kl")


def changed(**overrides: Any) -> Experiment:
    return load_experiment(ROOT / "config/config.yaml", overrides)


def tuned(grids: dict[str, list], trials: int = 4, **more: Any) -> Experiment:
    return changed(tune={"trials": trials, "grids": grids} | more)


def points(experiment: Experiment, arm: str) -> list[dict]:
    return [trial.point for trial in experiment.trials[arm]]


VALUES = {
    "training.lr": st.floats(1e-5, 1e-2),
    "training.warmup": st.floats(0, 0.5),
    "training.schedule": st.sampled_from(["constant", "cosine"]),
    "method.curriculum.kappa": st.floats(-1, 1),
    "method.temperature.c": st.floats(-3, 3),
    "method.features.weight": st.floats(0.1, 2),
}
HAS = {"sft": (), "kd": (), "curriculum": ("curriculum",), "full": ("curriculum", "temperature", "features")}


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_every_tuned_arm_has_the_same_number_of_distinct_points_of_its_own_grid(data: st.DataObject) -> None:
    trials = data.draw(st.integers(2, 6))
    keys = data.draw(st.sets(st.sampled_from(sorted(VALUES)))) | {"training.lr"}
    sizes = {key: st.lists(VALUES[key], min_size=1, max_size=5, unique=True) for key in keys}
    sizes["training.lr"] = st.lists(VALUES["training.lr"], min_size=trials, max_size=8, unique=True)
    grids = {key: data.draw(sizes[key], label=key) for key in sorted(keys)}
    arms = data.draw(st.sets(st.sampled_from(sorted(HAS)), min_size=1))
    needed = {f"method.{c}" for arm in arms for c in HAS[arm]}
    grids = {key: v for key, v in grids.items() if key.startswith("training") or key.rpartition(".")[0] in needed}
    tune = {"trials": trials, "seed": data.draw(st.integers(10, 10**6)), "arms": sorted(arms), "grids": grids}
    experiment = Experiment.model_validate(DEMO | {"tune": tune})
    assert set(experiment.trials) == arms
    for arm in arms:
        own = {key for key in grids if key.startswith("training") or key.split(".")[1] in HAS[arm]}
        found = points(experiment, arm)
        assert len(found) == trials
        assert len({canonical_json(point) for point in found}) == trials
        assert all(set(point) == own for point in found)
        assert all(point[key] in grids[key] for point in found for key in own)
        assert len({trial.name for trial in experiment.trials[arm]}) == trials
        # no arm tries a learning rate twice while another arm tries one that it never saw
        assert len({point["training.lr"] for point in found}) == trials


def test_a_round_has_every_value_of_a_key_once() -> None:
    grids = LR | {"method.curriculum.kappa": [0.2, 0.4, 0.6], "method.temperature.c": [-0.5, 0.5]}
    found = points(tuned(grids, arms=["full"]), "full")
    assert sorted(point["training.lr"] for point in found) == sorted(grids["training.lr"])
    assert sorted(Counter(point["method.curriculum.kappa"] for point in found).values()) == [1, 1, 2]
    assert Counter(point["method.temperature.c"] for point in found) == {-0.5: 2, 0.5: 2}


def test_draws_are_uniform_over_seeds() -> None:
    """Which value comes first, and which two come together: 400 seeds, four standard deviations."""
    firsts, pairs = Counter(), Counter()
    grid = {"training.lr": (1, 2, 3, 4), "method.temperature.c": (-1, 1)}
    for seed in range(400):
        first = draw(grid, 2, seed)[0]
        firsts[first["training.lr"]] += 1
        pairs[first["training.lr"], first["method.temperature.c"]] += 1
    assert all(abs(count - 100) < 4 * (400 * 0.25 * 0.75) ** 0.5 for count in firsts.values())
    assert len(pairs) == 8
    assert all(abs(count - 50) < 4 * (400 * 0.125 * 0.875) ** 0.5 for count in pairs.values())


def test_a_key_may_say_whose_it_is() -> None:
    """α of skew_kl is no α of alpha_beta, and β of neither is that of the jsd."""
    arms = {name: {"divergence": name} for name in ("skew_kl", "alpha_beta", "jsd")}
    grids = LR | {
        "method.divergence.skew_kl.alpha": [0.1, 0.3],
        "method.divergence.alpha_beta.alpha": [0.2, 0.9],
        "method.divergence.jsd.beta": [0.5, 0.9],
    }
    experiment = changed(arms=arms, tune={"trials": 4, "grids": grids, "arms": list(arms)})
    for name, key, values in (
        ("skew_kl", "alpha", {0.1, 0.3}),
        ("alpha_beta", "alpha", {0.2, 0.9}),
        ("jsd", "beta", {0.5, 0.9}),
    ):
        found = points(experiment, name)
        assert all(set(point) == {"training.lr", f"method.divergence.{key}"} for point in found)
        assert {point[f"method.divergence.{key}"] for point in found} == values
    # the one that says whose it is goes before the one that does not
    own = LR | {"method.divergence.beta": [0.3, 0.7], "method.divergence.jsd.beta": [0.5, 0.9]}
    experiment = changed(arms=arms, tune={"trials": 4, "grids": own, "arms": ["alpha_beta", "jsd"]})
    assert {point["method.divergence.beta"] for point in points(experiment, "jsd")} == {0.5, 0.9}
    assert {point["method.divergence.beta"] for point in points(experiment, "alpha_beta")} == {0.3, 0.7}


def test_a_key_that_means_two_things_is_refused() -> None:
    arms = {name: {"divergence": name} for name in ("skew_kl", "skew_reverse_kl", "alpha_beta")}
    grids = LR | {"method.divergence.alpha": [0.1, 0.3]}
    with pytest.raises(ConfigError) as caught:
        changed(arms=arms, tune={"trials": 4, "grids": grids, "arms": ["skew_kl", "alpha_beta"]})
    (problem,) = caught.value.problems
    assert "`method.divergence.alpha` is a key of alpha_beta, skew_kl, and not the same in each; write " in problem
    assert "`method.divergence.alpha_beta.alpha` and `method.divergence.skew_kl.alpha`" in problem
    # of one of them alone it is plain, and a weight means the same in all
    changed(arms=arms, tune={"trials": 4, "grids": grids, "arms": ["skew_kl", "kd"]})
    changed(arms=arms, tune={"trials": 4, "grids": LR | {"method.divergence.weight": [0.5, 1.0]}, "arms": list(arms)})
    taid = {"trials": 4, "grids": LR | {"method.approach.taid.start": [0.2, 0.4]}, "arms": ["kd"]}
    with pytest.raises(ConfigError, match=r"no tuned arm has `method\.approach\.taid\.start`"):
        changed(arms=arms, tune=taid)


def test_the_first_trial_is_the_arm_as_it_is_written() -> None:
    """As far as the grids hold what it is written with; the others are drawn, each value still once in a round."""
    grids = LR | {"method.curriculum.kappa": [0.2, 0.8, 0.4], "method.temperature.c": [-0.25, 0.25]}
    assert 1e-3 in LR["training.lr"]
    for seed in (1000, 1001, 1002):
        first, *others = points(tuned(grids, arms=["full"], seed=seed), "full")
        assert first["training.lr"] == 1e-3
        assert first["method.curriculum.kappa"] == 0.8  # the default, which the arm does not spell out
        assert sorted(point["training.lr"] for point in [first, *others]) == sorted(LR["training.lr"])
    firsts = [points(tuned(grids, arms=["full"], seed=seed), "full")[0] for seed in range(9, 19)]
    assert {first["method.temperature.c"] for first in firsts} == {-0.25, 0.25}  # neither is the written 0.5


def test_every_arm_of_tuned_yaml_can_keep_its_published_settings() -> None:
    experiment = load_experiment(ROOT / "config/experiments/tuned.yaml")
    for name, trials in experiment.trials.items():
        written = jobs.arm_settings(experiment, experiment.resolved_arms[name])
        assert jobs.trial_settings(trials[0]) == written, name


def test_a_grid_can_be_tried_out() -> None:
    grids = {"training.lr": [1e-3, 2e-3], "method.curriculum.kappa": [0.4, 0.8], "method.temperature.c": [-0.5, 0.5]}
    found = points(tuned(grids, 8, arms=["full"]), "full")
    assert {tuple(point[key] for key in grids) for point in found} == set(itertools.product(*grids.values()))


def test_points_depend_on_neither_other_arms_nor_the_number_of_trials() -> None:
    grids = LR | {"method.curriculum.kappa": [0.4, 0.6, 0.8]}
    whole = tuned(grids)
    assert points(tuned(grids, arms=["full"]), "full") == points(whole, "full")
    assert points(tuned(grids, 3), "full") == points(whole, "full")[:3]
    assert points(tuned(grids, seed=1001), "full") != points(whole, "full")
    # arms with the same grid are compared at the same points
    assert points(whole, "kd") == points(whole, "reverse_kl") == points(whole, "sft")
    # another value in the grid: the points that are left keep their folders
    more = tuned(grids | {"training.lr": [*grids["training.lr"], 8e-3]})
    names = [{trial.name for trial in experiment.trials["kd"]} for experiment in (whole, more)]
    assert len(names[0] & names[1]) == 3


def test_trials_are_trained_as_the_arm_would_be_written() -> None:
    experiment = tuned(LR | {"method.curriculum.kappa": [0.3]}, arms=["kd", "full"])
    for trial in experiment.trials["full"]:
        told = jobs.trial_settings(trial)
        arms = DEMO["arms"]["full"] | {"curriculum": {"kappa": 0.3}}
        written = changed(training={"lr": trial.point["training.lr"]}, arms={"full": arms})
        assert told == jobs.arm_settings(written, written.resolved_arms["full"])


def test_what_an_arm_sets_itself_is_not_tuned() -> None:
    arms = {"anti": {"curriculum": {"kappa": -0.8}}}
    experiment = changed(arms=arms, tune={"trials": 2, "grids": LR | {"method.curriculum.kappa": [0.4, 0.8]}})
    assert all(set(point) == {"training.lr"} for point in points(experiment, "anti"))
    assert all(set(point) == {"training.lr", "method.curriculum.kappa"} for point in points(experiment, "curriculum"))
    swept = changed(sweeps={"temperature": {"temperature.c": [-0.25]}}, tune={
        "trials": 2, "grids": LR | {"method.temperature.c": [0.5, 0.25]}, "arms": ["temperature", "temperature.c=-0.25"]
    })  # fmt: skip
    assert set(points(swept, "temperature.c=-0.25")[0]) == {"training.lr"}


def test_without_tuning_and_budget_no_job_is_told_anything_new() -> None:
    plain, with_tuning = changed(), tuned(LR, arms=["kd"])
    for name in plain.resolved_arms:
        told = [jobs.arm_settings(e, e.resolved_arms[name]) for e in (plain, with_tuning)]
        assert told[0] == told[1]
        assert set(told[0]["training"]) == {
            "steps", "epochs", "block", "blocks_per_step", "micro_blocks", "lr", "schedule", "warmup", "betas",
            "weight_decay", "clip", "precision", "save_dtype", "eval_every", "checkpoint",
        }  # fmt: skip
    assert set(jobs.analysis_settings(plain)) == {"analysis", "arms", "tasks", "primary"}


def test_check_says_what_each_arm_tries() -> None:
    text = summary(tuned(LR | {"method.curriculum.kappa": [0.4, 0.8]}, arms=["kd", "full"]))
    assert "38 scorings, 8 trials" in text
    assert "kd: training.lr\n" in text
    assert "full: method.curriculum.kappa, training.lr\n" in text
    assert "no trials: sft, seqkd, curriculum" in text
    assert "trials" not in summary(changed())
    assert "training    7 TFLOPs of 2 × 312 tokens" in summary(
        changed(training={"steps": "null", "budget": {"tflops": 7}})
    )


def test_chosen_settings_are_what_the_table_shows() -> None:
    experiment = tuned(LR | {"method.temperature.c": [-0.25, 0.75]}, arms=["temperature", "kd"])
    plain = jobs.figure_settings(experiment)
    words = {arm["name"]: arm["temperature"] for arm in plain["arms"]}
    assert (words["temperature"], words["full"], plain["method"]["temperature"]["c"]) == ("c=0.5", "c=0.5", 0.5)
    chosen = {"kd": {"training.lr": 1e-3}, "temperature": {"training.lr": 1e-3, "method.temperature.c": -0.25}}
    shown = jobs.with_choices(json.loads(canonical_json(plain)), chosen)
    words = {arm["name"]: arm["temperature"] for arm in shown["arms"]}
    assert (words["temperature"], words["full"], words["kd"]) == ("c=-0.25", "c=0.5", "")
    assert shown["method"]["temperature"]["c"] == -0.25
    assert {arm["name"]: arm["role"] for arm in shown["arms"]} == {arm["name"]: arm["role"] for arm in plain["arms"]}


BAD = [
    ({"trials": 5}, "tune: arm kd has 4 points to try, fewer than trials 5; keys that count for it: training.lr (4)."),
    ({"arms": ["kd", "ful"]}, "tune.arms: unknown name `ful`; did you mean `full`?"),
    ({"arms": "al"}, 'tune.arms: "al" must be one of all; did you mean `all`?'),
    ({"arms": []}, "tune.arms: names no arm"),
    ({"arms": ["kd", "kd"]}, "names an arm twice"),
    ({"seed": 1}, "tune.seed: 1 is one of `seeds`"),
    ({"trials": 1}, "tune.trials: 1 must be greater than or equal to 2"),
    ({"grids": {}}, "tune.grids"),
    ({"grids": {"lr": [1]}}, "tune.grids: `lr` is no key of a trial; write `training.lr`"),
    ({"grids": {"training.steps": [1]}}, "`training.steps` cannot be tuned, as every trial has the same budget"),
    ({"grids": {"method.divergence.name": ["tvd"]}}, "`method.divergence.name` says what an arm is"),
    ({"grids": {"training.lr": [None, 1]}}, "`training.lr`: [null, 1] must be a list of numbers or words"),
    ({"grids": {"training.lr": [1e-3, 1e-3]}}, "must be different values"),
    ({"grids": LR | {"method.curriculum.kapa": [1]}}, "no tuned arm has `method.curriculum.kapa`; did you mean"),
    ({"grids": {"training.lr": ["fast", 1e-3]}, "trials": 2}, 'tune: arm kd: training.lr: "fast" must be a number'),
    ({"grids": {"training.lr": [1, 1.0]}, "trials": 2}, 'arm kd: {"training.lr": 1} and {"training.lr": 1.0} are'),
    (
        {"grids": LR | {"method.features.threshold": [0.5]}, "arms": ["full"]},
        "method.features.threshold: 0.5 is below signals.features.threshold 0.8",
    ),
    (
        {"grids": LR | {"method.curriculum.kappa": [2.0]}, "arms": ["full"]},
        "tune: arm full: method.curriculum: kappa 2.0 makes negative soft weights",
    ),
]


@pytest.mark.parametrize(("tune", "message"), BAD)
def test_bad_tuning_is_refused_with_a_reason(tune: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        changed(tune={"trials": 4, "grids": LR} | tune)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arm", "key", "values", "why"),
    [
        (
            {"curriculum": {"shape": "exp"}},
            "method.curriculum.window",
            [0.1, 0.2],
            ": it means nothing with `shape: exp`",
        ),
        (
            {"curriculum": {"shape": "window"}},
            "method.curriculum.kappa",
            [0.2, 0.4],
            ": it means nothing with `shape: w",
        ),
        (
            {"approach": {"name": "adakd", "parts": "focusing"}},
            "method.approach.tempering.c",
            [0.2, 0.3],
            ": it means nothing with `parts: focusing`",
        ),
        ({"features": {"tokens": "random"}}, "method.difficulty.scale", ["rank", "logv"], r"\."),
        ({"features": {"tokens": "random"}}, "method.difficulty.source", ["label_nll", "unigram"], r"\."),
        (
            {"features": {"tokens": "all"}},
            "method.features.threshold_end",
            [0.8, 0.9],
            ": it means nothing with `tokens: all`",
        ),
    ],
)
def test_a_key_that_means_nothing_in_an_arm_is_no_key_of_its_grid(arm: dict, key: str, values: list, why: str) -> None:
    # Each of its values would train the same student: trials in number alone.
    with pytest.raises(ConfigError, match=f"no tuned arm has `{key}`{why}"):
        changed(arms={"x": arm}, tune={"trials": 4, "grids": LR | {key: values}, "arms": ["x", "kd"]})


@pytest.mark.parametrize(
    ("arm", "key", "values"),
    [
        ({"curriculum": {}}, "method.difficulty.source", ["unigram", "teacher_entropy"]),
        ({"features": {}}, "method.features.threshold_end", [0.9, 0.85]),
        ({"features": {"layers": [[0, 9]]}}, "method.features.threshold_end", [0.9, 0.85]),
    ],
)
def test_keys_that_are_not_written_at_their_default_are_tuned(arm: dict, key: str, values: list) -> None:
    def with_arm(arm: dict, **more: Any) -> Experiment:
        return Experiment.model_validate(DEMO | {"arms": {"kd": {}, "x": arm}} | more)

    experiment = with_arm(arm, tune={"trials": 4, "grids": LR | {key: values}})
    assert Counter(point[key] for point in points(experiment, "x")) == dict.fromkeys(values, 2)
    assert all(key not in point for point in points(experiment, "kd"))
    _, block, name = key.split(".")
    for trial in experiment.trials["x"]:
        written = with_arm(arm | {block: arm.get(block, {}) | {name: trial.point[key]}})
        assert trial.arm.trained_method == written.resolved_arms["x"].trained_method


def test_every_key_of_what_an_arm_has_is_known_where_a_grid_is_wrong() -> None:
    arms = {"x": {"curriculum": {}, "features": {}, "ce": {}, "approach": "taid"}}
    with pytest.raises(ConfigError) as caught:
        changed(arms=arms, tune={"trials": 4, "grids": LR | {"method.curriculum.kapa": [1]}, "arms": ["x"]})
    parts = {"divergence": ForwardKL, "ce": CrossEntropy, "curriculum": Curriculum, "features": Features}
    parts |= {"difficulty": Difficulty, "approach": TAID}
    keys = {f"method.{part}.{key}" for part, of in parts.items() for key in of.model_fields}
    idle = {"method.curriculum.window", "method.features.layers"}
    wanted = {key for key in keys - idle if key.rpartition(".")[2] not in ("name", "version")}
    assert set(str(caught.value).partition("Known: ")[2].split(", ")) == wanted


def test_a_choice_of_layers_is_tuned_in_the_words_of_the_arm() -> None:
    """`points` and `layers` both choose the layer pairs: a grid of one is nothing to an arm that has the other."""
    arms = {"kd": {}, "points": {"features": {}}, "layers": {"features": {"layers": [[0, 9]]}}}

    def tune(key: str, values: list, tuned: list[str]) -> Experiment:
        grids = LR | {f"method.features.{key}": values}
        return Experiment.model_validate(DEMO | {"arms": arms, "tune": {"trials": 4, "grids": grids, "arms": tuned}})

    experiment = tune("points", [1, 3], ["points", "layers"])
    assert "method.features.points" in points(experiment, "points")[0]
    assert "method.features.points" not in points(experiment, "layers")[0]
    with pytest.raises(ValueError, match=r"no tuned arm has `method.features.layers`: it means nothing with `points`"):
        tune("layers", [[[0, 9]], [[1, 9]]], ["points"])


def test_a_key_that_every_arm_sets_itself_is_pointed_out() -> None:
    arms = {"curriculum": {"curriculum": {"kappa": 0.8}}}
    grids = LR | {"method.curriculum.kappa": [0.4]}
    with pytest.raises(ConfigError, match=r"`method\.curriculum\.kappa` is set by every arm that has it \(curriculum"):
        changed(arms=arms, tune={"trials": 2, "grids": grids, "arms": ["curriculum", "kd"]})


def test_a_budget_stands_in_for_a_length() -> None:
    assert Training.model_validate({"budget": {"tokens": 20000}}).length == "20,000 tokens"
    assert Training.model_validate({"epochs": 1.5}).length == "1.5 epochs"
    for length, message in (
        ({"budget": {"tokens": 1, "tflops": 2}}, "training.budget: give exactly one of tokens, tflops, seconds; here"),
        ({"budget": {}}, "here are none"),
        ({"budget": {"tokens": 5}, "steps": 45}, "training: give exactly one of steps, epochs and budget"),
        ({"budget": {"flops": 5}}, "training.budget: unknown key `flops`; did you mean `tflops`?"),
    ):
        with pytest.raises(ConfigError) as caught:
            changed(training={"steps": "null"} | length)
        assert message in str(caught.value)
    teacher = {"prepare": "finetune", "finetune": {"block": 312, "budget": {"seconds": 5}}}
    with pytest.raises(ConfigError, match=r"finetune\.budget: seconds are measured for arms alone"):
        changed(teacher=teacher)


def test_tuned_experiment_is_the_demo_but_for_its_tuning() -> None:
    experiment = load_experiment(ROOT / "config/experiments/tuned.yaml")
    demo = changed()
    for block in ("teacher", "data", "signals", "student"):
        assert getattr(experiment, block) == getattr(demo, block), block
    every = load_experiment(ROOT / "config/experiments/baselines.yaml").resolved_arms
    arms = experiment.resolved_arms
    for name in arms.keys() & every.keys():  # the same arms, where both have them
        assert arms[name].trained_method == every[name].trained_method, name
        assert arms[name].pipeline == every[name].pipeline, name

    # One arm of each family of baselines.yaml: components, supervised, sequence-level, divergences, approaches. None of
    # those whose student writes text, which a budget refuses.
    approaches = {name: arm.method.approach.name for name, arm in arms.items() if arm.method.approach}
    assert set(approaches) >= {"adakd", "sekd", "eakd", "bdkd", "taid", "ctkd"}
    assert {"sft", "kd", "full", "seqkd", "reverse_kl", "jsd", "skew_kl"} <= arms.keys() & every.keys()
    assert not any(arm.method.on_policy for arm in arms.values())

    # As many distinct points for each of them, over every learning rate.
    assert set(experiment.trials) == set(arms)
    for name in arms:
        found = points(experiment, name)
        assert len({canonical_json(point) for point in found}) == len(found) == 4, name
        assert {point["training.lr"] for point in found} == set(experiment.tune.grids["training.lr"]), name

    # Every method has keys of its own; that the published value is among those of each is tested above.
    for name in (*approaches, "jsd", "skew_kl"):
        assert len(points(experiment, name)[0]) > 1, f"give {name} a key of its own in tune.grids"
    different = {"steps", "budget", "lr"}
    theirs, ours = (e.training.model_dump(exclude=different) for e in (demo, experiment))
    assert theirs == ours

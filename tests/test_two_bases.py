"""The experiments on two bases, from their files to the table's notes and the figure of the effects."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from entkd.config import Experiment, jobs, load_experiment
from entkd.config.summary import summary
from entkd.design import factorial_of
from entkd.figures.intervals import draw_effects
from entkd.figures.style import STYLE, Study
from entkd.names import COMPONENTS
from entkd.tables import make_tables

matplotlib.use("agg")

ROOT = Path(__file__).parents[1]
TRUE = {"curriculum": 0.02, "temperature": -0.01, "features": 0.06, "reverse_kl": -0.04}
"""Effects of the fake scores, beside `features:reverse_kl`: 0.03."""


def load(name: str, overrides: dict[str, Any] | None = None) -> Experiment:
    return load_experiment(ROOT / f"config/experiments/{name}.yaml", overrides)


def analysed(folder: Path, experiment: Experiment) -> tuple[dict[str, Any], pd.DataFrame, pd.DataFrame, str]:
    """Settings, table, effects and the Markdown, of scores that are the true effects, a seed effect and small noise."""
    settings = jobs.analysis_settings(experiment)
    rng = np.random.default_rng(3)
    levels = {"teacher": 1.0, "untrained": 0.1}
    for name, arm in experiment.resolved_arms.items():
        on = {c: 1 if getattr(arm.method, c) else -1 for c in COMPONENTS}
        on["reverse_kl"] = 1 if arm.method.divergence.name == "reverse_kl" else -1
        levels[name] = 0.5 + sum(size * on[c] / 2 for c, size in TRUE.items())
        levels[name] += 0.03 * on["features"] * on["reverse_kl"] / 2
    rows = [
        {"arm": arm, "seed": seed, "suite": "demo", "task": task["task"], "metric": task["metric"]}
        | {"value": level + 0.01 * seed + 0.001 * rng.normal()}
        for task in settings["tasks"]
        for arm, level in levels.items()
        for seed in ((0,) if arm in ("teacher", "untrained") else experiment.seeds)
    ]
    pd.DataFrame(rows).to_csv(folder / "scores.csv", index=False)
    outputs = {name: folder / name for name in ("table.csv", "table.md", "table.tex", "effects.csv")}
    make_tables(settings, folder / "scores.csv", None, None, *outputs.values())
    text = outputs["table.md"].read_text(encoding="utf-8")
    return settings, pd.read_csv(outputs["table.csv"]), pd.read_csv(outputs["effects.csv"]), text


@pytest.mark.parametrize("name", ["two_bases", "two_bases_half"])
def test_all_but_the_arms_is_the_demo(name: str) -> None:
    """The teacher's signals are addressed by their content: these settings make them the demo's."""
    demo, experiment = load_experiment(ROOT / "config/config.yaml"), load(name)
    for section in ("teacher", "data", "signals", "student", "training", "method", "suites", "analysis", "seeds"):
        assert getattr(experiment, section) == getattr(demo, section), section
    shared = set(demo.resolved_arms) & set(experiment.resolved_arms)
    assert {"kd", "reverse_kl_full"} <= shared
    for arm in shared:
        own, other = experiment.resolved_arms[arm], demo.resolved_arms[arm]
        assert jobs.arm_settings(experiment, own) == jobs.arm_settings(demo, other)


def test_the_half_is_a_half_of_the_whole() -> None:
    whole, half = load("two_bases"), load("two_bases_half")
    assert (len(whole.resolved_arms), len(half.resolved_arms)) == (16, 8)
    for arm, resolved in half.resolved_arms.items():
        assert jobs.arm_settings(half, resolved) == jobs.arm_settings(whole, whole.resolved_arms[arm])
    assert whole.factorial.arms[0] == half.factorial.arms[0] == "kd"
    assert whole.factorial.ends == ("full", "kd")
    assert (whole.factorial.sign, half.factorial.sign) == (0, 1)
    assert jobs.analysis_settings(whole)["primary"] == [*COMPONENTS, "full-kd"]
    assert jobs.analysis_settings(half)["primary"] == [*COMPONENTS]
    assert "design      half fraction, I = curriculum:temperature:features:reverse_kl" in summary(half)
    assert "design " not in summary(whole)


def test_one_base_leaves_the_settings_of_the_analysis_as_they_are() -> None:
    demo = jobs.analysis_settings(load_experiment(ROOT / "config/config.yaml"))
    assert all("base" not in arm for arm in demo["arms"])
    arms = {arm["name"]: arm for arm in jobs.analysis_settings(load("two_bases"))["arms"]}
    assert (arms["full"]["base"], arms["reverse_kl_full"]["base"]) == ("forward_kl", "reverse_kl")


@pytest.mark.parametrize("name", ["two_bases", "two_bases_half"])
def test_tuning_leaves_the_base_a_factor(name: str) -> None:
    """Also where what is tuned is of the base itself: each arm stays in its cell."""
    grids = {"training.lr": [5e-4, 1e-3], "method.divergence.weight": [0.5, 2.0]}
    tuned = load(name, {"tune": {"trials": 2, "grids": grids}})
    settings = jobs.analysis_settings(tuned)
    written = factorial_of(jobs.analysis_settings(load(name))["arms"])
    assert written.factors == (*COMPONENTS, "reverse_kl")
    for trial in range(2):
        chosen = {arm: trials[(trial + number) % 2].point for number, (arm, trials) in enumerate(tuned.trials.items())}
        arms = jobs.with_choices(settings, chosen)["arms"]
        assert factorial_of(arms) == written
        assert {arm["divergence"].partition(" ")[2] for arm in arms} <= {"weight=0.5", "weight=2.0"}


def test_a_base_is_a_divergence_with_its_settings_and_the_other_terms_but_no_difficulty() -> None:
    arms = {
        "weight": {"divergence": {"weight": 2.0}},
        "ce": {"ce": {}},
        "logv": {"curriculum": {}, "difficulty": {"scale": "logv"}},
        "seqkd": {"pipeline": "seqkd"},
    }
    resolved = load("two_bases", {"arms": arms}).resolved_arms
    assert {name: resolved[name].base for name in arms} == {
        "weight": "forward_kl weight=2.0",
        "ce": "forward_kl + ce",
        "logv": "forward_kl",
        "seqkd": "seqkd: forward_kl",
    }


def test_an_arm_on_another_base_is_no_cell_of_a_design_on_one() -> None:
    """`full` on another divergence than the other seven: its difference to them is not the components' alone."""
    mixed = load_experiment(ROOT / "config/config.yaml", {"arms": {"full": {"divergence": "jsd"}}})
    assert mixed.factorial is None
    assert "curriculum + temperature + features on forward_kl" in mixed.lacking_cells
    assert "none: the factorial arms lack" in summary(mixed)


def test_table_and_notes_of_two_bases(tmp_path: Path) -> None:
    settings, table, effects, text = analysed(tmp_path, load("two_bases"))
    own = effects[effects["metric"] == "rougeL"].set_index("effect")
    assert set(own["df"]) == {30}
    assert list(own.index[own["family"] == "primary"]) == settings["primary"]
    for effect, size in (TRUE | {"features:reverse_kl": 0.03, "curriculum:temperature": 0}).items():
        assert own.loc[effect, "estimate"] == pytest.approx(size, abs=2e-3)
    full = table[(table["arm"] == "full") & (table["metric"] == "rougeL")].iloc[0]
    assert full["delta"] == pytest.approx(own.loc["full-kd", "estimate"], rel=1e-6)
    assert full["p_holm"] == own.loc["full-kd", "p_holm"]
    assert "## Effects of the components and their base" in text
    assert (
        "- reverse_kl is the base as a factor: on where the components stand on reverse_kl, off where they stand on "
        "forward_kl. Main effects of components are means over both bases; that of the base is exploratory.\n"
        "- full − kd is on forward_kl. Whether a component helps on both bases is its interaction with reverse_kl: "
        "main effect + interaction is its effect on reverse_kl, main effect − interaction its effect on forward_kl."
    ) in text
    assert "over arms and tasks, except full − kd, which is a declared contrast" in text
    assert "Half fraction" not in text
    kd, features, on_reverse, both = (
        table[(table["arm"] == arm) & (table["metric"] == "rougeL")]["mean"].iloc[0]
        for arm in ("kd", "features", "reverse_kl", "reverse_kl_features")
    )
    main, interaction = own.loc["features", "estimate"], own.loc["features:reverse_kl", "estimate"]
    assert main - interaction == pytest.approx(features - kd, abs=4e-3)  # what the note says
    assert main + interaction == pytest.approx(both - on_reverse, abs=4e-3)


def test_table_and_notes_of_the_half(tmp_path: Path) -> None:
    _, table, effects, text = analysed(tmp_path, load("two_bases_half"))
    own = effects[effects["metric"] == "rougeL"].set_index("effect")
    assert set(own["df"]) == {14}
    assert len(own) == 7
    for effect, size in TRUE.items():
        assert own.loc[effect, "estimate"] == pytest.approx(size, abs=2e-3)
    pair = own.loc["curriculum:temperature = features:reverse_kl"]
    assert pair["estimate"] == pytest.approx(0.03, abs=2e-3)
    assert list(own.index[own["family"] == "primary"]) == [*COMPONENTS]
    assert "| curriculum × temperature = features × reverse_kl | exploratory |" in text
    assert (
        "- Half fraction: 8 of 16 arms, defining relation I = curriculum × temperature × features × reverse_kl, "
        "resolution IV. a × b = c × d is one estimate, of the sum of two interactions that these arms cannot tell "
        "apart."
    ) in text
    assert "is on forward_kl" not in text  # there is no full − kd
    assert "corrected together, over arms and tasks.\n" in text
    tested = table[~table["arm"].isin(["kd", "teacher", "untrained"]) & (table["metric"] == "rougeL")]
    assert tested["p_holm"].notna().all()


def test_the_other_half_has_minus_signs(tmp_path: Path) -> None:
    names = set(load("two_bases").resolved_arms) - set(load("two_bases_half").resolved_arms)
    others = {name: {"role": "control"} for name in load("two_bases_half").resolved_arms}
    experiment = load("two_bases", {"arms": others})
    assert set(experiment.factorial.arms) == names
    _, _, effects, text = analysed(tmp_path, experiment)
    own = effects[effects["metric"] == "rougeL"].set_index("effect")
    pair = own.loc["curriculum:temperature = -features:reverse_kl"]
    assert pair["estimate"] == pytest.approx(-0.03, abs=2e-3)
    assert "| curriculum × temperature = −features × reverse_kl |" in text
    assert "I = −curriculum × temperature × features × reverse_kl" in text
    assert "of the difference of two interactions" in text


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        (
            "two_bases",
            ["3-way interaction without reverse_kl", "4-way interaction", "features × reverse_kl", "full − kd"],
        ),
        (
            "two_bases_half",
            ["curriculum × temperature\n= features × reverse_kl", "curriculum × reverse_kl\n= temperature × features"],
        ),
    ],
)
def test_figure_of_the_effects(tmp_path: Path, name: str, labels: list[str]) -> None:
    """Every effect has a label of its own, and labels on two lines do not touch."""
    settings, table, effects, _ = analysed(tmp_path, load(name))
    study = Study(settings, pd.read_csv(tmp_path / "scores.csv"), table)
    with matplotlib.rc_context(fname=STYLE):
        figure = draw_effects(study, effects)
        figure.draw_without_rendering()
        drawn: list[Text] = list(figure.axes[0].get_yticklabels())
        texts = [label.get_text() for label in drawn]
        assert set(labels) <= set(texts)
        assert len(set(texts)) == len(texts) == effects["effect"].nunique()
        for one, other in itertools.pairwise(drawn):
            assert not one.get_window_extent().overlaps(other.get_window_extent()), (one, other)
            assert one.get_window_extent().x0 >= figure.bbox.x0

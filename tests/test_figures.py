"""The figures, from made-up studies of every size that they promise to hold."""

from __future__ import annotations

import itertools
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from entkd.config import Curriculum, Temperature
from entkd.curriculum import token_weights
from entkd.figures import make_figures
from entkd.figures.cost import draw_cost, spread_out
from entkd.figures.curves import draw_curves
from entkd.figures.dots import draw_tasks
from entkd.figures.entropy import curriculum_weight, draw_entropy, temperature
from entkd.figures.intervals import draw_effects, draw_forest
from entkd.figures.style import STYLE, Study
from entkd.temperature import token_temperature

METHOD = {"curriculum": {"kappa": -0.8}, "temperature": {"t2": "linear"}}
NAMES = ["forest", "tasks", "curves", "effects", "entropy", "cost"]
FORMATS = ["pdf", "png", "svg"]
SIZES = [(3, 1, 1), (12, 3, 5), (40, 5, 6)]
"""Arms, seeds, tasks."""


@cache
def study_of(n_arms: int, n_seeds: int, n_tasks: int) -> dict[str, Any]:
    """Settings and frames of a study of a given size, drawn from a normal model."""
    rng = np.random.default_rng(0)
    roles = ["factorial"] * min(8, n_arms // 2 + 1)
    roles += ["baseline" if place < 12 else "control" for place in range(len(roles), n_arms)]
    names = ["kd", *(f"{role}_{'long_' * (place % 3)}{place}" for place, role in enumerate(roles) if place)]
    on = {"curriculum": "soft κ=-0.8", "temperature": "c=0.5"}
    arms = [
        {"name": name, "role": role} | {key: on[key] if place > shift else "" for shift, key in enumerate(on)}
        for place, (name, role) in enumerate(zip(names, roles, strict=True))
    ]
    scores, table, effects, curves = [], [], [], []
    for task in range(n_tasks):
        key = {"task": f"entkd_some_task_{task}", "metric": "acc" if task % 2 else "bits_per_byte"}
        direction = "higher" if task % 2 else "lower"
        for name, value in (("teacher", 0.9), ("untrained", 3.0)):
            scores.append({"arm": name, "seed": 0, "suite": "all"} | key | {"value": value})
        for place, name in enumerate(names):
            values = 1 + 0.02 * rng.normal() + 0.01 * rng.normal(size=n_seeds)
            scores += [
                {"arm": name, "seed": seed, "suite": "all"} | key | {"value": v} for seed, v in enumerate(values)
            ]
            delta = np.nan if name == "kd" else (5.0 if place == n_arms - 1 else values.mean() - 1)
            cells = {"direction": direction, "n": n_seeds, "mean": values.mean(), "sd": values.std(), "delta": delta}
            interval = {"low": delta - 0.02, "high": delta + 0.02} if n_seeds > 1 else {"low": np.nan, "high": np.nan}
            table.append(
                {"arm": name} | key | cells | interval | {"claim": "better" if place % 4 == 1 else "not shown"}
            )
        for effect in ("curriculum", "temperature", "features", "full-kd", "curriculum:temperature:features"):
            family = "exploratory" if ":" in effect else "primary"
            estimate = 0.01 * rng.normal()
            cells = {"estimate": estimate, "low": estimate - 0.01, "high": estimate + 0.01, "claim": "not shown"}
            effects.append(key | {"effect": effect, "family": family} | cells)
    for name in names:
        table.append(
            {"arm": name, "task": "gap_closed", "metric": "ratio", "mean": rng.random(), "low": 0.1, "high": 0.9}
        )
        for decile in range(1, 11):
            row = {
                "arm": name,
                "seed": 0,
                "suite": "all",
                "task": "entkd_fidelity",
                "metric": f"kl_decile_{decile:02d}",
            }
            scores.append(row | {"value": 0.1 * decile + 0.05 * rng.random()})
        for seed in range(n_seeds):
            for step in range(1, 31):
                row = {"arm": name, "seed": seed, "step": step}
                curves.append(row | {"metric": "loss", "value": 3 / step + 0.1 * rng.normal()})
                if step % 10 == 0:
                    curves.append(row | {"metric": "dev_nll", "value": 3 / step + 0.01 * rng.normal()})
    runs = [
        {"arm": n, "seed": s, "steps": 30, "positions": 15360, "seconds": 30 + rng.random(), "tflops": 12 + i % 3}
        for i, n in enumerate(names)
        for s in range(n_seeds)
    ]
    edges = np.linspace(0, 8, 41)
    histograms = []
    for quantity, width, count in (("entropy", 1.0, np.exp(9 - edges[1:])), ("difficulty", 1 / 8, np.full(40, 100.0))):
        bins = {"left": edges[:-1] * width, "right": edges[1:] * width, "count": count}
        histograms.append(pd.DataFrame({"quantity": quantity} | bins))
    settings = {"analysis": {"reference": "kd", "alpha": 0.05}, "arms": arms}
    frames = {"scores": scores, "table": table, "effects": effects, "curves": curves, "runs": runs}
    return {"settings": settings, "entropy": pd.concat(histograms)} | {
        name: pd.DataFrame(rows) for name, rows in frames.items()
    }


def draw(parts: dict[str, Any], name: str) -> Figure:
    """One figure of a study."""
    study = Study(parts["settings"], parts["scores"], parts["table"])
    with matplotlib.rc_context(fname=STYLE):
        return {
            "forest": lambda: draw_forest(study),
            "tasks": lambda: draw_tasks(study),
            "curves": lambda: draw_curves(study, parts["curves"], parts["runs"]),
            "effects": lambda: draw_effects(study, parts["effects"]),
            "entropy": lambda: draw_entropy(study, parts["entropy"], parts.get("method", METHOD)),
            "cost": lambda: draw_cost(study, parts["runs"]),
        }[name]()


def write(parts: dict[str, Any], folder: Path) -> dict[str, Path]:
    """The study's frames as files."""
    paths = {name: folder / f"{name}.csv" for name in ("scores", "table", "effects", "runs", "curves", "entropy")}
    for name, path in paths.items():
        parts[name].to_csv(path, index=False)
    return paths


def panel(figure: Figure, title: str) -> Axes:
    """The axes with this title."""
    return next(ax for ax in figure.axes if ax.get_title(loc="left") == title)


def markers(ax: Axes) -> dict[int, tuple[float, str]]:
    """Row → value and face colour of the markers in a panel of intervals."""
    drawn = [line for line in ax.lines if line.get_marker() not in ("None", "", None)]
    return {int(line.get_ydata()[0]): (line.get_xdata()[0], to_hex(line.get_markerfacecolor())) for line in drawn}


def tick_labels(ax: Axes) -> list[list[Text]]:
    """The labels drawn on the x and on the y axis."""
    drawn = []
    for axis in (ax.xaxis, ax.yaxis):
        low, high = sorted(axis.get_view_interval())
        ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        drawn.append([tick.label1 for tick in ticks if tick.label1.get_visible() and tick.label1.get_text()])
    return drawn


def test_all_figures_in_all_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = study_of(3, 1, 1)
    paths = write(parts, tmp_path)
    make_figures(parts["settings"], **paths, output=tmp_path / "all")
    assert capsys.readouterr().out == ""
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "all").iterdir()}
    assert sorted(drawn) == sorted(f"{name}.{form}" for name in NAMES for form in FORMATS)

    make_figures(parts["settings"], paths["scores"], paths["table"], None, None, None, None, tmp_path / "few")
    few = {path.name: path.read_bytes() for path in (tmp_path / "few").iterdir()}
    assert sorted(few) == sorted(f"{name}.{form}" for name in ("forest", "tasks") for form in FORMATS)
    assert few == {name: drawn[name] for name in few}  # the same inputs give the same bytes
    needed = [line.split("needs ")[1] for line in capsys.readouterr().out.splitlines()]
    assert needed == ["effects.csv", "curves.csv", "the signals' entropy.csv", "runs.csv"]


def test_two_at_a_time_draw_the_same(tmp_path: Path) -> None:
    parts = study_of(3, 1, 1)
    paths = write(parts, tmp_path)
    for threads in (1, 2):
        make_figures(parts["settings"], **paths, output=tmp_path / str(threads), threads=threads)
    drawn = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("1", "2")]
    assert drawn[0] == drawn[1]
    paths["curves"].write_text("seed,step\n0,1\n", encoding="utf-8")
    with pytest.raises(KeyError, match="arm"):  # an error in a process of its own is one here
        make_figures(parts["settings"], **paths, output=tmp_path / "bad", threads=2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}-arms")
def test_no_text_is_clipped_and_no_tick_labels_touch(size: tuple[int, int, int], name: str) -> None:
    figure = draw(study_of(*size), name)
    figure.draw_without_rendering()
    axes = [ax for ax in figure.axes if ax.get_visible()]
    assert axes
    for ax in axes:
        for labels in tick_labels(ax):
            for one, other in itertools.pairwise(labels):
                assert not one.get_window_extent().overlaps(other.get_window_extent()), (one, other)
        texts = [*ax.texts, ax.xaxis.label, ax.yaxis.label, ax._left_title, *itertools.chain(*tick_labels(ax))]
        texts += ax.get_legend().get_texts() if ax.get_legend() else []
        texts += [text for legend in figure.legends for text in legend.get_texts()]
        for text in filter(Text.get_text, texts):
            box, canvas = text.get_window_extent(), figure.bbox
            assert min(box.x0 - canvas.x0, canvas.x1 - box.x1, box.y0 - canvas.y0, canvas.y1 - box.y1) >= -1, text
    titles = [ax._left_title.get_window_extent() for ax in axes if ax.get_title(loc="left")]
    for one, other in itertools.combinations(titles, 2):
        assert not one.overlaps(other)


@pytest.mark.parametrize("name", ["forest", "tasks"])
def test_many_tasks_with_long_names_keep_their_room_above_two_arms(name: str) -> None:
    study = study_of(3, 1, 1)
    tasks = [f"blimp_coordinate_structure_constraint_object_extraction_{i}" for i in range(15)]
    first = {name: study[name][study[name]["task"] == study[name]["task"].iloc[0]] for name in ("scores", "table")}
    parts = study | {  # a new one: the study is shared by all tests of its size
        name: pd.concat([frame.assign(task=task) for task in tasks], ignore_index=True) for name, frame in first.items()
    }
    figure = draw(parts, name)
    figure.draw_without_rendering()
    boxes = [ax.get_window_extent() for ax in figure.axes]
    titles = [ax._left_title.get_window_extent() for ax in figure.axes]
    labels = [ax.xaxis.label.get_window_extent() for ax in figure.axes]
    assert len(boxes) == 15
    for text in [*titles, *labels]:
        assert not any(text.overlaps(box) for box in boxes)
        assert not any(text.overlaps(legend.get_window_extent()) for legend in figure.legends)
    for title in titles:
        assert not any(title.overlaps(label) for label in labels)


def test_forest_shows_the_tables_differences_and_fills_claims() -> None:
    parts = study_of(12, 3, 5)
    figure = draw(parts, "forest")
    table = parts["table"]
    for task in (0, 1):
        ax = panel(figure, f"some task {task}")
        drawn = markers(ax)
        rows = table[(table["task"] == f"entkd_some_task_{task}") & (table["arm"] != "kd")]
        assert len(drawn) == 11  # the last one is off the scale, at its edge
        for y, (_, row) in enumerate(rows.iloc[:-1].iterrows()):
            assert drawn[y][0] == pytest.approx(row["delta"])
            assert (drawn[y][1] == "#ffffff") == (row["claim"] == "not shown")
        assert [text.get_text() for text in ax.texts if text.get_text()] == ["+5"]
        assert ax.xaxis_inverted() == (task == 0)  # bits per byte: lower is better, and better is to the right


def test_forest_fills_half_where_a_claims_interval_holds_zero() -> None:
    parts = study_of(12, 3, 5)
    table = parts["table"].copy()
    claimed = table["claim"] == "better"
    for end, sign in (("low", -0.5), ("high", 0.5)):  # those of claims leave 0 out
        table.loc[claimed, end] = table["delta"] + sign * table["delta"].abs()
    usual = draw(parts | {"table": table}, "forest")
    first = table.index[claimed & (table["task"] == "entkd_some_task_0")][0]
    table.loc[first, ["delta", "low", "high"]] = [0.01, -0.02, 0.04]
    figure = draw(parts | {"table": table}, "forest")
    ax = panel(figure, "some task 0")
    styles = {line.get_xdata()[0]: line.get_fillstyle() for line in ax.lines if line.get_marker() in "os^"}
    assert styles.pop(0.01) == "left"
    assert set(styles.values()) == {"full"}
    half = "claimed for these items only"
    assert half in [text.get_text() for text in figure.legends[0].get_texts()]
    assert half not in [text.get_text() for text in usual.legends[0].get_texts()]


def test_entropy_figure_says_whose_settings_it_draws() -> None:
    parts = study_of(12, 3, 5)
    figure = draw(parts, "entropy")
    curriculum, tau = panel(figure, "c  curriculum"), panel(figure, "d  temperature")
    names = [arm["name"] for arm in parts["settings"]["arms"]]
    assert curriculum.get_legend().get_title().get_text() == f"arm {names[1]}"
    assert tau.get_legend().get_title().get_text() == f"arm {names[2]}"
    easy = next(line for line in curriculum.lines if line.get_label() == "d = 0.05")
    assert easy.get_ydata()[0] == pytest.approx(1 - 0.8 * 0.9)  # 1 + κ(2u − 1)(2d − 1) at u = 0

    without = parts | {"method": {"curriculum": {}}}
    ax = panel(draw(without, "entropy"), "d  temperature")
    assert not ax.lines
    assert [text.get_text() for text in ax.texts] == ["no arm has\nthis component"]


def test_legend_names_roles_as_the_table_does() -> None:
    parts = study_of(12, 3, 5)
    for name in ("forest", "tasks", "cost"):
        labels = [text.get_text() for text in draw(parts, name).legends[0].get_texts()]
        assert {"factorial", "baseline"} < set(labels)


def test_dots_are_the_scores_and_the_far_untrained_student_is_written() -> None:
    parts = study_of(12, 3, 5)
    ax = panel(draw(parts, "tasks"), "some task 0")
    scores = parts["scores"]
    own = scores[(scores["task"] == "entkd_some_task_0") & (scores["arm"] == "kd")]["value"]
    rows = [line for line in ax.lines if line.get_ydata()[0] == 0 and line.get_marker() in (".", "D")]
    seeds, mean = rows
    assert sorted(seeds.get_xdata()) == pytest.approx(sorted(own))
    assert mean.get_xdata()[0] == pytest.approx(own.mean())
    assert "(untrained: 3)" in ax.get_xlabel()
    assert "teacher" not in ax.get_xlabel()
    assert [0.9, 0.9] in [list(line.get_xdata()) for line in ax.lines]  # the teacher's line


def test_a_task_of_two_suites_keeps_its_suite() -> None:
    parts = study_of(3, 1, 1)
    rename = {"entkd_some_task_0": "all/entkd_some_task_0"}
    ax = panel(draw(parts | {"table": parts["table"].replace({"task": rename})}, "tasks"), "all/some task 0")
    assert {len(line.get_xdata()) for line in ax.lines if line.get_marker() == "."} == {1}


def test_curves_are_drawn_over_positions_with_the_range_of_seeds() -> None:
    parts = study_of(12, 3, 5)
    figure = draw(parts, "curves")
    dev = figure.axes[1]
    line = next(line for line in dev.lines if line.get_label() == "kd")
    assert list(line.get_xdata()) == pytest.approx([5.12, 10.24, 15.36])  # 512 positions a step, in thousands
    own = parts["curves"].query("arm == 'kd' and metric == 'dev_nll' and step == 30")["value"]
    assert line.get_ydata()[-1] == pytest.approx(own.mean())
    bands = [collection.get_paths()[0].get_extents() for collection in dev.collections]
    assert any(band.y0 == pytest.approx(own.min()) for band in bands)


def test_cost_falls_back_to_the_first_task_where_no_gap_is_stated() -> None:
    parts = study_of(12, 3, 5)
    table = parts["table"].copy()
    table.loc[table["task"] == "gap_closed", "mean"] = np.nan
    ax = draw(parts | {"table": table}, "cost").axes[0]
    assert "bits per byte" in ax.get_ylabel()
    first = table[table["task"] == "entkd_some_task_0"]
    assert {line.get_ydata()[0] for line in ax.lines} == set(first["mean"])


def test_cost_of_several_suites_shows_the_first() -> None:
    parts = study_of(12, 3, 5)
    suites = {"gap_closed": "first/gap_closed"}
    first = parts["table"].replace({"task": suites})
    other = first[first["task"] == "first/gap_closed"].assign(task="second/gap_closed", mean=7.0)
    parts = parts | {"table": pd.concat([first, other])}
    ax = draw(parts, "cost").axes[0]
    assert ax.get_ylabel() == "share of the untrained–teacher\ngap closed (first) →"
    assert max(line.get_ydata()[0] for line in ax.lines) <= 1
    assert len([ax for ax in draw(parts, "tasks").axes if ax.get_visible()]) == 5


@pytest.mark.parametrize(
    "settings",
    [
        Curriculum(),
        Curriculum(kappa=-0.8),
        Curriculum(shape="exp", kappa=2),
        Curriculum(shape="exp", kappa=0),
        Curriculum(shape="window"),
        Curriculum(progress="hard"),
    ],
    ids=lambda settings: f"{settings.shape}{settings.kappa:g}{settings.progress}",
)
@pytest.mark.parametrize("progress", [0.0, 0.3, 0.5, 1.0])
def test_weights_are_those_of_training(settings: Curriculum, progress: float) -> None:
    difficulty = (np.arange(20000) + 0.5) / 20000
    drawn = curriculum_weight(difficulty, np.array(progress), settings)
    used = token_weights(torch.tensor(difficulty), 1.0 if settings.progress == "hard" else progress, settings)
    np.testing.assert_allclose(drawn, used.numpy(), atol=1e-3)
    assert drawn.mean() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("settings", [Temperature(), Temperature(base=2, c=-0.5)], ids=["direct", "inverse"])
def test_temperatures_are_those_of_training(settings: Temperature) -> None:
    difficulty = np.linspace(0, 1, 11)
    used = token_temperature(torch.tensor(difficulty), settings)
    np.testing.assert_allclose(temperature(difficulty, settings), used.numpy(), rtol=1e-6)


@given(st.lists(st.floats(0, 1), max_size=40).map(sorted))
def test_names_in_the_margin_keep_their_order_and_distance(wanted: list[float]) -> None:
    heights = spread_out(wanted)
    step = min(0.06, 1 / max(1, len(wanted) - 1))
    assert all(upper - lower >= step - 1e-9 for lower, upper in itertools.pairwise(heights))
    assert all(-1e-9 <= height <= 1 + 1e-9 for height in heights)


def test_figures_need_no_torch() -> None:
    code = "import sys, entkd.figures; sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

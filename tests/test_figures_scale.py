"""What one arm far outside the others does to the figures: nothing to the others, and it is still told."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from test_figures import draw, markers, panel, study_of

from entkd.figures.scale import bulk_limit, short

TASK = "entkd_some_task_0"


@given(st.lists(st.floats(0, 1e6) | st.just(np.nan) | st.just(np.inf), max_size=30))
def test_a_limit_is_a_distance_that_is_there(distances: list[float]) -> None:
    limit = bulk_limit(distances)
    known = [d for d in distances if np.isfinite(d) and d > 0]
    assert limit in known if known else limit == 0
    assert sum(d <= limit for d in known) >= 0.7 * len(known) - 1


def test_most_arms_equal_to_the_reference_leave_the_others_their_place() -> None:
    parts = study_of(12, 3, 5)
    table = parts["table"].copy()
    own = (table["task"] == TASK) & (table["arm"] != "kd")
    table.loc[own, ["delta", "low", "high"]] = 0.0
    table.loc[table.index[own][3], ["delta", "low", "high"]] = [-0.02, -0.03, -0.01]
    ax = panel(draw(parts | {"table": table}, "forest"), "some task 0")
    assert max(ax.get_xlim()) == pytest.approx(1.08 * 0.03)
    assert markers(ax)[3][0] == -0.02
    assert not ax.texts


def test_open_intervals_break_no_scale() -> None:
    parts = study_of(12, 3, 5)
    table = parts["table"].copy()
    own = table.index[(table["task"] == TASK) & (table["arm"] != "kd")]
    table.loc[own[:6], ["low", "high"]] = [-np.inf, np.inf]
    ax = panel(draw(parts | {"table": table}, "forest"), "some task 0")
    assert max(ax.get_xlim()) < 0.2
    assert set(range(6)) <= set(markers(ax))


@pytest.mark.parametrize(
    ("claim", "low", "fill"), [("worse", 3.0, "full"), ("worse", -1.0, "left"), ("not shown", 3.0, "full")]
)
@pytest.mark.parametrize("name", ["forest", "effects"])
def test_a_claim_off_the_scale_is_filled_as_in_the_legend(name: str, claim: str, low: float, fill: str) -> None:
    parts = study_of(12, 3, 5)
    frame, estimate = {"forest": ("table", "delta"), "effects": ("effects", "estimate")}[name]
    own = parts[frame].copy()
    last = own.index[own["task"] == TASK][-1]
    own.loc[last, [estimate, "low", "high", "claim"]] = [5.0, low, 7.0, claim]
    figure = draw(parts | {frame: own}, name)
    figure.draw_without_rendering()
    ax = panel(figure, "some task 0")
    marker = [line for line in ax.lines if line.get_marker() in ("o", "s", "^")][-1]
    assert (marker.get_markerfacecolor() == "white") == (claim == "not shown")
    assert marker.get_fillstyle() == fill
    place = abs(marker.get_xdata()[0]) / max(ax.get_xlim())
    assert 0.5 < place < 1  # near the edge, whole
    (number,) = [text for text in ax.texts if text.get_text() == "+5"]
    arrows = [text for text in ax.texts if isinstance(text, Annotation)]
    assert [arrow.xy[0] for arrow in arrows] == [max(ax.get_xlim())]
    box, drawn = number.get_window_extent(), marker.get_window_extent()
    assert not box.overlaps(drawn)
    assert ax.bbox.x0 < drawn.x0 < drawn.x1 < box.x0 < box.x1 < ax.bbox.x1  # better is to the right, 5 more to the left


def far_dots(values: list[float], untrained: float = 3.0) -> tuple[Axes, list[str]]:
    """The first panel of dots where the last of twelve arms has these values, and the numbers at its edges."""
    parts = study_of(12, 3, 5)
    scores = parts["scores"].copy()
    last = (scores["task"] == TASK) & (scores["arm"] == parts["settings"]["arms"][-1]["name"])
    scores.loc[last, "value"] = values
    scores.loc[(scores["task"] == TASK) & (scores["arm"] == "untrained"), "value"] = untrained
    figure = draw(parts | {"scores": scores}, "tasks")
    figure.draw_without_rendering()
    ax = panel(figure, "some task 0")
    return ax, [text.get_text() for text in ax.texts if text.get_text()]


def test_dots_of_a_diverged_arm_leave_the_others_their_width() -> None:
    ax, numbers = far_dots([400.0, 410.0, 420.0])
    assert numbers == ["410"]
    assert max(ax.get_xlim()) < 1.3
    assert "(untrained: 3)" in ax.get_xlabel()
    last = [line for line in ax.lines if list(line.get_ydata()) == [11]]
    assert len(last) == 1  # its mean, at the edge
    assert max(ax.get_xlim()) - last[0].get_xdata()[0] < 0.2 * np.ptp(ax.get_xlim())


def test_a_diverged_seed_takes_its_mean_to_the_edge_and_leaves_the_other_seeds_in_place() -> None:
    ax, numbers = far_dots([1.02, 0.99, -50.0])
    assert numbers == ["−16"]
    seeds = next(line for line in ax.lines if line.get_marker() == "." and 11 in line.get_ydata())
    assert sorted(seeds.get_xdata()) == [0.99, 1.02]
    number = next(text for text in ax.texts if text.get_text())
    left = ax.transData.transform((0.99, 11))[0]
    assert number.get_window_extent().x1 < left


def test_a_far_arm_within_the_lines_of_teacher_and_untrained_student_is_where_it_is() -> None:
    """An untrained student at 1.17 widens the axis, on which 1.15 then has its place."""
    ax, numbers = far_dots([1.14, 1.15, 1.16], untrained=1.17)
    assert numbers == []
    assert max(ax.get_xlim()) > 1.17
    means = [line for line in ax.lines if list(line.get_ydata()) == [11]]
    assert [line.get_xdata()[0] for line in means] == [pytest.approx(1.15)]


def test_a_far_seed_whose_mean_is_near_is_told() -> None:
    ax, numbers = far_dots([0.93, 0.93, 1.16])
    assert numbers == ["1.16"]
    assert {len(line.get_xdata()) for line in ax.lines if 11 in line.get_ydata() and line.get_marker() == "."} == {1, 2}


def test_equal_seeds_are_not_far_from_themselves() -> None:
    parts = study_of(3, 3, 1)
    scores = parts["scores"].copy()
    scores.loc[(scores["task"] == TASK) & ~scores["arm"].isin(["teacher", "untrained"]), "value"] = 0.1
    ax = panel(draw(parts | {"scores": scores}, "tasks"), "some task 0")
    assert not ax.texts


def cost_of(means: dict[int, float], low: float = 0.1, high: float = 0.9) -> Figure:
    """The cost figure where the arms at some places have other means, and all these ends of the interval."""
    parts = study_of(12, 3, 5)
    table = parts["table"].copy()
    gap = table.index[table["task"] == "gap_closed"]
    table.loc[gap, ["low", "high"]] = [low, high]
    for place, mean in means.items():
        table.loc[gap[place], "mean"] = mean
    figure = draw(parts | {"table": table}, "cost")
    figure.draw_without_rendering()
    return figure


def test_costs_of_a_diverged_arm_leave_the_others_their_height() -> None:
    figure = cost_of({4: -51.4, 7: 33.0})
    names = {text.get_text(): text for text in figure.axes[-1].texts if text.get_text()}
    told = [name.partition(" ")[2] for name in names if " " in name]
    assert sorted(told) == ["(33)", "(−51.4)"]
    for ax in figure.axes:
        low, high = ax.get_ylim()
        assert -1 < low < high < 2
        heights = [line.get_ydata()[0] for line in ax.lines if line.get_marker() in ("D", "o", "s", "^")]
        assert len(heights) == 12
        assert low < heights[4] < min(h for i, h in enumerate(heights) if i != 4)
        assert high > heights[7] > max(h for i, h in enumerate(heights) if i != 7)


@pytest.mark.parametrize("means", [dict.fromkeys(range(12), 0.5), dict.fromkeys(range(1, 12), np.nan)])
def test_costs_of_equal_or_missing_means_are_drawn(means: dict[int, float]) -> None:
    low, high = cost_of(means, np.nan, np.nan).axes[0].get_ylim()
    assert np.isfinite([low, high]).all()
    assert low < high


def bars(ax: Axes) -> list[tuple[float, float]]:
    """The vertical bars of a panel."""
    paths = [path for bar in ax.collections if isinstance(bar, LineCollection) for path in bar.get_paths()]
    return [(path.vertices[0][1], path.vertices[1][1]) for path in paths]


def test_costs_have_the_interval_of_every_arm_on_an_axis_that_shows_it() -> None:
    figure = cost_of({})
    for ax in figure.axes:
        assert bars(ax) == [(0.1, 0.9)] * 12
        assert ax.get_ylim()[0] < 0.1 < 0.9 < ax.get_ylim()[1]
    assert "95 % interval" in [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("place", [None, 5])
def test_open_missing_and_wide_intervals_of_costs_end_with_the_axis(place: int | None) -> None:
    parts = study_of(12, 3, 5)
    table = parts["table"].copy()
    gap = table.index[table["task"] == "gap_closed"]
    table.loc[gap, "mean"] = np.linspace(0.4, 0.6, 12)
    table.loc[gap, ["low", "high"]] = np.c_[np.linspace(0.3, 0.5, 12), np.linspace(0.5, 0.7, 12)]
    wide, missing = gap[place:][:2]
    table.loc[wide, ["low", "high"]] = [-np.inf, 40.0]
    table.loc[missing, ["low", "high"]] = np.nan
    ax = draw(parts | {"table": table}, "cost").axes[0]
    bottom, top = ax.get_ylim()
    assert 0 < bottom < 0.42
    assert 0.7 < top < 1.2
    assert len(bars(ax)) == 11
    assert (bottom, top) in bars(ax)


def test_costs_over_the_first_task_have_no_interval_of_another_quantity() -> None:
    parts = study_of(12, 3, 5)
    table = parts["table"].copy()
    table.loc[table["task"] == "gap_closed", "mean"] = np.nan
    figure = draw(parts | {"table": table}, "cost")
    assert not bars(figure.axes[0])
    assert "95 % interval" not in [text.get_text() for text in figure.legends[0].get_texts()]


def entropy_of(factors: dict[int, float], n_arms: int = 12) -> Figure:
    """The entropy figure where the arms at some places have so many times the KL to the teacher."""
    parts = study_of(n_arms, 3, 5)
    untrained = {"arm": "untrained", "suite": "all", "task": "entkd_fidelity", "metric": "kl_decile_01", "value": 3.0}
    scores = pd.concat([parts["scores"], pd.DataFrame([untrained])], ignore_index=True)
    for place, factor in factors.items():
        own = (scores["task"] == "entkd_fidelity") & (scores["arm"] == parts["settings"]["arms"][place]["name"])
        scores.loc[own, "value"] *= factor
    figure = draw(parts | {"scores": scores}, "entropy")
    figure.draw_without_rendering()
    return figure


def test_deciles_of_diverged_arms_rule_neither_the_colours_nor_the_axis() -> None:
    usual, figure = entropy_of({}), entropy_of({3: 5000.0, 4: 200.0})
    for one in (usual, figure):
        assert 10 < panel(one, "f  relative to kd").images[0].get_clim()[1] < 60
        assert 1 < panel(one, "e  distance to the teacher").get_ylim()[1] < 1.3
    assert "off scale" not in panel(usual, "e  distance to the teacher").get_xlabel()
    names = [arm["name"] for arm in study_of(12, 3, 5)["settings"]["arms"]]
    label = panel(figure, "e  distance to the teacher").get_xlabel()
    assert label.replace("\n", " ").endswith(f"(off scale: {names[3]}, {names[4]})")
    far = {int(text.get_position()[1]): text.get_text() for text in panel(figure, "f  relative to kd").texts}
    assert set(far) == {2, 3}
    assert all(text.startswith("+") and text.endswith(" %") for text in far.values())


def test_a_reference_that_diverged_is_told_as_any_arm() -> None:
    figure = entropy_of({0: 1000.0})
    assert panel(figure, "e  distance to the teacher").get_xlabel().endswith("(off scale: kd)")
    assert 99 < panel(figure, "f  relative to kd").images[0].get_clim()[1] < 101


def test_the_legend_of_distances_covers_no_line() -> None:
    figure = entropy_of({})  # they rise from the lower left
    ax = panel(figure, "e  distance to the teacher")
    box = ax.get_legend().get_window_extent()
    for line in ax.lines:
        points = ax.transData.transform(np.c_[line.get_xdata(), line.get_ydata()])
        assert not box.count_contains(points)


def entropy_without(*places: int) -> Figure:
    """The entropy figure of three arms where those at some places have no scores by decile."""
    parts = study_of(3, 1, 1)
    names = [parts["settings"]["arms"][place]["name"] for place in places]
    scores = parts["scores"]
    scores = scores[~(scores["arm"].isin(names) & (scores["task"] == "entkd_fidelity"))]
    figure = draw(parts | {"scores": scores}, "entropy")
    figure.draw_without_rendering()
    return figure


@pytest.mark.parametrize("places", [(1, 2), (0,)], ids=["reference-alone", "no-reference"])
def test_entropy_of_an_arm_with_none_to_compare_leaves_the_comparison_out(places: tuple[int, ...]) -> None:
    titles = {ax.get_title(loc="left")[:1]: ax for ax in entropy_without(*places).axes}
    assert "".join(sorted(titles)) == "abcde"
    assert titles["e"].lines


@pytest.mark.parametrize(
    ("value", "text"),
    [(5.0, "5"), (-0.12345, "−0.123"), (132.8, "133"), (3333.08, "3333"), (-9.87654e8, "−9.9e8"), (-np.inf, "−∞")],
)
def test_numbers_at_the_edge_are_short(value: float, text: str) -> None:
    assert short(value) == text

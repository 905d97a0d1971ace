"""What one arm far outside the others does to the figures: nothing to the others, and it is still told."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
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


@pytest.mark.parametrize(
    ("value", "text"),
    [(5.0, "5"), (-0.12345, "−0.123"), (132.8, "133"), (3333.08, "3333"), (-9.87654e8, "−9.9e8"), (-np.inf, "−∞")],
)
def test_numbers_at_the_edge_are_short(value: float, text: str) -> None:
    assert short(value) == text

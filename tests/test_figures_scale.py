"""What one arm far outside the others does to the figures: nothing to the others, and it is still told."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_figures import draw, markers, panel, study_of

from entkd.figures.scale import bulk_limit

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

"""What every figure shares: the study's arms and tasks, colours, labels, files.

Colours are Okabe and Ito's palette, told apart with the common colour-vision deficiencies; roles also differ in
marker, and lines of one panel in dash, so that a grey print stays readable.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from entkd.names import COMPONENTS, GAP_CLOSED

STYLE: Final = Path(__file__).parent.parent / "entkd.mplstyle"
TEXT_WIDTH: Final = 7.0
"""Inches; the text block of a paper."""
COLUMN_WIDTH: Final = 3.5
"""Inches; one of two columns."""

BLACK, GREY, LIGHT_GREY = "#000000", "#707070", "#dddddd"
BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, WINE = "#E69F00", "#56B4E9", "#882255"
LINE_COLOURS: Final = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, WINE, GREY)
DASHES: Final[tuple[Any, ...]] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))

ROLE_COLOUR: Final = {"reference": BLACK, "factorial": BLUE, "baseline": VERMILLION, "control": GREEN}
ROLE_MARKER: Final = {"reference": "D", "factorial": "o", "baseline": "s", "control": "^"}
ROLE_LABEL: Final = {
    "reference": "reference arm",
    "factorial": "factorial",
    "baseline": "baseline",
    "control": "control",
}

METRIC_LABEL: Final = {
    "bits_per_byte": "bits per byte",
    "byte_perplexity": "perplexity per byte",
    "word_perplexity": "perplexity per word",
    "perplexity": "perplexity",
    "rougeL": "ROUGE-L",
    "acc": "accuracy",
    "acc_norm": "accuracy (length-normalised)",
    "exact_match": "exact match",
    "kl": "KL (nats per token)",
    "top1_agreement": "top-1 agreement",
}


@dataclass(frozen=True)
class Arm:
    """One arm of the comparison."""

    name: str
    role: str
    """`reference`, `factorial`, `baseline` or `control`."""

    @property
    def colour(self) -> str:
        """Colour of the arm's role."""
        return ROLE_COLOUR[self.role]

    @property
    def marker(self) -> str:
        """Marker of the arm's role."""
        return ROLE_MARKER[self.role]


@dataclass(frozen=True)
class Task:
    """One metric of one task."""

    task: str
    metric: str
    direction: str
    """`higher` or `lower` is better."""

    @property
    def title(self) -> str:
        """The task's name, wrapped to the width of a panel."""
        name = self.task.replace("entkd_", "").replace("_", " ")
        return textwrap.fill(name, 17)

    @property
    def unit(self) -> str:
        """The metric's name with its unit."""
        return METRIC_LABEL.get(self.metric, self.metric.replace("_", " "))

    def axis_label(self, label: str, arrow: str) -> str:
        """``label`` with the unit in the place of ``{unit}``, wrapped to the panel, and the arrow below."""
        return textwrap.fill(label.format(unit=self.unit), 16) + f"\n{arrow}"

    def of(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The rows of ``frame`` that belong to this task and metric."""
        return frame[(frame["task"] == self.task) & (frame["metric"] == self.metric)]


class Study:
    """What is drawn: arms in the order of their roles, tasks in the order of the table, and the two frames.

    ``first_with`` names the first arm of the settings that has a component, or None.
    """

    def __init__(self, settings: Mapping[str, Any], scores: pd.DataFrame, table: pd.DataFrame) -> None:
        self.reference = str(settings["analysis"]["reference"])
        self.alpha = float(settings["analysis"]["alpha"])
        self.table = table
        # Where two suites share a task, the table calls it suite/task.
        named = scores["suite"] + "/" + scores["task"]
        self.scores = scores.assign(task=named.where(named.isin(table["task"]), scores["task"]))
        written = [
            Arm(arm["name"], "reference" if arm["name"] == self.reference else arm["role"]) for arm in settings["arms"]
        ]
        self.first_with = {
            component: next((str(arm["name"]) for arm in settings["arms"] if arm.get(component)), None)
            for component in COMPONENTS
        }
        self.arms = tuple(arm for role in ROLE_COLOUR for arm in written if arm.role == role)

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """Every task and metric of the table except the summaries over a suite."""
        rows = self.table[~self.table["task"].str.endswith(GAP_CLOSED)]
        keys = rows[["task", "metric", "direction"]].drop_duplicates()
        return tuple(Task(*(str(value) for value in key)) for key in keys.itertuples(index=False, name=None))

    def line_style(self, arm: Arm) -> dict[str, Any]:
        """Colour and dash of an arm's line: black for the reference, else by its place among the arms of its role."""
        if arm.role == "reference":
            return {"color": BLACK, "linestyle": "-", "zorder": 3}
        place = [other.name for other in self.arms if other.role == arm.role].index(arm.name)
        return {"color": LINE_COLOURS[place % len(LINE_COLOURS)], "linestyle": DASHES[place % len(DASHES)]}


def number(frame: pd.DataFrame, row: str, column: str) -> float:
    """One cell as a float."""
    cell: Any = frame.at[row, column]
    return float(cell)


LINE_HEIGHT = 0.14
"""Inches of a line of text."""


def grid_of(panels: int) -> tuple[int, int]:
    """Rows and columns of a balanced grid with at most five columns, the most that fit the text's width."""
    rows = -(-panels // 5)
    return rows, -(-panels // rows)


def task_panels(
    tasks: Sequence[Task], rows: Sequence[str], label: str, margin: float
) -> tuple[Figure, list[tuple[Axes, Task]]]:
    """A figure with one panel per task and shared rows, the first row on top.

    A band of panels is as high as its rows (all as high as the label with the most lines), the longest title and the
    longest axis label, which is made from ``label``; ``margin`` inches are for what belongs to the whole figure.
    """
    bands, columns = grid_of(len(tasks))
    width = min(TEXT_WIDTH, COLUMN_WIDTH + 1.6 * (columns - 1))
    lines = sum(max(text.count("\n") + 1 for text in texts) for texts in _texts(tasks, label))
    row_lines = max((row.count("\n") + 1 for row in rows), default=1)
    height = (0.17 + LINE_HEIGHT * (row_lines - 1)) * len(rows) + 0.35 + LINE_HEIGHT * lines
    figure = Figure(figsize=(width, bands * height + margin), layout="constrained")
    axes = figure.subplots(bands, columns, sharey=True, squeeze=False)
    for ax in axes.flat[len(tasks) :]:
        ax.set_visible(False)
    for ax in axes[:, 0]:
        ax.set_yticks(range(len(rows)), rows)
        ax.set_ylim(len(rows) - 0.4, -0.6)
    return figure, list(zip(axes.flat, tasks, strict=False))


def _texts(tasks: Sequence[Task], label: str) -> tuple[list[str], list[str]]:
    return [task.title for task in tasks], [task.axis_label(label, "arrow") for task in tasks]


def few_ticks(ax: Axes) -> None:
    """Two or three round numbers on the x axis of a narrow panel, without trailing zeros, so that they never touch."""
    low, high = sorted(ax.get_xlim())
    values = [v for v in MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= v <= high]
    values = values[:: -(-len(values) // 3)]
    ax.set_xticks(values, [f"{round(value, 10):g}".replace("-", "−") for value in values])


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write ``name``.pdf, .svg and .png. The same figure gives the same bytes: no dates, fixed ids."""
    folder.mkdir(parents=True, exist_ok=True)
    layout = figure.get_layout_engine()
    if layout is not None:
        layout.execute(figure)
    # The layout is slow and is the same for the three formats. While a figure has an engine, be it "none", savefig
    # draws it once more to ask that. None is no engine, but only where the style asks for none: savefig sets it again.
    with matplotlib.rc_context({"figure.constrained_layout.use": False, "figure.autolayout": False}):
        figure.set_layout_engine(None)
        figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        figure.savefig(folder / f"{name}.png")

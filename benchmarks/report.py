"""Tables and figures of the timings, from their rows alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from entkd.figures.style import BLUE, GREY, STYLE, TEXT_WIDTH, save
from entkd.files import replacing

Row = Mapping[str, object]

LABELS = {
    "trl_gkd": "TRL GKDTrainer",
    "plain": "plain Transformers loop",
    "entkd_hidden": "entkd, stored hidden states",
    "entkd_hidden+pass": "the same, with a teacher pass",
    "entkd_logprobs": "entkd, stored log-probabilities",
    "entkd_logprobs+pass": "the same, with a teacher pass",
    "dense": "dense PyTorch",
    "trl_chunked": "TRL, chunked",
    "liger": "Liger, chunked",
    "liger_compiled": "Liger, chunked, compiled",
    "entkd": "entkd",
    "entkd_rounded": "entkd, bf16 logits",
    "products": "the four matrix products alone",
}
"""Competitors in words."""


def label(row: Row) -> str:
    """The competitor in words, or its name."""
    return LABELS.get(str(row["competitor"]), str(row["competitor"]))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column left-aligned, the others right."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def cell(row: Row, key: str, form: str, unit: str = "") -> str:
    """A number in the given format, or a dash where there is none."""
    value = row[key]
    return f"{value:{form}}{unit}" if isinstance(value, (int, float)) else "–"


def between(row: Row, key: str, form: str) -> str:
    """Median with the least and most of the rounds."""
    if not isinstance(row[key], (int, float)):
        return "–"
    return f"{row[key]:{form}} ({row[f'{key}_low']:{form}}–{row[f'{key}_high']:{form}})"


def step_table(summary: Sequence[Row], machine: Mapping[str, str]) -> str:
    """The table of whole steps, one per precision, as docs/performance.md includes it."""
    parts = []
    for precision in dict.fromkeys(row["precision"] for row in summary):
        rows = [
            [
                label(row),
                between(row, "seconds", ".2f"),
                cell(row, "tokens_per_second", ".1f"),
                between(row, "ratio", ".1f"),
                cell(row, "peak_mib", ",.0f"),
                cell(row, "added_mib", ",.0f"),
                cell(row, "efficiency", ".0%"),
            ]
            for row in summary
            if row["precision"] == precision
        ]
        header = [
            str(precision),
            "s per step",
            "response tokens/s",
            "times TRL's speed",
            "peak MiB",
            "of it by steps",
            "efficiency",
        ]
        parts.append(markdown(header, rows))
    rounds = summary[0]["rounds"]
    return "\n".join(parts) + (
        f"\nMedians (least–most) of {rounds} interleaved rounds, {machine['rows per step']} rows a step "
        f"(`{machine['rows']}`); {_where(machine)}. Ratios are taken within a round. Efficiency: the FLOPs that the "
        "step needs (no padding) over its time and the rate of its own matrix products. Peak memory is of a process of "
        "its own.\n"
    )


def head_table(summary: Sequence[Row], machine: Mapping[str, str]) -> str:
    """The table of the head alone."""
    rows = [
        [
            label(row),
            between(row, "seconds", ".2f"),
            between(row, "ratio", ".2f"),
            cell(row, "bound_share", ".0%"),
            cell(row, "dw_error", ".2%"),
            cell(row, "dh_error", ".2%"),
            cell(row, "loss", ".5f"),
            cell(row, "scratch_mib", ",.0f"),
        ]
        for row in summary
    ]
    header = [
        "forward + backward",
        "s",
        "times dense's speed",
        "share of the bound",
        "error of dW",
        "error of dh",
        "KL",
        "scratch MiB",
    ]
    return markdown(header, rows) + (
        f"\nN = {machine['N']}, V = {machine['V']}, width {machine['width']}; medians (least–most) of "
        f"{summary[0]['rounds']} interleaved rounds; {_where(machine)}. Errors are relative to fp64 on the same bf16 "
        "values.\n"
    )


def _where(machine: Mapping[str, str]) -> str:
    return f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}"


def draw_step(summary: Sequence[Row]) -> Figure:
    """Response tokens per second, one panel per precision, the ratio to TRL at each bar."""
    precisions = list(dict.fromkeys(str(row["precision"]) for row in summary))
    panels = [[row for row in summary if row["precision"] == precision] for precision in precisions]
    with matplotlib.rc_context(fname=STYLE):
        figure = Figure(figsize=(TEXT_WIDTH, 0.24 * max(map(len, panels)) + 0.75), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for ax, precision, own in zip(axes, precisions, panels, strict=True):
            _bars(ax, own, "tokens_per_second")
            ax.set_title(f"{precision}; × the speed of TRL")
            ax.set_xlabel("response tokens per second →")
    return figure


def draw_head(summary: Sequence[Row]) -> Figure:
    """Seconds of the head alone, the ratio to dense PyTorch at each bar."""
    with matplotlib.rc_context(fname=STYLE):
        figure = Figure(figsize=(TEXT_WIDTH * 0.7, 0.24 * len(summary) + 0.75), layout="constrained")
        ax = figure.subplots()
        _bars(ax, summary, "seconds")
        ax.set_title("× the speed of dense PyTorch")
        ax.set_xlabel("← seconds, forward and backward")
    return figure


def _bars(ax: Axes, rows: Sequence[Row], key: str) -> None:
    """One bar per competitor, the first on top, its ratio behind it."""
    widths = [float(str(row[key])) for row in rows]
    colours = [BLUE if str(row["competitor"]).startswith("entkd") else GREY for row in rows]
    for bar, row in zip(ax.barh(range(len(rows)), widths, color=colours, height=0.62), rows, strict=True):
        if str(row["competitor"]).endswith("+pass"):
            bar.set_alpha(0.55)
        end = (bar.get_width(), bar.get_y() + bar.get_height() / 2)
        ax.annotate(cell(row, "ratio", ".1f", "×"), end, (3, 0), textcoords="offset points", va="center")
    ax.set_yticks(range(len(rows)), [label(row) for row in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlim(0, 1.18 * max(widths))
    ax.tick_params(axis="y", length=0)


def write_report(folder: Path, name: str, table: str, figure: Figure) -> None:
    """``name``.md and the figure ``name`` as pdf, svg and png."""
    with replacing(folder / f"{name}.md") as temporary:
        temporary.write_text(table, encoding="utf-8")
    with matplotlib.rc_context(fname=STYLE):
        save(figure, folder, name)

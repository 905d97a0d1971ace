"""Wide tables as LaTeX with booktabs rules."""

from __future__ import annotations

import unicodedata

import pandas as pd

from entkd.tables.wide import Wide

SPECIAL = {c: f"\\{c}" for c in "&%$#_{}"} | {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}"}
SPECIAL |= {"^": "\\textasciicircum{}", "<": "$<$", ">": "$>$", "|": "$|$"}
SYMBOLS = {
    "±": "\\pm",
    "−": "-",
    "×": "\\times",
    "✓": "\\checkmark",
    "▲": "\\blacktriangle",
    "▼": "\\blacktriangledown",
    "†": "\\dagger",
}
SYMBOLS |= {"↑": "\\uparrow", "↓": "\\downarrow", "Δ": "\\Delta", "≥": "\\geq", "≤": "\\leq"}
SYMBOLS |= {"α": "\\alpha", "β": "\\beta", "γ": "\\gamma", "κ": "\\kappa", "λ": "\\lambda", "μ": "\\mu", "θ": "\\theta"}
SYMBOLS |= {"τ": "\\tau", "σ": "\\sigma", "²": "^2", "³": "^3"}


def to_latex(tables: list[Wide]) -> str:
    """LaTeX with booktabs rules; needs the packages that its first line names, and any engine."""
    parts = ["% \\usepackage{booktabs,amssymb,graphicx}"]
    for wide in tables:
        cells = wide.cells.map(latex_escape)
        cells.columns = pd.MultiIndex.from_tuples([tuple(latex_escape(part) for part in c) for c in cells.columns])
        if not any(group for group, _ in cells.columns):
            cells.columns = cells.columns.droplevel(0)
        body = cells.style.hide(axis="index").to_latex(
            hrules=True, multicol_align="c", column_format="l" * cells.shape[1]
        )
        parts.append(
            f"\\begin{{table*}}\n\\caption{{{latex_escape(wide.title)}}}\n\\resizebox{{\\textwidth}}{{!}}{{%\n{body}}}\n"
            + "".join(f"\\par\\footnotesize {latex_escape(note)}\n" for note in wide.notes)
            + "\\end{table*}"
        )
    return "\n".join(parts) + "\n"


def latex_escape(text: str) -> str:
    """Text as LaTeX in plain ASCII: special characters escaped, symbols as mathematics, accents dropped.

    A character without a known form becomes `?`, so that the file compiles with every engine.
    """
    out = []
    for character in text:
        if character in SPECIAL:
            out.append(SPECIAL[character])
        elif character in SYMBOLS:
            out.append(f"${SYMBOLS[character]}$")
        elif character.isascii():
            out.append(character)
        else:
            plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
            out.append("".join(SPECIAL.get(c, c) for c in plain) or "?")
    return "".join(out)

"""Puts the tables and figures of `results/bench` into docs/performance.md: `python -m benchmarks.pages`.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`; what is between them is replaced.
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

import pandas as pd

from benchmarks.report import markdown
from entkd.errors import UserError
from entkd.files import replacing

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/performance.md"
FIGURES = ("step", "head", "scaling", "arms")


def table_of(path: Path) -> str:
    """A CSV as a Markdown table, numbers with three digits."""
    frame = pd.read_csv(path, keep_default_na=False)

    def shown(value: object) -> str:
        if isinstance(value, str):  # a column with empty cells is one of texts
            try:
                value = float(value)
            except ValueError:
                return value
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    header = [str(column).replace("_", " ") for column in frame.columns]
    return markdown(header, [[shown(value) for value in row] for row in frame.astype(object).to_numpy().tolist()])


def fill(page: str, name: str, content: str) -> str:
    """The page with another content between the marks of ``name``.

    Raises
    ------
    UserError
        If the page has no such marks.
    """
    marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not marks.search(page):
        raise UserError(f"{PAGE}: no marks <!-- {name} --> and <!-- /{name} -->; put them where the table belongs")
    return marks.sub(lambda found: f"{found[1]}{content.rstrip()}\n{found[2]}", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bench", type=Path, default=ROOT / "results/bench", help="folder of the results")
    bench = parser.parse_args().bench
    page = PAGE.read_text(encoding="utf-8")
    tables = {name: (bench / f"{name}.md", None) for name in ("step", "head")}
    tables |= {
        name: (bench / f"{name}.csv", table_of)
        for name in ("profile", "scaling_head", "scaling_step", "generate", "startup", "arms")
    }
    for name, (path, read) in tables.items():
        if path.is_file():
            page = fill(page, name, read(path) if read else path.read_text(encoding="utf-8"))
        else:
            print(f"{path}: not there; the page keeps its {name} table")
    for name in FIGURES:
        if (bench / f"{name}.png").is_file():
            shutil.copy(bench / f"{name}.png", ROOT / f"docs/images/performance_{name}.png")
    with replacing(PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(f"{PAGE} is up to date")


if __name__ == "__main__":
    main()

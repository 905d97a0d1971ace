"""What the tests say of every method, as a table: `pytest --evidence FILE`, run by `make evidence`.

A test fills cells by the fixture `evidence`, and they count if it passes. A cell that no test fills fails the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from methods.cases import CASES, FURTHER_LOOKS

from entkd.config import DIVERGENCE_NAMES

METHODS = (
    *("sft", "kd", "seqkd"),
    *CASES,
    *("gkd", "distillm", "distillm_paper"),
)
ROWS = (*METHODS, *(row for name in DIVERGENCE_NAMES for row in (name, f"{name}_full")))
NO_ARMS = ("adakd_release", *(f"{name}_paper" for name in ("sekd", "taid", "distillm")))
"""Rows that are no arm of baselines.yaml, as the page says."""
COLUMNS = {
    "reference": "independent reference",
    "loss": "error of the loss",
    "gradient": "error of the gradient",
    "golden": "golden value",
    "resumes": "resumes bit for bit",
    "tiny": "runs in tests/tiny",
}
PAGE = """\
# Evidence for every method

Written by the tests themselves: `make evidence` runs them, takes what each reports if it passes, and fails where a cell
stays empty. Do not edit by hand; the last digit of an error may differ between machines.

- **Independent reference**: what the second implementation of the formula was written from. It is fp64 numpy under
  [tests/references](../tests/references) and imports nothing of `entkd`.
- **Errors**: the largest absolute ones against that reference, over three seeds, of the loss that the training loop
  computes and of its gradient by the student's logits (with features, by its hidden states and the projectors as well),
  in fp64. References of gradients are closed forms or central differences, which are good to about 1e-9. For `gkd`
  and `distillm` it is one real step on text that the student wrote and its gradient by the student's parameters, beside
  plain Transformers calls on the same tokens; the teacher's states are rounded to bf16, as a signal store has them.
- **Golden value**: a fixed number for this version of the formula; a change needs a new version. For methods with a
  schedule of student text, what ten steps train on: `w` new text, `r` text from the buffer, `d` data.
- **Resumes bit for bit**: a run stopped inside a step and continued ends with the weights and the log of one that was
  not stopped.
- **Runs in tests/tiny**: through the real workflow from teacher to table, with weights that no other arm has.

## Methods

Divergence and approach of each row are those of its arm in
[config/experiments/baselines.yaml](../config/experiments/baselines.yaml):
{reverse} are on `reverse_kl`, `gkd` on `jsd`, `distillm` and
`distillm_paper` on `skew_kl`, the others with a divergence on `forward_kl`. What differs from that file:

- {no_arms} are no arms there: `adakd` with
  `detach: false`, the others with `variant: paper`. At a given t, `taid_paper` has the loss of `taid`; what moves its t
  is another measure. The file's `kd_t2` has no row.
- The loss of `seqkd` is that of `sft`, on text of the teacher.
- Errors and golden values of approaches with a state are at one state, as in the midst of a run, such as 62 % of the
  tokens kept. Errors of {both} are the largest over forward and reverse KL.
- Resume and tests/tiny: where the defaults would leave a state as it is within six steps, settings that move it
  (`focusing` of AdaKD, `alpha` of TAID, `share` and `capacity` of DistiLLM), and the student's texts are short. In
  tests/tiny `full` has two points of features, as its teacher has no three.
- Resume of `gkd` is on `forward_kl`, of `distillm` and `distillm_paper` with all components.

{methods}

## Divergences

Each alone, and `_full` with curriculum, temperature and features; these read a difficulty in fp32, from which the error
of their loss comes. `forward_kl` is the arm `kd`, `forward_kl_full` the arm `full`.

{divergences}
"""

Cells = dict[tuple[str, str], str | float]


@pytest.fixture
def evidence(record_property: Callable[[str, object], None]) -> Callable[[str, str, str | float], None]:
    """f(row, column, value): errors are numbers, of which the largest counts; other values are texts."""

    def report(row: str, column: str, value: str | float) -> None:
        assert row in ROWS, f"no row {row} in tests/evidence.py"
        assert column in COLUMNS, column
        # Workers send plain numbers alone to the process that collects them, no numpy ones.
        record_property("evidence", [row, column, value if isinstance(value, str) else float(value)])

    return report


def add(cells: Cells, row: str, column: str, value: str | float) -> None:
    before = cells.get((row, column))
    cells[row, column] = max(before, value) if isinstance(before, float) and isinstance(value, float) else value


def missing(cells: Cells) -> list[str]:
    return [f"{row}: {column}" for row in ROWS for column in COLUMNS if (row, column) not in cells]


def listed(names: Iterable[str]) -> str:
    *others, last = (f"`{name}`" for name in names)
    return f"{', '.join(others)} and {last}"


def page(cells: Cells) -> str:
    """The whole page; every cell has to be there."""

    def table(rows: tuple[str, ...]) -> str:
        lines = [f"| | {' | '.join(COLUMNS.values())} |", "|---" * (1 + len(COLUMNS)) + "|"]
        for row in rows:
            values = (cells[row, column] for column in COLUMNS)
            shown = [
                f"{value:.0e}".replace("0e+00", "0") if isinstance(value, float) else str(value) for value in values
            ]
            lines.append(f"| `{row}` | {' | '.join(shown)} |")
        return "\n".join(lines)

    return PAGE.format(
        methods=table(METHODS),
        divergences=table(ROWS[len(METHODS) :]),
        reverse=listed(name for name, case in CASES.items() if case.divergence == "reverse_kl"),
        no_arms=listed(NO_ARMS),
        both=listed(name.rpartition("_")[0] for name in FURTHER_LOOKS),
    )


class Collector:
    """Gathers the cells of all passed tests, those of other processes too, and writes the page at the end."""

    def __init__(self, path: Path) -> None:
        self.path, self.says = path, ""
        self.cells: Cells = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            for name, value in report.user_properties:
                if name == "evidence":
                    add(self.cells, *value)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        empty = missing(self.cells)
        if exitstatus:
            self.says = f"{self.path} is not written: not all tests passed"
        elif empty:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            self.says = f"{self.path} is not written: no test that ran fills\n  " + "\n  ".join(empty)
        else:
            self.path.write_text(page(self.cells), encoding="utf-8")
            self.says = f"{self.path} is written"

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("evidence")
        terminalreporter.line(self.says)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--evidence", type=Path, metavar="FILE", help="write what the tests say of every method to FILE")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--evidence")
    if path is not None and not hasattr(config, "workerinput"):  # a worker's reports arrive in the main process
        config.pluginmanager.register(Collector(path))

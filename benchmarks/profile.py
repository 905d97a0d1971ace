"""Where the time of entkd's step goes: `python -m benchmarks.profile [--rows FILE]`.

Shares of the profiler's own time, which adds some to every operation: small ones look a little larger than they are.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.inputs import MODES, Steps, prepare_inputs
from benchmarks.step import DTYPES
from benchmarks.timing import write_csv
from benchmarks.trainers import TRAINERS, Trainer
from entkd.errors import UserError

STEP = "whole step"
INSIDE = {
    "_TiledLoss": "output projections and loss",
    "_TiledLossBackward": "output projections and loss",
    "_Attention": "attention",
    "_AttentionBackward": "attention",
    "_Linear": "linear layers",
    "_LinearBackward": "linear layers",
    "Optimizer.step#AdamW.step": "AdamW",
}
"""Operations that are parts of a step with all that they call."""
OWN = {
    "aten::mm": "linear layers",
    "aten::addmm": "linear layers",
    "aten::copy_": "casts and copies",
    "aten::linalg_vector_norm": "norm of the gradient",
}
"""Operations that are counted by their own name."""
REST = "norms, rotary positions, activations and all else"


def part_of(event: FunctionEvent) -> str:
    """The part of a step that an operation belongs to."""
    ancestor: FunctionEvent | None = event
    while ancestor is not None:
        for name in (ancestor.name, ancestor.name.removeprefix("autograd::engine::evaluate_function: ")):
            if name in INSIDE:
                return INSIDE[name]
        ancestor = ancestor.cpu_parent
    return OWN.get(event.name, REST)


def parts(trainer: Trainer, rounds: int) -> dict[str, float]:
    """Seconds per step of every part, the largest first."""
    trainer.step(0)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for number in range(1, rounds + 1):
            with record_function(STEP):
                trainer.step(number)
    seconds: dict[str, float] = defaultdict(float)
    for event in found.events():
        seconds[part_of(event)] += event.self_cpu_time_total / 1e6 / rounds
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__.partition("\n")[0])
    options.add_argument("--rows", type=Path, help="json, jsonl or parquet file; the demo's data where left out")
    options.add_argument("--batch", type=int, default=8, help="rows of a step (%(default)s)")
    options.add_argument("--rounds", type=int, default=7, help="steps (%(default)s)")
    options.add_argument("--precision", choices=DTYPES, default="bf16", help="of the steps (%(default)s)")
    options.add_argument("--results", type=Path, default=Path("results"), help="a prepared experiment (%(default)s)")
    options.add_argument("--cache", type=Path, default=Path("cache/bench"), help="for what is made (%(default)s)")
    options.add_argument("--output", type=Path, default=Path("results/bench"), help="what is written (%(default)s)")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Profile both modes of signals and write the table."""
    args = parser().parse_args(argv)
    try:
        inputs = prepare_inputs(args.results, args.cache, args.rows, 8 * args.batch)
        steps = Steps(inputs.data, args.batch)
        modes = {
            mode: parts(TRAINERS[f"entkd_{mode}"](inputs, steps, DTYPES[args.precision]), args.rounds) for mode in MODES
        }
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows: list[dict[str, object]] = []
    for part in modes[MODES[0]]:
        row: dict[str, object] = {"part": part}
        for mode, seconds in modes.items():
            own = seconds.get(part, 0.0)
            row |= {f"{mode}_ms": round(1e3 * own, 1), f"{mode}_share": round(own / sum(seconds.values()), 3)}
        rows.append(row)
    write_csv(args.output / "profile.csv", rows)
    for row in rows:
        print(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())

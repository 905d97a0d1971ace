"""Whole training steps side by side: `python -m benchmarks.step [--rows FILE] [--precision bf16 fp32]`.

In one run, on the same rows, with the same student and teacher: loss and gradient norm are compared in fp32, then the
trainers take turns, and each runs once more in a process of its own for its peak memory.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.agreement import assert_agreement, relative_differences
from benchmarks.inputs import MODES, Inputs, Steps, prepare_inputs
from benchmarks.memory import Memory, PeakMemory, of_child
from benchmarks.report import draw_step, step_table, write_report
from benchmarks.timing import Linear, Spread, columns, interleave, machine, product_seconds, write_csv
from benchmarks.trainers import REFERENCE, TRAINERS, OneTeacherPass
from benchmarks.work import attention_flops, linear_layers
from entkd.errors import UserError
from entkd.models import load_model

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Row = dict[str, object]


def compare(inputs: Inputs, steps: Steps, names: Sequence[str]) -> None:
    """Loss and gradient norm of the first step in fp32, one trainer after the other; refuses those that differ."""
    found = {name: TRAINERS[name](inputs, steps, torch.float32).loss_and_norm(0) for name in names}
    assert_agreement(found, names[0])
    for name, (loss, norm) in relative_differences(found, names[0]).items():
        values = f"loss {found[name][0]:.6f} nats per token, gradient norm {found[name][1]:.5f}"
        print(f"fp32 {name}: {values}; relative differences {loss:.1e}, {norm:.1e}", file=sys.stderr, flush=True)


class Products:
    """The matrix products of entkd's step alone, of the rounds' own shapes, and how fast they were."""

    def __init__(self, inputs: Inputs, steps: Steps, dtype: torch.dtype) -> None:
        self.steps, self.dtype = steps, dtype
        self.student = load_model(inputs.student)
        self.teacher_width = int(load_model(inputs.teacher).config.hidden_size)
        self.rates: dict[str, list[float]] = {mode: [] for mode in MODES}

    def run(self, number: int) -> None:
        """Measure FLOP/s over all products of the step, in each mode of the signals."""
        trunk_layers, head, teacher_head = self.layers(number)
        own, teacher = product_seconds([*trunk_layers, head], self.dtype), product_seconds([teacher_head], self.dtype)
        flops = sum(layer.flops for layer in [*trunk_layers, head])
        if number:
            self.rates["logprobs"].append(flops / own)
            self.rates["hidden"].append((flops + teacher_head.flops) / (own + teacher))

    def layers(self, number: int) -> tuple[list[Linear], Linear, Linear]:
        """Layers of the trunk, the output projection, and that of the teacher."""
        positions, vocab_size = self.steps.response_tokens(number), self.steps.vocab_size
        return (
            linear_layers(self.student, self.steps.tokens(number), positions),
            Linear(positions, int(self.student.config.hidden_size), vocab_size),
            Linear(positions, self.teacher_width, vocab_size, backward=False),
        )

    def flops(self, number: int, mode: str) -> float:
        """FLOPs that the step needs, attention included."""
        trunk_layers, head, teacher_head = self.layers(number)
        layers = [*trunk_layers, head, *([teacher_head] if mode == "hidden" else [])]
        documents, corpus = self.steps.documents(number), self.steps.corpus
        lengths, responses = corpus.lengths[documents].tolist(), corpus.response_lengths[documents].tolist()
        return sum(layer.flops for layer in layers) + attention_flops(self.student, lengths, responses)


def measure(
    inputs: Inputs, steps: Steps, precision: str, rounds: int, names: Sequence[str], memory: dict[str, Memory]
) -> tuple[list[Row], list[Row]]:
    """Time the trainers in turns.

    Returns
    -------
    tuple
        One row per competitor, for `report.step_table`, and one per competitor and round.
    """
    dtype = DTYPES[precision]
    trainers = {name: TRAINERS[name](inputs, steps, dtype) for name in names}
    runs: dict[str, Callable[[int], None]] = {name: trainer.step for name, trainer in trainers.items()}
    products = Products(inputs, steps, dtype)
    modes = [mode for mode in MODES if f"entkd_{mode}" in names]
    with tempfile.TemporaryDirectory(dir=inputs.signals[MODES[0]].parent) as folder:
        for mode in modes:
            runs[f"pass_{mode}"] = OneTeacherPass(inputs, steps, dtype, mode, Path(folder)).run
        seconds = interleave(runs | {"products": products.run}, rounds)
    numbers = range(1, rounds + 1)
    tokens = [steps.response_tokens(number) for number in numbers]
    efficiency = {
        f"entkd_{mode}": [
            products.flops(number, mode) / (seconds[f"entkd_{mode}"][number - 1] * products.rates[mode][number - 1])
            for number in numbers
        ]
        for mode in modes
    }
    for mode in modes:
        both = zip(seconds[f"entkd_{mode}"], seconds[f"pass_{mode}"], strict=True)
        seconds[f"entkd_{mode}+pass"] = [step + one_pass for step, one_pass in both]
    order = [name for own in names for name in (own, f"{own}+pass") if name in seconds]
    summary, every = [], []
    for name in order:
        own = memory.get(name)
        reference = memory.get(REFERENCE)
        summary.append(
            {
                "precision": precision,
                "competitor": name,
                "rounds": rounds,
                **columns(seconds[name], seconds.get(REFERENCE)),
                "tokens_per_second": Spread.of(n / s for n, s in zip(tokens, seconds[name], strict=True)).median,
                "loaded_mib": own.loaded if own else "",
                "peak_mib": own.peak if own else "",
                "added_mib": own.added if own else "",
                "peak_share": own.peak / reference.peak if own and reference else "",
                "efficiency": Spread.of(efficiency[name]).median if name in efficiency else "",
            }
        )
    for name in [*order, *(f"pass_{mode}" for mode in modes)]:
        for number in numbers:
            sizes = {"response_tokens": tokens[number - 1], "tokens": steps.tokens(number)}
            every.append(
                {"precision": precision, "competitor": name, "round": number, **sizes}
                | {"seconds": seconds[name][number - 1]}
            )
    return summary, every


def run_once(inputs: Inputs, steps: Steps, name: str, precision: str, rounds: int) -> None:
    """Some steps of one trainer, or passes of the teacher, and the peak memory of this process."""
    dtype, passes = DTYPES[precision], {f"pass_{mode}": mode for mode in MODES}
    with tempfile.TemporaryDirectory(dir=inputs.signals[MODES[0]].parent) as folder:
        if name in passes:
            run = OneTeacherPass(inputs, steps, dtype, passes[name], Path(folder)).run
        else:
            run = TRAINERS[name](inputs, steps, dtype).step
        watch = PeakMemory()
        for number in range(rounds):
            run(number)
        watch.report()


def memories(names: Sequence[str], shared: Sequence[str], precision: str) -> dict[str, Memory]:
    """Peak memory of each competitor, measured one at a time."""
    found = {}
    for name in [*names, *(f"pass_{mode}" for mode in MODES if f"entkd_{mode}" in names)]:
        own = ["--only", name, "--rounds", "2", "--memory", "--precision", precision]
        found[name] = of_child("benchmarks.step", [*own, *shared])
    for mode in MODES:
        if f"pass_{mode}" in found:  # another process than the training, so the larger peak counts
            step, one_pass = found[f"entkd_{mode}"], found[f"pass_{mode}"]
            found[f"entkd_{mode}+pass"] = max(step, one_pass, key=lambda memory: memory.peak)
    return found


def write(output: Path, summary: Sequence[Row], every: Sequence[Row], where: dict[str, str]) -> None:
    """Files, table and figure of what was measured so far."""
    write_csv(output / "step.csv", summary)
    write_csv(output / "step_rounds.csv", every)
    write_csv(output / "step_machine.csv", [{"what": what, "value": value} for what, value in where.items()])
    write_report(output, "step", step_table(summary, where), draw_step(summary))


def missing_package(error: ImportError) -> str:
    """What to do about a competitor that is not installed."""
    return f"error: {error}; `make bench` installs the public trainers, or leave theirs out: --only NAME ..."


def parser() -> argparse.ArgumentParser:
    """The command line."""
    known = [*TRAINERS, *(f"pass_{mode}" for mode in MODES)]
    options = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.partition("\n")[0])
    options.add_argument("--rows", type=Path, help="json, jsonl or parquet file; the demo's data where left out")
    options.add_argument("--batch", type=int, default=8, help="rows of a step (%(default)s)")
    options.add_argument("--rounds", type=int, default=7, help="timed steps of each trainer (%(default)s)")
    options.add_argument("--precision", nargs="+", choices=DTYPES, default=["bf16"], help="of the timed steps")
    options.add_argument("--only", nargs="+", choices=known, help="competitors; all where left out")
    options.add_argument("--memory", action="store_true", help="only the peak memory of the one in --only")
    options.add_argument("--results", type=Path, default=Path("results"), help="a prepared experiment (%(default)s)")
    options.add_argument("--cache", type=Path, default=Path("cache/bench"), help="for what is made (%(default)s)")
    options.add_argument("--output", type=Path, default=Path("results/bench"), help="what is written (%(default)s)")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, time, measure memory, write."""
    args = parser().parse_args(argv)
    names = args.only or list(TRAINERS)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        # As many rows in a child as in its parent, so that both find the same data.
        inputs = prepare_inputs(args.results, args.cache, args.rows, 8 * args.batch)
        steps = Steps(inputs.data, args.batch)
        if args.memory:
            run_once(inputs, steps, names[0], args.precision[0], args.rounds)
            return 0
        compare(inputs, steps, names)
        shared = ["--batch", str(args.batch), "--results", str(args.results), "--cache", str(args.cache)]
        shared += ["--rows", str(args.rows)] if args.rows else []
        summary: list[Row] = []
        every: list[Row] = []
        for precision in args.precision:
            memory = memories(names, shared, precision)
            rows, rounds = measure(inputs, steps, precision, args.rounds, names, memory)
            summary, every = summary + rows, every + rounds
            where = machine() | {"rows": args.rows.name if args.rows else "demo", "rows per step": str(args.batch)}
            write(args.output, summary, every, where)
    except ImportError as error:
        print(missing_package(error), file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print((args.output / "step.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

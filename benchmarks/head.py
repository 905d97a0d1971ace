"""The output projections and the loss alone, forward and backward: `python -m benchmarks.head`.

In one run, on the same tensors: loss and gradient norm are compared in fp32, errors are taken against fp64 on the same
bf16 values, then the competitors take turns beside the four matrix products that each of them has to make.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.agreement import assert_agreement
from benchmarks.heads import HEADS, REFERENCE, Case, relative_error
from benchmarks.memory import Memory, PeakMemory, of_child
from benchmarks.report import draw_head, head_table, write_report
from benchmarks.step import missing_package
from benchmarks.timing import Linear, columns, interleave, machine, product_seconds, ratios, write_csv
from entkd.errors import UserError

PRODUCTS = "products"
"""The four matrix products alone: the bound of every head."""
Row = dict[str, object]


def compare(case: Case, names: Sequence[str], tokens: int = 256) -> None:
    """Loss and norm of dh and dW in fp32 on the first tokens; refuses heads that differ."""
    part, found = case.first(tokens).to(torch.float32), {}
    for name in names:
        loss, hidden_grad_ND, weight_grad_VD = part.gradients(HEADS[name])
        norm = torch.linalg.vector_norm(torch.stack([hidden_grad_ND.norm(), weight_grad_VD.norm()]))
        found[name] = float(loss), float(norm)
        print(f"fp32 {name}: KL {found[name][0]:.7f}, gradient norm {found[name][1]:.7g}", file=sys.stderr, flush=True)
    assert_agreement(found, names[0])
    torch.compiler.reset()  # what was compiled for these shapes would make the timed ones compile as dynamic


def measure(case: Case, rounds: int, names: Sequence[str], memory: dict[str, Memory]) -> tuple[list[Row], list[Row]]:
    """One row per competitor, for `report.head_table`, and one per competitor and round."""
    loss, hidden_grad_ND, weight_grad_VD = case.exact()
    errors: dict[str, tuple[float, float, float]] = {}
    for name in names:
        own_loss, own_hidden_ND, own_weight_VD = case.gradients(HEADS[name])
        hidden_error = relative_error(own_hidden_ND, hidden_grad_ND)
        errors[name] = float(own_loss), hidden_error, relative_error(own_weight_VD, weight_grad_VD)
    del hidden_grad_ND, weight_grad_VD, own_weight_VD
    n_tokens, width = case.hidden_ND.shape
    vocab_size, teacher_width = case.teacher_VE.shape
    layers = [Linear(n_tokens, width, vocab_size), Linear(n_tokens, teacher_width, vocab_size, backward=False)]
    products: list[float] = []

    def run_products(number: int) -> None:
        seconds = product_seconds(layers, case.weight_VD.dtype)
        if number:
            products.append(seconds)

    runs: dict[str, Callable[[int], object]] = {
        name: lambda _number, name=name: case.gradients(HEADS[name])  # type: ignore[misc]
        for name in names
    }
    seconds = interleave(runs | {PRODUCTS: run_products}, rounds) | {PRODUCTS: products}
    summary: list[Row] = []
    for name in [*names, PRODUCTS]:
        own = memory.get(name)
        found = errors.get(name)
        summary.append(
            {
                "competitor": name,
                "rounds": rounds,
                **columns(seconds[name], seconds.get(REFERENCE)),
                "bound_share": ratios(products, seconds[name]).median,
                "loss": found[0] if found else loss,
                "dh_error": found[1] if found else "",
                "dw_error": found[2] if found else "",
                "scratch_mib": own.added if own else "",
                "peak_mib": own.peak if own else "",
            }
        )
    every: list[Row] = [
        {"competitor": name, "round": number, "seconds": value}
        for name in seconds
        for number, value in enumerate(seconds[name], start=1)
    ]
    return summary, every


def run_once(case: Case, name: str, rounds: int) -> None:
    """One head some times, and the peak memory of this process; a compiled one is compiled before."""
    compiled = name.endswith("compiled")
    if compiled:
        case.gradients(HEADS[name])
    watch = PeakMemory()
    for _ in range(rounds):
        case.gradients(HEADS[name])
    watch.report()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.head", description=__doc__.partition("\n")[0])
    options.add_argument("--tokens", type=int, default=2048, help="N (%(default)s)")
    options.add_argument("--vocabulary", type=int, default=49152, help="V (%(default)s)")
    options.add_argument("--width", type=int, default=576, help="of student and teacher (%(default)s)")
    options.add_argument("--rounds", type=int, default=7, help="timed calls of each competitor (%(default)s)")
    options.add_argument("--only", nargs="+", choices=HEADS, help="competitors; all where left out")
    options.add_argument("--memory", action="store_true", help="only the peak memory of the one in --only")
    options.add_argument("--output", type=Path, default=Path("results/bench"), help="what is written (%(default)s)")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, measure memory, time, write."""
    args = parser().parse_args(argv)
    names = args.only or list(HEADS)
    shape = (args.tokens, args.vocabulary, args.width)
    try:
        case = Case.draw(*shape, torch.bfloat16)
        if args.memory:
            run_once(case, names[0], args.rounds)
            return 0
        compare(case, names)
        sizes = ["--tokens", str(shape[0]), "--vocabulary", str(shape[1]), "--width", str(shape[2])]
        memory = {
            name: of_child("benchmarks.head", ["--only", name, "--memory", "--rounds", "2", *sizes]) for name in names
        }
        summary, every = measure(case, args.rounds, names, memory)
    except ImportError as error:
        print(missing_package(error), file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_csv(args.output / "head.csv", summary)
    write_csv(args.output / "head_rounds.csv", every)
    where = machine() | {"N": f"{shape[0]:,}", "V": f"{shape[1]:,}", "width": str(shape[2])}
    write_csv(args.output / "head_machine.csv", [{"what": what, "value": value} for what, value in where.items()])
    write_report(args.output, "head", head_table(summary, where), draw_head(summary))
    print((args.output / "head.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

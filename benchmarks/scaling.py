"""How time and memory of the head grow with tokens and vocabulary, and the step with sequence length.

``python -m benchmarks.scaling``. Beside every time stands the bound: analytic FLOPs of the matrix products over the
rate that the same products reached alone in the same run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.heads import HEADS, Case
from benchmarks.inputs import Inputs, prepare_inputs
from benchmarks.memory import of_child
from benchmarks.timing import Linear, Spread, interleave, product_seconds, ratios, write_csv
from benchmarks.work import attention_flops, linear_layers
from entkd.config import Method, Training
from entkd.data.packing import Batch
from entkd.distill.micro_batch import MicroBatch
from entkd.distill.objective import Objective
from entkd.distill.optim import build_optimizer, clip_gradients
from entkd.figures.style import BLACK, BLUE, GREY, STYLE, TEXT_WIDTH, save
from entkd.models import load_model, prepare_for_cpu

WIDTH = 576
TOKENS = (128, 512, 1024, 2048, 4096)
VOCABULARIES = (8192, 32768, 49152, 98304, 151936)
LENGTHS = (64, 128, 256, 512, 1024)
STEP_TOKENS = 1024
"""Tokens of a step, whatever the length of its sequences."""


def head_row(tokens: int, vocabulary: int, rounds: int, with_dense: bool) -> dict[str, object]:
    """Seconds of the head at one size, its bound, and the memory that it takes."""
    case = Case.draw(tokens, vocabulary, WIDTH, torch.bfloat16)
    names = ["entkd", "dense"] if with_dense else ["entkd"]
    products = [Linear(tokens, WIDTH, vocabulary), Linear(tokens, WIDTH, vocabulary, backward=False)]
    bound: list[float] = []

    runs: dict[str, Callable[[int], object]] = {
        name: lambda _number, name=name: case.gradients(HEADS[name])  # type: ignore[misc]
        for name in names
    }
    runs["products"] = lambda _: bound.append(product_seconds(products, torch.bfloat16))
    seconds = interleave(runs, rounds)
    sizes = ["--tokens", str(tokens), "--vocabulary", str(vocabulary), "--width", str(WIDTH)]
    memory = {
        name: of_child("benchmarks.head", ["--only", name, "--memory", "--rounds", "2", *sizes]).added for name in names
    }
    return {
        "tokens": tokens,
        "vocabulary": vocabulary,
        "entkd_seconds": Spread.of(seconds["entkd"]).median,
        "dense_seconds": Spread.of(seconds["dense"]).median if with_dense else "",
        "bound_seconds": Spread.of(bound[1:]).median,
        "efficiency": ratios(bound[1:], seconds["entkd"]).median,
        "entkd_mib": memory["entkd"],
        "dense_mib": memory.get("dense", ""),
    }


def step_row(inputs: Inputs, length: int, rounds: int) -> dict[str, object]:
    """Seconds of a step of `STEP_TOKENS` tokens in sequences of one length, half of them response."""
    student, teacher = load_model(inputs.student).train(), load_model(inputs.teacher)
    head_UE = teacher.get_output_embeddings().weight.detach().bfloat16()
    vocabulary, width = head_UE.shape
    prepare_for_cpu(student, torch.bfloat16)
    objective = Objective(student, Method.model_validate({"divergence": "forward_kl"}), vocabulary, head_UE)
    training = Training(steps=1)
    optimizer = build_optimizer(student, None, training, None)
    rows, positions = STEP_TOKENS // length, STEP_TOKENS // 2
    generator = torch.Generator().manual_seed(0)
    ids_BL = torch.randint(3, vocabulary, (rows, length), generator=generator)
    response_N = torch.arange(STEP_TOKENS).view(rows, length)[:, length // 2 :].reshape(-1)
    batch = Batch(
        ids_BL, torch.arange(length).expand(rows, length), response_N, ids_BL.view(-1)[response_N], response_N
    )
    micro = MicroBatch(batch, torch.randn(positions, width, generator=generator).bfloat16())

    def step(_: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = objective(micro, positions, 0)
        losses["loss"].backward()
        clip_gradients(student, None, training.clip, optimizer)
        optimizer.step()

    layers = linear_layers(student, STEP_TOKENS, positions)
    layers += [Linear(positions, width, vocabulary), Linear(positions, width, vocabulary, backward=False)]
    alone: list[float] = []
    runs = {"step": step, "products": lambda _: alone.append(product_seconds(layers, torch.bfloat16))}
    seconds = interleave(runs, rounds)["step"]
    # Attention's products are not among the layers: all FLOPs at the layers' rate.
    of_layers = sum(layer.flops for layer in layers)
    flops = of_layers + attention_flops(student, [length] * rows, [length - length // 2] * rows)
    bound = [own * flops / of_layers for own in alone[1:]]
    return {
        "length": length,
        "tokens": STEP_TOKENS,
        "seconds": Spread.of(seconds).median,
        "bound_seconds": Spread.of(bound).median,
        "efficiency": ratios(bound, seconds).median,
    }


def figure(head: Sequence[Mapping[str, Any]], step: Sequence[Mapping[str, Any]]) -> Figure:
    """Head against tokens, against vocabulary, its memory, and step against length."""
    by_tokens = [row for row in head if row["vocabulary"] == 49152]
    by_vocabulary = sorted((row for row in head if row["tokens"] == 512), key=lambda row: int(row["vocabulary"]))
    with matplotlib.rc_context(fname=STYLE):
        chart = Figure(figsize=(TEXT_WIDTH, 0.68 * TEXT_WIDTH), layout="constrained")
        axes = chart.subplots(2, 2)
        panels: list[tuple[Axes, Sequence[Mapping[str, Any]], str, str, str]] = [
            (axes[0, 0], by_tokens, "tokens", "seconds", "head, V = 49,152: tokens"),
            (axes[0, 1], by_vocabulary, "vocabulary", "seconds", "head, N = 512: vocabulary"),
            (axes[1, 0], by_tokens, "tokens", "mib", "head, V = 49,152: tokens"),
        ]
        for ax, rows, size, what, label in panels:
            sizes = [row[size] for row in rows]
            ax.plot(sizes, [row[f"entkd_{what}"] for row in rows], "o-", color=BLUE, label="entkd")
            dense = [(row[size], row[f"dense_{what}"]) for row in rows if row[f"dense_{what}"] != ""]
            if dense:
                ax.plot(*zip(*dense, strict=True), "o-", color=GREY, label="dense PyTorch")
            if what == "seconds":
                ax.plot(sizes, [row["bound_seconds"] for row in rows], "--", color=BLACK, label="products alone")
            ax.set(xlabel=label, ylabel=what.replace("mib", "MiB beyond the inputs"), xlim=(0, None), ylim=(0, None))
            ax.xaxis.set_major_formatter("{x:,.0f}")
            ax.locator_params(axis="x", nbins=5)
            ax.legend()
        ax, lengths = axes[1, 1], [row["length"] for row in step]
        ax.plot(lengths, [row["seconds"] for row in step], "o-", color=BLUE, label="entkd")
        ax.plot(lengths, [row["bound_seconds"] for row in step], "--", color=BLACK, label="all products alone")
        ax.set(xlabel=f"sequence length, {STEP_TOKENS} tokens a step", ylabel="seconds", xlim=(0, None), ylim=(0, None))
        ax.legend()
    return chart


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write, draw."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.partition("\n")[0])
    options.add_argument("--rounds", type=int, default=5, help="timed turns at each size (%(default)s)")
    options.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="N, at V = 49,152")
    options.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES, help="V, at N = 512")
    options.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="sequence lengths of a step")
    options.add_argument("--results", type=Path, default=Path("results"), help="a prepared experiment (%(default)s)")
    options.add_argument("--cache", type=Path, default=Path("cache/bench"), help="for what is made (%(default)s)")
    options.add_argument("--output", type=Path, default=Path("results/bench"), help="what is written (%(default)s)")
    args = options.parse_args(argv)
    sizes = dict.fromkeys([(n, 49152) for n in args.tokens] + [(512, v) for v in args.vocabularies])
    # Dense logits and their gradients at 4,096 × 49,152 alone take 6 GiB.
    head = [head_row(*size, args.rounds, with_dense=size[0] <= 2048 and size[1] <= 49152) for size in sizes]
    inputs = prepare_inputs(args.results, args.cache, None, 64)
    step = [step_row(inputs, length, args.rounds) for length in args.lengths]
    write_csv(args.output / "scaling_head.csv", head)
    write_csv(args.output / "scaling_step.csv", step)
    with matplotlib.rc_context(fname=STYLE):
        save(figure(head, step), args.output, "scaling")
    for row in [*head, *step]:
        shown = (f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
        print(", ".join(shown))
    return 0


if __name__ == "__main__":
    sys.exit(main())

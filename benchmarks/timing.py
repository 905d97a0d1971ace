"""Timings that can be compared: interleaved rounds, medians, and what the machine's matrix products take beside them.

One machine, one process: competitors take turns (A B C A B C ...), so that whatever slows the machine down for a while
slows all of them, and ratios are taken within a round.
"""

from __future__ import annotations

import csv
import gc
import importlib.metadata
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from entkd.files import replacing
from entkd.machine import memory_mib
from entkd.provenance import device_name, git_sha, versions

Clock = Callable[[], float]


def interleave(
    competitors: Mapping[str, Callable[[int], object]], rounds: int, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every competitor in every round.

    Parameters
    ----------
    competitors
        Name → what is timed, called with the number of the round. The warm-up round is number 0 and is not kept;
        the others are 1 to ``rounds``.
    clock
        Seconds from any start.
    """
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for number in range(rounds + 1):
        for name, run in competitors.items():
            gc.collect()  # nobody pays for another's garbage
            began = clock()
            run(number)
            ended = clock()
            if number:
                seconds[name].append(ended - began)
    return seconds


@dataclass(frozen=True)
class Spread:
    """Median, least and most of some rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value."""
        found = list(values)
        return cls(statistics.median(found), min(found), max(found))


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Of the quotients within each round: what slows down a whole round cancels."""
    return Spread.of(above / below for above, below in zip(numerator, denominator, strict=True))


def columns(seconds: Sequence[float], reference: Sequence[float] | None) -> dict[str, object]:
    """Of a table of timings: seconds, and how many times faster than the reference, as medians with least and most."""
    spreads = {"seconds": Spread.of(seconds), "ratio": None if reference is None else ratios(reference, seconds)}
    return {
        f"{name}{suffix}": "" if spread is None else getattr(spread, part)
        for name, spread in spreads.items()
        for suffix, part in (("", "median"), ("_low", "low"), ("_high", "high"))
    }


@dataclass(frozen=True)
class Linear:
    """A linear layer of a training step, as matrix products: y = x Wᵀ, and dx = dy W and dW = dyᵀ x behind it."""

    rows: int
    """Tokens."""
    inputs: int
    outputs: int
    count: int = 1
    """Layers of this shape."""
    backward: bool = True
    """Whether the two products of the backward pass are made."""

    @property
    def flops(self) -> float:
        """Of all layers and products; a multiply-add counts two."""
        return 2.0 * self.rows * self.inputs * self.outputs * self.count * (3 if self.backward else 1)


def product_seconds(layers: Sequence[Linear], dtype: torch.dtype, repeats: int = 3) -> float:
    """Seconds of the layers' matrix products alone, each the median of some repeats, the first call left out.

    Operands lie in memory as they do in a step, and results go into fresh memory, as autograd's do.
    """
    total = 0.0
    for layer in layers:
        x = torch.randn(layer.rows, layer.inputs).to(dtype)
        weight = torch.randn(layer.outputs, layer.inputs).to(dtype)
        dy = torch.randn(layer.rows, layer.outputs).to(dtype)
        operands = [(x, weight.T), (dy, weight), (dy.T, x)][: 3 if layer.backward else 1]
        for left, right in operands:
            torch.mm(left, right)
            seconds = []
            for _ in range(repeats):
                began = time.perf_counter()
                torch.mm(left, right)
                seconds.append(time.perf_counter() - began)
            total += layer.count * statistics.median(seconds)
    return total


def machine() -> dict[str, str]:
    """What the timings were taken on, in words."""
    found = {
        "processor": device_name(torch.device("cpu")),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "memory": f"{memory_mib() / 1024:.0f} GiB",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "huge pages": "yes" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else "no",
        "commit": git_sha() or "",
    }
    for package in ("trl", "liger-kernel", "accelerate"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | versions()


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """One line per row under the keys of the first; all have the same keys."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)

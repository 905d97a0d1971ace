"""Histograms of the teacher's entropy and of the difficulty made of it, for the figures."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from torch import Tensor

from entkd.entropy import Difficulty
from entkd.files import replacing

BINS = 50


def write_entropy_csv(path: Path, entropy_R: Tensor, difficulty: Difficulty) -> None:
    """Write the columns quantity (entropy, in nats, or difficulty), left, right, count."""
    entropy, ranks = entropy_R.numpy(), difficulty(entropy_R).numpy()
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("quantity", "left", "right", "count"))
        for quantity, values, top in (
            ("entropy", entropy, max(float(entropy.max()), 1e-6)),
            ("difficulty", ranks, 1.0),
        ):
            counts, edges = np.histogram(values, bins=BINS, range=(0.0, top))
            writer.writerows(
                (quantity, *row) for row in zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
            )

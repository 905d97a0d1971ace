"""How close a student's outputs are to the teacher's, in tiles of tokens and without gradient.

Shapes: N tokens, R tokens of a tile, D student width, E teacher width, V student rows, U teacher rows of the output
projection. "1" is a dimension of length 1.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from entkd import hellinger
from entkd.heads import common_rows, teacher_logits
from entkd.kernels import temperature_derivative, value_and_gradient
from entkd.products import compute_dtype, projection
from entkd.softmax import argmax, entropy, in_full
from entkd.tiles import piece_rows, slices, tile_rows

CLOSENESS = ("entropy", "divergence", "agreement")
"""What `linear_statistics` finds unless it is told; of the student alone only the first."""
STATISTICS = (*CLOSENESS, "teacher_entropy", "hellinger", "temperature_slope")
"""All that it can find."""
_OF_BOTH = {"divergence", "agreement", "hellinger", "temperature_slope"}
_OF_STUDENT = {"entropy"} | _OF_BOTH
_OF_TEACHER = {"teacher_entropy"} | _OF_BOTH


@torch.no_grad()
def linear_statistics(
    student_hidden_ND: Tensor,
    student_weight_VD: Tensor,
    teacher_hidden_NE: Tensor | None = None,
    teacher_weight_UE: Tensor | None = None,
    *,
    wants: Collection[str] | None = None,
    divergence: str = "forward_kl",
    temperature_N: Tensor | None = None,
    entropy_temperature: float = 1.0,
    vocab_size: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """What the outputs of student and teacher are like, and how close they are, per token and without gradient.

    The tensors are those of `linear_divergence`; without the teacher's only the entropy of the student is found.

    Parameters
    ----------
    wants
        Names in `STATISTICS`; only projections that they need are made. `CLOSENESS` where absent.
    entropy_temperature
        Temperature of both entropies.

    Returns
    -------
    dict
        (N,) tensors: ``entropy`` of q and ``teacher_entropy`` of p, nats; ``divergence`` in nats at the temperatures,
        without s(T); ``agreement``, whether both have the same most likely token; ``hellinger``, the Hellinger
        distance √(1 - Σ √(pq)) in [0, 1] at T = 1; ``temperature_slope``, d[T² D]/dT of the two KLs.

    Raises
    ------
    ValueError
        A statistic of another name, or of the teacher where there is none; a temperature's slope without temperatures.
    """
    names = set(wants if wants is not None else CLOSENESS if teacher_hidden_NE is not None else ("entropy",))
    if not names <= set(STATISTICS):
        raise ValueError(f"statistics {sorted(names - set(STATISTICS))}: known are {', '.join(STATISTICS)}")
    if teacher_hidden_NE is None and names & _OF_TEACHER:
        raise ValueError(f"{', '.join(sorted(names & _OF_TEACHER))}: give the teacher's hidden states or logits")
    if "temperature_slope" in names and temperature_N is None:
        raise ValueError("temperature_slope: give temperature_N")
    vocab_size = common_rows(student_hidden_ND, student_weight_VD, teacher_hidden_NE, teacher_weight_UE, vocab_size)
    dtype, device, n_tokens = compute_dtype(student_hidden_ND), student_hidden_ND.device, len(student_hidden_ND)
    student = teacher = None
    if names & _OF_STUDENT:
        student = projection(student_hidden_ND, student_weight_VD[:vocab_size], "logits")
    if names & _OF_TEACHER and teacher_hidden_NE is not None:
        teacher = teacher_logits(teacher_hidden_NE, teacher_weight_UE, vocab_size, dtype)
    found = {
        name: torch.zeros(n_tokens, dtype=torch.bool if name == "agreement" else dtype, device=device)
        for name in STATISTICS
        if name in names
    }
    for tile in slices(n_tokens, tile_rows(vocab_size, device)):
        student_RV = None if student is None else student(tile)
        teacher_RV = None if teacher is None else teacher(tile)
        for piece in slices(tile.stop - tile.start, piece_rows(vocab_size, device)):
            rows = slice(tile.start + piece.start, tile.start + piece.stop)
            own_RV = None if student_RV is None else student_RV[piece]
            target_RV = None if teacher_RV is None else in_full(teacher_RV[piece], "piece of targets")
            if "entropy" in names and own_RV is not None:
                found["entropy"][rows] = _entropy(own_RV, entropy_temperature)
            if "teacher_entropy" in names and target_RV is not None:
                found["teacher_entropy"][rows] = _entropy(target_RV, entropy_temperature)
            if own_RV is None or target_RV is None:
                continue
            if "agreement" in names:
                found["agreement"][rows] = argmax(own_RV) == argmax(target_RV)
            if "hellinger" in names:
                found["hellinger"][rows] = hellinger.distance(own_RV, target_RV)
            temperature_R1 = None if temperature_N is None else temperature_N[rows].to(dtype).unsqueeze(-1)
            if "temperature_slope" in names and temperature_R1 is not None:
                slope_R1 = temperature_derivative(own_RV, target_RV, temperature_R1, divergence, "per_token")
                found["temperature_slope"][rows] = slope_R1.squeeze(-1)
            if "divergence" in names:  # last: it overwrites the logits
                value_R1 = value_and_gradient(own_RV, target_RV, temperature_R1, divergence, dict(settings or {}))
                found["divergence"][rows] = value_R1.squeeze(-1)
    return found


def _entropy(logits_RV: Tensor, temperature: float) -> Tensor:
    return entropy(logits_RV if temperature == 1 else logits_RV / temperature)

"""How close a student's outputs are to the teacher's, in tiles of tokens and without gradient.

Shapes: N tokens, R tokens of a tile, D student width, E teacher width, V student rows, U teacher rows of the output
projection. "1" is a dimension of length 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from entkd.heads import common_rows, teacher_logits
from entkd.kernels import entropy, value_and_gradient
from entkd.products import compute_dtype, projection
from entkd.tiles import piece_rows, slices, tile_rows


@torch.no_grad()
def linear_statistics(
    student_hidden_ND: Tensor,
    student_weight_VD: Tensor,
    teacher_hidden_NE: Tensor | None = None,
    teacher_weight_UE: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    temperature_N: Tensor | None = None,
    vocab_size: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """What the student's output is like, and how close it is to the teacher's, per token and without gradient.

    The tensors are those of `linear_divergence`; without the teacher's only the entropy is found.

    Returns
    -------
    dict
        (N,) tensors: ``entropy`` of q at T = 1, nats; ``divergence`` in nats at the temperatures, without s(T);
        ``agreement``, whether both have the same most likely token.
    """
    vocab_size = common_rows(student_hidden_ND, student_weight_VD, teacher_hidden_NE, teacher_weight_UE, vocab_size)
    dtype, device, n_tokens = compute_dtype(student_hidden_ND), student_hidden_ND.device, len(student_hidden_ND)
    student = projection(student_hidden_ND, student_weight_VD[:vocab_size], "logits")
    teacher = None
    if teacher_hidden_NE is not None:
        teacher = teacher_logits(teacher_hidden_NE, teacher_weight_UE, vocab_size, dtype)
    entropy_N = torch.zeros(n_tokens, dtype=dtype, device=device)
    divergence_N = torch.zeros(n_tokens, dtype=dtype, device=device)
    agreement_N = torch.zeros(n_tokens, dtype=torch.bool, device=device)
    for tile in slices(n_tokens, tile_rows(vocab_size, device)):
        student_RV, teacher_RV = student(tile), None if teacher is None else teacher(tile)
        for piece in slices(len(student_RV), piece_rows(vocab_size, device)):
            rows = slice(tile.start + piece.start, tile.start + piece.stop)
            own_RV = student_RV[piece]
            entropy_N[rows] = entropy(own_RV)
            if teacher_RV is not None:
                agreement_N[rows] = own_RV.argmax(-1) == teacher_RV[piece].argmax(-1)
                temperature_R1 = None if temperature_N is None else temperature_N[rows].to(dtype).unsqueeze(-1)
                value_R1, _ = value_and_gradient(
                    own_RV, teacher_RV[piece], temperature_R1, divergence, dict(settings or {})
                )
                divergence_N[rows] = value_R1.squeeze(-1)
    found = {"entropy": entropy_N}
    return found if teacher is None else found | {"divergence": divergence_N, "agreement": agreement_N}

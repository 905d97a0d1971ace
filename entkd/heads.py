"""The two output projections side by side: which rows both use, and the teacher's logits.

Shapes: N tokens, R tokens of a tile, D student width, E teacher width, V student rows, U teacher rows of the output
projection.
"""

from __future__ import annotations

import torch
from torch import Tensor

from entkd.products import HALF, RowsOf, projection
from entkd.workspace import buffer


def teacher_logits(
    hidden_NE: Tensor, weight_UE: Tensor | None, vocab_size: int, dtype: torch.dtype, rounded: bool = False
) -> RowsOf:
    """Logits of some rows, computed or, where there is no projection, as they are given.

    They may be overwritten in ``dtype`` alone: logits given in half precision stay so, and are no copy.
    """
    if weight_UE is not None:
        return projection(hidden_NE, weight_UE[:vocab_size], "teacher", rounded)

    def given(rows: slice) -> Tensor:
        logits_RU = hidden_NE.detach()[rows, :vocab_size]
        if logits_RU.dtype in HALF:
            return logits_RU
        return buffer("teacher", logits_RU.shape, dtype, logits_RU.device).copy_(logits_RU)

    return given


def used_rows(weight_VD: Tensor, vocab_size: int | None, owner: str) -> int:
    if vocab_size is None:
        return len(weight_VD)
    if len(weight_VD) < vocab_size:
        raise ValueError(
            f"the {owner}'s output projection has {len(weight_VD)} rows, the tokenizer {vocab_size} tokens"
        )
    return vocab_size


def common_rows(
    student_hidden_ND: Tensor,
    student_weight_VD: Tensor,
    teacher_hidden_NE: Tensor | None,
    teacher_weight_UE: Tensor | None,
    vocab_size: int | None,
) -> int:
    """The vocabulary that both sides share, after checking that both sides fit together."""
    if teacher_hidden_NE is not None:
        if len(student_hidden_ND) != len(teacher_hidden_NE):
            raise ValueError(f"{len(student_hidden_ND)} student tokens but {len(teacher_hidden_NE)} teacher tokens")
        # Given logits have as many columns as a projection has rows.
        teacher_UN = teacher_hidden_NE.T if teacher_weight_UE is None else teacher_weight_UE
        if vocab_size is None and len(student_weight_VD) != len(teacher_UN):
            raise ValueError(
                f"the student's output projection has {len(student_weight_VD)} rows and the teacher's "
                f"{len(teacher_UN)}; pass vocab_size, the tokenizer's length"
            )
        used_rows(teacher_UN, vocab_size, "teacher")
    return used_rows(student_weight_VD, vocab_size, "student")

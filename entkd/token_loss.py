"""The distillation loss of a few rows of logits: divergence, weights, and what published methods change in the tile.

Shapes: N tokens, R rows, V vocabulary. "1" is a dimension of length 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entkd import hellinger
from entkd.kernels import temperature_derivative, value_and_gradient
from entkd.softmax import entropy, in_full, soft_cross_entropy, sparse_value_and_gradient
from entkd.sparse import SparseTarget

TokenWeight = Callable[[Tensor, Tensor, slice | Tensor], Tensor]
"""(entropy of q in nats, divergence in nats, rows), all of R tokens → weights (R,), for weights that a token's own
student output decides. Rows are a slice or indices of the N tokens. Not differentiated."""


@dataclass(frozen=True)
class TokenLoss:
    """Σ_i w_i s(T_i) D(p_i(T_i) ‖ q_i(T_i)) over some of N tokens, with its gradient by the student's logits."""

    divergence: str
    """A name in ``entkd.kernels.TERMS`` or ``entkd.divergences.DIVERGENCES``."""
    settings: dict[str, Any]
    """Its settings."""
    target: SparseTarget | None
    """The teacher's distributions in sparse form; None where logits are given."""
    weight_N: Tensor | None
    """w, to know the tokens of weight 0."""
    temperature_N: Tensor | None
    """T; None is 1."""
    factor_N: Tensor | None
    """s(T), by which the divergence is multiplied together with w; None is 1."""
    token_weight: TokenWeight | None
    """A further factor, formed here."""
    kept_K: Tensor | None
    """Which of the caller's tokens these N are, where others were left out before."""
    teacher_share: Tensor | None
    """t: the teacher's logits are (1-t) z_q + t z_p, without gradient through z_q (TAID); None is t = 1."""
    wants_temperature_gradient: bool
    """Whether Σ_i w_i d[s(T_i) D_i]/dT_i is a term."""
    t2: str
    """Which s(T)."""
    distance_slope_N: Tensor | None = None
    """c: the gradient of Σ_i c_i s_i, with s the Hellinger distance, is added to that of the loss."""

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the sums beside the loss."""
        names = ["divergence"]
        if self.teacher_share is not None:
            names.append("target_cross_entropy")
        if self.wants_temperature_gradient:
            names.append("temperature_gradient")
        return tuple(names)

    def __call__(
        self,
        student_RV: Tensor,
        teacher_RV: Tensor,
        rows: slice,
        gradient_RV: Tensor | None = None,
        gradient_factor: float = 1.0,
    ) -> Tensor:
        """The `terms` of these rows, (len(terms),); into ``gradient_RV`` goes the gradient of the first, (R, V), times
        a factor. Inputs and gradient are as in `entkd.kernels.value_and_gradient`."""
        dtype = torch.promote_types(student_RV.dtype, torch.float32)
        moves_distance = self.distance_slope_N is not None and gradient_RV is not None
        if (
            moves_distance
            or self.token_weight is not None
            or self.teacher_share is not None
            or self.wants_temperature_gradient
        ):
            student_RV, teacher_RV = in_full(student_RV, "piece of logits"), in_full(teacher_RV, "piece of targets")
        temperature_R1 = None if self.temperature_N is None else _column(self.temperature_N, rows, dtype)
        entropy_R = None if self.token_weight is None else entropy(student_RV)
        target_ce_R = slope_R1 = distance_gradient_RV = None
        if moves_distance and self.distance_slope_N is not None:  # before the divergence overwrites the logits
            distance_slope_R1 = _column(self.distance_slope_N, rows, dtype)
            distance_gradient_RV = hellinger.gradient(student_RV, teacher_RV).mul_(gradient_factor * distance_slope_R1)
            distance_gradient_RV.masked_fill_(distance_slope_R1 == 0, 0)  # even where there is NaN
        if self.teacher_share is not None:
            share = self.teacher_share.to(dtype)
            teacher_RV.mul_(share).add_(student_RV * (1 - share))
            # Not the divergence and the entropy of p: tokens of weight 0 count here, and have no divergence.
            logits = (student_RV, teacher_RV)
            if temperature_R1 is not None:
                logits = (student_RV / temperature_R1, teacher_RV / temperature_R1)
            target_ce_R = soft_cross_entropy(*logits)
        if self.wants_temperature_gradient:
            assert temperature_R1 is not None
            slope_R1 = temperature_derivative(student_RV, teacher_RV, temperature_R1, self.divergence, self.t2)
        weight_R1 = None if self.weight_N is None else _column(self.weight_N, rows, dtype)
        factor_R1 = None if self.factor_N is None else _column(self.factor_N, rows, dtype)
        scale_R1 = factor_R1 if weight_R1 is None else weight_R1
        if weight_R1 is not None and factor_R1 is not None:
            # Not multiplied by 0: what belongs to tokens of weight 0, NaN included, must not matter.
            scale_R1 = (weight_R1 * factor_R1).masked_fill(weight_R1 == 0, 0)
        slope_scale_R1 = scale_R1
        if gradient_factor != 1:
            one_R1 = torch.ones((len(student_RV), 1), dtype=dtype, device=student_RV.device)
            slope_scale_R1 = gradient_factor * (one_R1 if scale_R1 is None else scale_R1)
        if self.target is not None:
            value_R1 = sparse_value_and_gradient(
                student_RV, self.target[rows], scale_R1=slope_scale_R1, gradient_RV=gradient_RV
            )
        else:
            value_R1 = value_and_gradient(
                student_RV,
                teacher_RV,
                temperature_R1,
                self.divergence,
                self.settings,
                scale_R1=slope_scale_R1,
                gradient_RV=gradient_RV,
            )
        if self.token_weight is not None and entropy_R is not None:
            own_R = self.token_weight(
                entropy_R, value_R1.squeeze(-1), rows if self.kept_K is None else self.kept_K[rows]
            )
            own_R1 = own_R.to(dtype).unsqueeze(-1)
            scale_R1 = own_R1 if scale_R1 is None else scale_R1 * own_R1
            if gradient_RV is not None:
                gradient_RV.mul_(own_R1)
        if distance_gradient_RV is not None and gradient_RV is not None:
            gradient_RV.add_(distance_gradient_RV)
        sums = [value_R1.sum() if scale_R1 is None else (value_R1 * scale_R1).sum()]
        if target_ce_R is not None:  # unweighted, as the released code measures it
            sums.append(target_ce_R.sum())
        if slope_R1 is not None:
            sums.append(slope_R1.sum() if weight_R1 is None else (slope_R1 * weight_R1).sum())
        return torch.stack(sums)


def _column(value_N: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    return value_N.detach()[rows].to(dtype).unsqueeze(-1)

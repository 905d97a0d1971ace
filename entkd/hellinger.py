"""The Hellinger distance of a token's two distributions, √(1 - Σ_v √(p_v q_v)) in [0, 1], and its gradient.

Shapes: R rows (tokens), V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def distance(student_RV: Tensor, teacher_RV: Tensor) -> Tensor:
    """(R,) distances of softmax(teacher) and softmax(student)."""
    return _distance(_roots(student_RV, teacher_RV).sum(-1))


def gradient(student_RV: Tensor, teacher_RV: Tensor) -> Tensor:
    """(R, V) ds/dz = (q Σ√(pq) - √(pq)) / 4s by the student's logits; 0 where the distributions are equal."""
    root_RV = _roots(student_RV, teacher_RV)
    overlap_R1 = root_RV.sum(-1, keepdim=True)
    distance_R1 = _distance(overlap_R1)
    slope_RV = torch.softmax(student_RV, -1).mul_(overlap_R1).sub_(root_RV).div_(4 * distance_R1)
    return slope_RV.masked_fill_(distance_R1 == 0, 0)


def _roots(student_RV: Tensor, teacher_RV: Tensor) -> Tensor:
    """√(pq)."""
    return (torch.log_softmax(student_RV, -1) + torch.log_softmax(teacher_RV, -1)).mul_(0.5).exp_()


def _distance(overlap: Tensor) -> Tensor:
    return (1 - overlap).clamp_min(0).sqrt()

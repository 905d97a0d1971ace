"""Softmax of some rows of logits, and the losses that compare it with few tokens: labels and sparse targets.

Shapes: R rows, V vocabulary, K slots of a sparse target. "1" is a dimension of length 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from entkd import native
from entkd.products import HALF
from entkd.sparse import SparseTarget
from entkd.workspace import buffer

_CHUNK = 256
"""Tokens among which `argmax` looks at once."""


def in_full(logits_RV: Tensor, name: str) -> Tensor:
    """Logits in half precision as fp32, in the buffer ``name``; all others as they are."""
    if logits_RV.dtype not in HALF:
        return logits_RV
    return buffer(name, logits_RV.shape, torch.float32, logits_RV.device).copy_(logits_RV)


def argmax(logits_RV: Tensor) -> Tensor:
    """(R,) the most probable token of each row, the first of several."""
    if logits_RV.device.type != "cpu":
        return logits_RV.argmax(-1)
    # On a CPU PyTorch finds a largest number much sooner than its index, so look for the index in one chunk alone.
    vocabulary = logits_RV.shape[-1]
    even = vocabulary - vocabulary % _CHUNK
    tops = [logits_RV[:, :even].unflatten(-1, (-1, _CHUNK)).amax(-1)]
    if even < vocabulary:
        tops.append(logits_RV[:, even:].amax(-1, keepdim=True))
    first_R1 = torch.cat(tops, -1).argmax(-1, keepdim=True) * _CHUNK
    ids_RK = (first_R1 + torch.arange(_CHUNK)).clamp_max(vocabulary - 1)
    return first_R1[:, 0] + logits_RV.gather(1, ids_RK).argmax(-1)


def largest_and_logsumexp(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """(R,) the largest logit of each row, and the logarithm of the sum of all their exponentials."""
    if logits_RV.device.type == "cpu":
        best_R1 = argmax(logits_RV).unsqueeze(-1)
        loss_R1 = native.cross_entropy(logits_RV, best_R1, None, None)
        if loss_R1 is not None:
            largest_R = logits_RV.gather(1, best_R1).squeeze(-1)
            return largest_R, largest_R + loss_R1.squeeze(-1)
    return logits_RV.amax(-1), logits_RV.logsumexp(-1)


def log_softmax(logits_RV: Tensor, name: str) -> Tensor:
    """Log-probabilities in the buffer ``name``. That of probability 0 is the lowest finite number, so that their
    product is 0."""
    out_RV = buffer(name, logits_RV.shape, logits_RV.dtype, logits_RV.device)
    torch.log_softmax(logits_RV, dim=-1, out=out_RV)
    return out_RV.clamp_min_(torch.finfo(out_RV.dtype).min)


def exp(log_RV: Tensor, out: Tensor) -> Tensor:
    """exp by way of 2^x, whose CPU kernel is twice as fast where MKL is not on Intel's processors."""
    return torch.mul(log_RV, math.log2(math.e), out=out).exp2_()


def cross_entropy(
    student_RV: Tensor, labels_R: Tensor, scale_R1: Tensor | None = None, gradient_RV: Tensor | None = None
) -> Tensor:
    """-log q(label) of each row, (R, 1) in nats, and its gradient q - onehot; all is as in `value_and_gradient`.

    Logits in full precision stay as they are, unless ``gradient_RV`` is their tensor.
    """
    labels_R1 = labels_R.unsqueeze(-1)
    if student_RV.device.type == "cpu":
        found_R1 = native.cross_entropy(student_RV, labels_R1, scale_R1, gradient_RV)
        if found_R1 is not None:
            return found_R1
    log_q_RV = log_softmax(in_full(student_RV, "piece of logits"), "log q")
    value_R1 = -log_q_RV.gather(1, labels_R1)
    slope_RV = log_q_RV
    if gradient_RV is not None:
        slope_RV = exp(log_q_RV, out=log_q_RV)
        slope_RV.scatter_add_(1, labels_R1, torch.full_like(value_R1, -1.0))
    return write_scaled(value_R1, slope_RV, scale_R1, gradient_RV)


def sparse_value_and_gradient(
    student_RV: Tensor, target: SparseTarget, *, scale_R1: Tensor | None = None, gradient_RV: Tensor | None = None
) -> Tensor:
    """`entkd.sparse.sparse_forward_kl` of each row, (R, 1) in nats, and its gradient q - m; all is as in
    `value_and_gradient`."""
    student_RV = in_full(student_RV, "piece of logits")
    log_q_RV, ids_RK = log_softmax(student_RV, "log q"), target.ids_NK.long()
    mass_RK = target.mass_NK.to(log_q_RV.dtype)
    value_R1 = -target.entropy_N.to(log_q_RV.dtype).unsqueeze(-1) - (mass_RK * log_q_RV.gather(1, ids_RK)).sum(
        -1, keepdim=True
    )
    slope_RV = exp(log_q_RV, out=student_RV)
    return write_scaled(value_R1, slope_RV.scatter_add_(1, ids_RK, -mass_RK), scale_R1, gradient_RV)


def soft_cross_entropy(student_RV: Tensor, teacher_RV: Tensor) -> Tensor:
    """(R,) nats of -Σ_v p_v log q_v, p of the teacher's logits and q of the student's."""
    log_q_RV, log_p_RV = log_softmax(student_RV, "log q"), log_softmax(teacher_RV, "log p")
    return -exp(log_p_RV, out=log_p_RV).mul_(log_q_RV).sum(-1)


def entropy(logits_RV: Tensor) -> Tensor:
    """(R,) nats of softmax(logits)."""
    log_q_RV = log_softmax(logits_RV, "log q")
    q_RV = exp(log_q_RV, out=buffer("q", log_q_RV.shape, log_q_RV.dtype, log_q_RV.device))
    return -log_q_RV.mul_(q_RV).sum(-1)


def write_scaled(value_R1: Tensor, slope_RV: Tensor, scale_R1: Tensor | None, gradient_RV: Tensor | None) -> Tensor:
    """The values, and into ``gradient_RV`` slope · scale; rows of factor 0 give 0 even where they hold NaN."""
    if scale_R1 is not None:
        none_R1 = scale_R1 == 0
        # On an accelerator nobody looks whether there are any: the host would have to wait.
        if value_R1.device.type != "cpu" or bool(none_R1.any()):
            value_R1, slope_RV = value_R1.masked_fill(none_R1, 0), slope_RV.masked_fill(none_R1, 0)
    if gradient_RV is not None:
        if scale_R1 is not None:
            slope_RV = slope_RV.mul_(scale_R1)
        if gradient_RV is not slope_RV:
            gradient_RV.copy_(slope_RV)
    return value_R1

"""Kernels for CPUs with AVX-512 and bf16 instructions: products with fp32 sums, losses of rows of logits, AdamW.

Each answers whether it did its work. Without a compiler, on another CPU or for tensors of other kinds it does nothing,
and callers have another way, slower and with products rounded to bf16 once more.

Shapes: R rows (tokens), V vocabulary, D width. "1" is a dimension of length 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from entkd.native.attention import attention_gradient
from entkd.native.build import library

__all__ = [
    "adamw",
    "attention_gradient",
    "available",
    "cross_entropy",
    "hidden_gradient",
    "kl",
    "logits",
    "weight_gradient",
]

_BF16, _FP32 = torch.bfloat16, torch.float32
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Types of numbers, as rows.cpp tells them apart."""


def available() -> bool:
    """Whether the library is there; compiles it if it is not yet."""
    return library() is not None


def logits(hidden_RD: Tensor, weight_VD: Tensor, out_RV: Tensor) -> bool:
    """out = hidden · weightᵀ of bf16 operands with fp32 sums.

    Parameters
    ----------
    hidden_RD
        (R, D) bf16.
    weight_VD
        (V, D) bf16, or fp32, which is rounded to bf16.
    out_RV
        (R, V) fp32.
    """
    found = library() if _usable(hidden_RD, weight_VD, out_RV) and hidden_RD.shape[1] % 2 == 0 else None
    if found is None or _types(hidden_RD, out_RV) != (_BF16, _FP32) or weight_VD.dtype not in (_BF16, _FP32):
        return False
    (R, D), V = hidden_RD.shape, len(weight_VD)
    _check(weight_VD.shape == (V, D) and out_RV.shape == (R, V), hidden_RD, weight_VD, out_RV)
    if out_RV.numel():
        fp32 = int(weight_VD.dtype == _FP32)
        found.entkd_logits(hidden_RD.data_ptr(), weight_VD.data_ptr(), fp32, out_RV.data_ptr(), R, V, D)
    return True


def hidden_gradient(gradient_RV: Tensor, weight_VD: Tensor, out_RD: Tensor) -> bool:
    """out = gradient · weight, (R, V) and (V, D) bf16, summed in fp32 into (R, D) fp32."""
    found = library() if _usable(gradient_RV, weight_VD, out_RD) and weight_VD.shape[1] % 2 == 0 else None
    if found is None or _types(gradient_RV, weight_VD, out_RD) != (_BF16, _BF16, _FP32):
        return False
    (R, V), D = gradient_RV.shape, weight_VD.shape[1]
    _check(weight_VD.shape == (V, D) and out_RD.shape == (R, D), gradient_RV, weight_VD, out_RD)
    if out_RD.numel():
        found.entkd_hidden_gradient(*_pointers(gradient_RV, weight_VD, out_RD), R, V, D)
    return True


def weight_gradient(gradient_RV: Tensor, hidden_RD: Tensor, sum_VD: Tensor, add: bool) -> bool:
    """sum = or += gradientᵀ · hidden, (R, V) and (R, D) bf16, summed in fp32 into (V, D) fp32."""
    found = library() if _usable(gradient_RV, hidden_RD, sum_VD) and hidden_RD.shape[1] % 2 == 0 else None
    if found is None or _types(gradient_RV, hidden_RD, sum_VD) != (_BF16, _BF16, _FP32) or not len(hidden_RD):
        return False
    (R, V), D = gradient_RV.shape, hidden_RD.shape[1]
    _check(hidden_RD.shape == (R, D) and sum_VD.shape == (V, D), gradient_RV, hidden_RD, sum_VD)
    found.entkd_weight_gradient(*_pointers(gradient_RV, hidden_RD, sum_VD), int(add), R, V, D)
    return True


def kl(
    student_RV: Tensor,
    teacher_RV: Tensor,
    temperature_R1: Tensor | None,
    scale_R1: Tensor | None,
    reverse: bool,
    gradient_RV: Tensor | None,
) -> Tensor | None:
    """KL(p‖q), or with ``reverse`` KL(q‖p), of each row, (R, 1) in nats; None where it was not done.

    Parameters
    ----------
    student_RV, teacher_RV
        (R, V) logits in fp32 or bf16; the teacher's may be fp16.
    temperature_R1
        (R, 1) fp32 temperatures of both; None is 1.
    scale_R1
        (R, 1) fp32 factors of the gradient; None is 1. Rows of factor 0 have value and gradient 0, whatever is in them.
    gradient_RV
        (R, V) fp32 or bf16; gets the gradient by the student's logits. It may be the student's tensor.
    """
    tensors = [t for t in (student_RV, teacher_RV, gradient_RV) if t is not None]
    found = library() if _usable(*tensors) and student_RV.numel() else None
    if found is None or teacher_RV.dtype not in _CODES or not _are_numbers(student_RV, scale_R1, gradient_RV):
        return None
    R, V = student_RV.shape
    _check(teacher_RV.shape == (R, V) and (gradient_RV is None or gradient_RV.shape == (R, V)), *tensors)
    value_R1 = student_RV.new_empty((R, 1), dtype=_FP32)
    k_R1 = None if temperature_R1 is None else temperature_R1.to(_FP32).reciprocal().contiguous()
    scale_R1 = None if scale_R1 is None else scale_R1.contiguous()  # one number for all rows may be kept only once
    found.entkd_kl(
        int(reverse),
        *_typed(student_RV),
        *_typed(teacher_RV),
        *_pointers(k_R1, scale_R1, value_R1),
        *_typed(gradient_RV),
        R,
        V,
    )
    return value_R1


def cross_entropy(
    student_RV: Tensor, labels_R1: Tensor, scale_R1: Tensor | None, gradient_RV: Tensor | None
) -> Tensor | None:
    """-log q(label) of each row, (R, 1) in nats; None where it was not done. Tensors are as in `kl`, labels int64."""
    tensors = [t for t in (student_RV, gradient_RV) if t is not None]
    found = library() if _usable(*tensors) and student_RV.numel() else None
    if found is None or labels_R1.dtype != torch.long or not _are_numbers(student_RV, scale_R1, gradient_RV):
        return None
    R, V = student_RV.shape
    _check(len(labels_R1) == R and (gradient_RV is None or gradient_RV.shape == (R, V)), *tensors)
    if bool(((labels_R1 < 0) | (labels_R1 >= V)).any()):
        raise ValueError(f"labels from {int(labels_R1.min())} to {int(labels_R1.max())} for {V} tokens")
    value_R1 = student_RV.new_empty((R, 1), dtype=_FP32)
    labels_R1 = labels_R1.contiguous()
    scale_R1 = None if scale_R1 is None else scale_R1.contiguous()
    found.entkd_cross_entropy(
        *_typed(student_RV), *_pointers(labels_R1, scale_R1, value_R1), *_typed(gradient_RV), R, V
    )
    return value_R1


def adamw(
    weight: Tensor,
    mean: Tensor,
    square: Tensor,
    gradient: Tensor,
    rounded: Tensor | None,
    *,
    factor: float,
    rate: float,
    betas: tuple[float, float],
    epsilon: float,
    decay: float,
    step: int,
) -> bool:
    """A step of AdamW (arXiv 1711.05101), as `torch.optim.AdamW` takes it, with ``factor`` times the gradient.

    Parameters
    ----------
    weight, mean, square, gradient
        fp32, of one shape; ``mean`` and ``square`` are the moments. All but the gradient are updated.
    rounded
        bf16; gets the new weight.
    step
        Steps that this is the last of, from 1.
    """
    tensors = [t for t in (weight, mean, square, gradient, rounded) if t is not None]
    found = library() if _usable(*tensors) else None
    if found is None or any(tensor.dtype != (_BF16 if tensor is rounded else _FP32) for tensor in tensors):
        return False
    _check(all(tensor.shape == weight.shape for tensor in tensors), *tensors)
    corrections = 1 - betas[0] ** step, math.sqrt(1 - betas[1] ** step)
    found.entkd_adamw(
        *_pointers(weight, mean, square, gradient, rounded),
        factor,
        rate,
        *betas,
        epsilon,
        decay,
        *corrections,
        weight.numel(),
    )
    increment_version([tensor for tensor in tensors if tensor is not gradient])
    return True


def _usable(*tensors: Tensor) -> bool:
    return all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors)


def _are_numbers(student_RV: Tensor, scale_R1: Tensor | None, gradient_RV: Tensor | None) -> bool:
    return (
        student_RV.dtype in (_FP32, _BF16)
        and (scale_R1 is None or scale_R1.dtype == _FP32)
        and (gradient_RV is None or gradient_RV.dtype in (_FP32, _BF16))
    )


def _types(*tensors: Tensor) -> tuple[torch.dtype, ...]:
    return tuple(tensor.dtype for tensor in tensors)


def _pointers(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _typed(tensor: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if tensor is None else (tensor.data_ptr(), _CODES[tensor.dtype])


def _check(fits: bool, *tensors: Tensor) -> None:
    if not fits:
        raise ValueError(f"shapes {', '.join(str(tuple(tensor.shape)) for tensor in tensors)} differ")

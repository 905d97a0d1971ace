"""Matrix products of hidden states with an output projection, as exact as their operands.

A softmax over logits rounded to bf16 costs about a tenth of the gradient where student and teacher are close
(KL ≈ 0.02), so logits always come out in fp32 (fp64 for fp64 hidden states). bf16 operands are multiplied on the bf16
units all the same: with sums in fp32 only the operands are rounded, never the result.

Shapes: N tokens, R tokens of a tile, D width, V rows of the output projection.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from entkd import native
from entkd.workspace import buffer

HALF = (torch.bfloat16, torch.float16)
"""Types of numbers that losses are not computed in."""
RowsOf = Callable[[slice], Tensor]
"""Some tokens → what belongs to them, e.g. logits (R, V) or labels (R,)."""


def compute_dtype(hidden_ND: Tensor) -> torch.dtype:
    """fp64 for fp64 hidden states, fp32 for all others."""
    return torch.promote_types(hidden_ND.dtype, torch.float32)


def projection(hidden_ND: Tensor, weight_VD: Tensor, name: str, rounded: bool = False) -> RowsOf:
    """A function from rows to logits (R, V) in `compute_dtype`; no gradient.

    Where both operands are bf16 they are multiplied as such, otherwise in the dtype of the logits.

    Parameters
    ----------
    name
        Of the buffer that the logits are in: they are valid until the function's next call.
    rounded
        Logits of bf16 operands are bf16 themselves: half the memory traffic, at the price told above.
    """
    hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    dtype, device = compute_dtype(hidden_ND), hidden_ND.device
    both_bf16 = hidden_ND.dtype == weight_VD.dtype == torch.bfloat16
    if both_bf16 and rounded:

        def project_rounded(rows: slice) -> Tensor:
            hidden_RD = hidden_ND[rows]
            logits_RV = buffer(f"rounded {name}", (len(hidden_RD), len(weight_VD)), torch.bfloat16, device)
            return torch.mm(hidden_RD, weight_VD.T, out=logits_RV)

        return project_rounded
    if both_bf16 and device.type == "cuda":
        return lambda rows: torch.mm(hidden_ND[rows], weight_VD.T, out_dtype=torch.float32)

    @functools.cache
    def cast_weight() -> Tensor:
        return cast(weight_VD, dtype, f"weight of {name}")

    def project(rows: slice) -> Tensor:
        hidden_RD = hidden_ND[rows]
        logits_RV = buffer(name, (len(hidden_RD), len(weight_VD)), dtype, device)
        if both_bf16 and native.logits(hidden_RD, weight_VD, logits_RV):
            return logits_RV
        with torch.no_grad(), torch.autocast(device.type, enabled=False), _mkldnn_bf16(both_bf16):
            return torch.mm(hidden_RD.to(dtype), cast_weight().T, out=logits_RV)

    return project


def cast(weight_VD: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The weight in another dtype, in the buffer ``name``; itself where it has the dtype."""
    if weight_VD.dtype == dtype:
        return weight_VD
    return buffer(name, weight_VD.shape, dtype, weight_VD.device).copy_(weight_VD)


def hidden_gradient(grad_RV: Tensor, weight_VD: Tensor, out_RD: Tensor) -> None:
    """out = grad @ weight, by way of the operands' type where that is bf16 and no kernel has fp32 sums."""
    if not native.hidden_gradient(grad_RV, weight_VD, out_RD):
        out_RD.copy_(grad_RV @ weight_VD)


def add_weight_gradient(sum_VD: Tensor, grad_RV: Tensor, hidden_RD: Tensor, first: bool) -> None:
    """sum += gradᵀ @ hidden, or sum = gradᵀ @ hidden, with the sum over tiles in fp32 where the operands are bf16."""
    if native.weight_gradient(grad_RV, hidden_RD, sum_VD, not first):
        return
    if grad_RV.dtype == sum_VD.dtype:
        sum_VD.addmm_(grad_RV.T, hidden_RD, beta=0 if first else 1)
        return
    product_VD = torch.mm(grad_RV.T, hidden_RD, out=buffer("product", sum_VD.shape, grad_RV.dtype, sum_VD.device))
    if first:
        sum_VD.copy_(product_VD)
    else:
        sum_VD.add_(product_VD)


@contextmanager
def _mkldnn_bf16(wanted: bool) -> Iterator[None]:
    """Multiply fp32 tensors that hold bf16 values on a CPU's bf16 units: exact products, summed in fp32."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if wanted:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before

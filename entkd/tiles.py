"""A loss over the logits of an output projection, in tiles of tokens: value and gradient in one pass.

Per tile, logits are made, the loss and its gradient are taken at once, and the gradient is multiplied into dh and dW;
the backward pass only scales them. No tensor of tokens × vocabulary lives longer than its tile.

Precision. A softmax over logits rounded to bf16 costs about a tenth of the gradient where student and teacher are
close (KL ≈ 0.02), so logits always come out of the product in fp32 (fp64 for fp64 hidden states), from the operands
as they are, also under autocast. What follows tolerates bf16: where the hidden states are bf16, or autocast is, the
two gradient products take bf16 operands, and dW is summed over tiles in fp32.

Shapes: N tokens, R tokens of a tile, D width, V rows of the output projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from entkd.workspace import buffer, recycled

TileTarget = Callable[[slice], Tensor]
"""Rows of the batch → what the loss compares their logits with, e.g. teacher logits (R, V) or labels (R,)."""
TileLoss = Callable[[Tensor, Tensor, slice, bool], tuple[Tensor, Tensor | None]]
"""(logits, target, rows, wants_grad) → summed loss and, where wanted, its gradient by the logits. May overwrite both
tensors."""


def by_autograd(loss: Callable[[Tensor, Tensor, slice], Tensor]) -> TileLoss:
    """A tile loss from a plain function (logits, target, rows) → (R,)."""

    def with_gradient(
        logits_RV: Tensor, target_R: Tensor, rows: slice, wants_grad: bool
    ) -> tuple[Tensor, Tensor | None]:
        logits_RV = logits_RV.detach().requires_grad_(wants_grad)
        with torch.set_grad_enabled(wants_grad):
            total = loss(logits_RV, target_R, rows).sum()
        return total.detach(), torch.autograd.grad(total, logits_RV)[0] if wants_grad else None

    return with_gradient


def tiled_loss(hidden_ND: Tensor, weight_VD: Tensor, target: TileTarget, loss: TileLoss, vocab_size: int) -> Tensor:
    """Σ_i loss_i over all tokens, with gradients to hidden states and weight.

    Parameters
    ----------
    hidden_ND, weight_VD
        Hidden states and output projection. N = 0 gives 0 and zero gradients.
    target
        Gives what the loss compares the logits of a tile with; never differentiated.
    loss
        Weighted loss of some rows of a tile, and its gradient.
    vocab_size
        Rows of the projection that are read; the gradient of those beyond is 0.
    """
    device = hidden_ND.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
    low_precision = hidden_ND.dtype == torch.bfloat16 or (autocast and hidden_ND.dtype == torch.float32)
    # Inside forward() grad mode is always off, so ask here.
    wants = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden_ND, weight_VD))
    total: Tensor = _TiledLoss.apply(hidden_ND, weight_VD, target, loss, vocab_size, low_precision, wants)  # type: ignore[no-untyped-call]
    return total


class _TiledLoss(torch.autograd.Function):
    """Sum of a loss over tiles of tokens; dh and dW are made in the forward pass and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        target: TileTarget,
        loss: TileLoss,
        vocab_size: int,
        low_precision: bool,
        wants: tuple[bool, bool],
    ) -> Tensor:
        dtype, device = compute_dtype(hidden_ND), hidden_ND.device
        product_dtype = torch.bfloat16 if low_precision else dtype
        with torch.autocast(device.type, enabled=False):
            used_VD = weight_VD[:vocab_size]
            logits = projection(hidden_ND, used_VD, dtype, "logits")
            hidden_product_ND, weight_product_VD = (
                hidden_ND.to(product_dtype),
                _cast(used_VD, product_dtype, "weight of products"),
            )
            hidden_grad_ND = torch.zeros(hidden_ND.shape, dtype=dtype, device=device) if wants[0] else None
            weight_grad_VD = recycled(weight_VD.shape, dtype, device) if wants[1] else None
            if weight_grad_VD is not None:
                weight_grad_VD[vocab_size if len(hidden_ND) else 0 :] = 0
            total = torch.zeros((), dtype=dtype, device=device)
            for tile in slices(len(hidden_ND), tile_rows(vocab_size, device)):
                logits_RV = logits(tile)
                value, grad_RV = _tile(logits_RV, target(tile), loss, tile.start, product_dtype, any(wants))
                total += value
                if hidden_grad_ND is not None:
                    hidden_grad_ND[tile] = grad_RV @ weight_product_VD
                if weight_grad_VD is not None:
                    _add_product(weight_grad_VD[:vocab_size], grad_RV.T, hidden_product_ND[tile], tile.start == 0)
        # Not by save_for_backward, which would go on holding the gradient that the backward pass gives away: autograd
        # makes a gradient that nobody else holds the parameter's own, and copies any other.
        ctx.gradients = [hidden_grad_ND, weight_grad_VD]
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.gradients:
            raise RuntimeError("this loss was differentiated before: its gradients are given away; compute it again")
        gradients, ctx.gradients = ctx.gradients, []
        # In place: a second tensor of the weight's size costs more than the multiplication.
        hidden_grad_ND, weight_grad_VD = (
            None if gradient is None else gradient.mul_(grad_output).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        gradients.clear()
        return hidden_grad_ND, weight_grad_VD, None, None, None, None, None


def _tile(
    logits_RV: Tensor, target_R: Tensor, loss: TileLoss, start: int, grad_dtype: torch.dtype, wants_grad: bool
) -> tuple[Tensor, Tensor]:
    """Summed loss of one tile and its gradient by the logits.

    Works in pieces of few rows: elementwise passes over a vocabulary are bound by memory, and a piece stays in cache
    from the first pass to the last. A gradient of the logits' own dtype is written over them.
    """
    grad_RV = logits_RV
    if grad_dtype != logits_RV.dtype:
        grad_RV = buffer("gradient of logits", logits_RV.shape, grad_dtype, logits_RV.device)
    total = logits_RV.new_zeros(())
    for piece in slices(len(logits_RV), piece_rows(logits_RV.shape[1], logits_RV.device)):
        rows = slice(start + piece.start, start + piece.stop)
        value, piece_grad_RV = loss(logits_RV[piece], target_R[piece], rows, wants_grad)
        total += value
        if piece_grad_RV is not None:
            grad_RV[piece] = piece_grad_RV
    return total, grad_RV


def projection(hidden_ND: Tensor, weight_VD: Tensor, dtype: torch.dtype, name: str) -> TileTarget:
    """A function from rows to logits (R, V) in ``dtype``, as exact as the operands.

    Parameters
    ----------
    name
        Of the buffer that the logits are in: they are valid until the function's next call.
    """
    hidden_ND, weight_VD, device = hidden_ND.detach(), weight_VD.detach(), hidden_ND.device
    both_bf16 = hidden_ND.dtype == weight_VD.dtype == torch.bfloat16 and dtype == torch.float32
    if both_bf16 and device.type == "cuda":
        return lambda rows: torch.mm(hidden_ND[rows], weight_VD.T, out_dtype=torch.float32)
    weight_VD = _cast(weight_VD, dtype, f"weight of {name}")

    def project(rows: slice) -> Tensor:
        hidden_RD = hidden_ND[rows].to(dtype)
        logits_RV = buffer(name, (len(hidden_RD), len(weight_VD)), dtype, device)
        units = _mkldnn_bf16() if both_bf16 and device.type == "cpu" else nullcontext()
        with torch.no_grad(), torch.autocast(device.type, enabled=False), units:
            return torch.mm(hidden_RD, weight_VD.T, out=logits_RV)

    return project


def _cast(weight_VD: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if weight_VD.dtype == dtype:
        return weight_VD
    return buffer(name, weight_VD.shape, dtype, weight_VD.device).copy_(weight_VD)


@contextmanager
def _mkldnn_bf16() -> Iterator[None]:
    """Multiply fp32 tensors on the bf16 units: exact products of bf16 values, summed in fp32."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _add_product(sum_VD: Tensor, grad_VR: Tensor, hidden_RD: Tensor, first: bool) -> None:
    """sum += grad @ hidden, or sum = grad @ hidden, with the sum over tiles in fp32 where the operands are bf16."""
    if grad_VR.dtype == sum_VD.dtype:
        sum_VD.addmm_(grad_VR, hidden_RD, beta=0 if first else 1)
        return
    product_VD = torch.mm(grad_VR, hidden_RD, out=buffer("product", sum_VD.shape, grad_VR.dtype, sum_VD.device))
    if first:
        sum_VD.copy_(product_VD)
    else:
        sum_VD.add_(product_VD)


def compute_dtype(hidden_ND: Tensor) -> torch.dtype:
    return torch.promote_types(hidden_ND.dtype, torch.float32)


def slices(length: int, rows: int) -> Iterator[slice]:
    """Even slices of at most ``rows``; none where the length is 0."""
    count = -(-length // rows)
    for index in range(count):
        yield slice(index * length // count, (index + 1) * length // count)


def tile_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of a tile: about 100 MiB of fp32 logits on a CPU, 512 MiB on an accelerator, and at least 256 rows, since
    every tile passes once over dW."""
    budget = (100 if device.type == "cpu" else 512) * 2**20
    return max(256, budget // (4 * vocab_size))


def piece_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of the elementwise passes: about 2 MiB of fp32 on a CPU, to stay in cache; 128 MiB on an accelerator."""
    budget = (2 if device.type == "cpu" else 128) * 2**20
    return max(1, budget // (4 * vocab_size))

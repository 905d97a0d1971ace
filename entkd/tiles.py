"""A loss over the logits of an output projection, in tiles of tokens: value and gradient in one pass.

Per tile, logits are made, the loss and its gradient are taken at once, and the gradient is multiplied into dh and dW;
the backward pass only scales them. No tensor of tokens × vocabulary lives longer than its tile.

Precision. Where the hidden states are bf16, or autocast is, all three products take bf16 operands, as every product of
the trunk does; logits, and the sum of dW over tiles, are fp32 (``entkd.products``).

Shapes: N tokens, R tokens of a tile, D width, V rows of the output projection, T terms of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from entkd.products import RowsOf, add_product, cast, compute_dtype, projection
from entkd.workspace import buffer, recycled

TileLoss = Callable[[Tensor, Tensor, slice, bool], tuple[Tensor, Tensor, Tensor | None]]
"""(logits, target, rows, wants_grad) → summed loss, its terms (T,), and where wanted the gradient of the loss by the
logits. May overwrite both tensors."""


def tiled_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target: RowsOf,
    loss: TileLoss,
    vocab_size: int,
    terms: int = 1,
    rounded: bool = False,
) -> tuple[Tensor, Tensor]:
    """Σ_i loss_i over all tokens, with gradients to hidden states and weight, and its terms, without.

    Parameters
    ----------
    hidden_ND, weight_VD
        Hidden states and output projection. N = 0 gives 0 and zero gradients.
    target
        Gives what the loss compares the logits of a tile with; never differentiated.
    loss
        Weighted loss of some rows of a tile, its terms, and its gradient.
    vocab_size
        Rows of the projection that are read; the gradient of those beyond is 0.
    terms
        T.
    rounded
        Whether logits of bf16 operands are rounded to bf16.
    """
    device = hidden_ND.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
    low_precision = hidden_ND.dtype == torch.bfloat16 or (autocast and hidden_ND.dtype == torch.float32)
    # Inside forward() grad mode is always off, so ask here.
    wants = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden_ND, weight_VD))
    found: tuple[Tensor, Tensor] = _TiledLoss.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, target, loss, vocab_size, terms, low_precision, rounded, wants
    )
    return found


class _TiledLoss(torch.autograd.Function):
    """Sum of a loss over tiles of tokens; dh and dW are made in the forward pass and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        target: RowsOf,
        loss: TileLoss,
        vocab_size: int,
        terms: int,
        low_precision: bool,
        rounded: bool,
        wants: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        dtype, device = compute_dtype(hidden_ND), hidden_ND.device
        with torch.autocast(device.type, enabled=False):
            product_dtype = torch.bfloat16 if low_precision else dtype
            used_ND = hidden_ND.to(product_dtype)
            used_VD = cast(weight_VD[:vocab_size], product_dtype, "weight of products")
            logits = projection(used_ND, used_VD, "logits", rounded)
            hidden_grad_ND = torch.zeros(hidden_ND.shape, dtype=dtype, device=device) if wants[0] else None
            weight_grad_VD = recycled(weight_VD.shape, dtype, device) if wants[1] else None
            if weight_grad_VD is not None:
                weight_grad_VD[vocab_size if len(hidden_ND) else 0 :] = 0
            total = torch.zeros((), dtype=dtype, device=device)
            total_T = torch.zeros(terms, dtype=dtype, device=device)
            for tile in slices(len(hidden_ND), tile_rows(vocab_size, device)):
                logits_RV = logits(tile)
                value, value_T, grad_RV = _tile(
                    logits_RV, target(tile), loss, tile.start, dtype, product_dtype, any(wants), terms
                )
                total += value
                total_T += value_T
                if hidden_grad_ND is not None:
                    hidden_grad_ND[tile] = grad_RV @ used_VD
                if weight_grad_VD is not None:
                    add_product(weight_grad_VD[:vocab_size], grad_RV.T, used_ND[tile], tile.start == 0)
        # Not by save_for_backward, which would go on holding the gradient that the backward pass gives away: autograd
        # makes a gradient that nobody else holds the parameter's own, and copies any other.
        ctx.gradients = [hidden_grad_ND, weight_grad_VD]
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        ctx.mark_non_differentiable(total_T)
        return total, total_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.gradients:
            raise RuntimeError("this loss was differentiated before: its gradients are given away; compute it again")
        gradients, ctx.gradients = ctx.gradients, []
        # In place: a second tensor of the weight's size costs more than the multiplication.
        hidden_grad_ND, weight_grad_VD = (
            None if gradient is None else gradient.mul_(grad_output).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        gradients.clear()
        return hidden_grad_ND, weight_grad_VD, *(None,) * 7


def _tile(
    logits_RV: Tensor,
    target_R: Tensor,
    loss: TileLoss,
    start: int,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    wants_grad: bool,
    terms: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss of one tile, its terms, and its gradient by the logits.

    Works in pieces of few rows: elementwise passes over a vocabulary are bound by memory, and a piece stays in cache
    from the first pass to the last. A gradient of the logits' own dtype is written over them.
    """
    grad_RV = logits_RV
    if grad_dtype != logits_RV.dtype:
        grad_RV = buffer("gradient of logits", logits_RV.shape, grad_dtype, logits_RV.device)
    total, total_T = (torch.zeros(shape, dtype=dtype, device=logits_RV.device) for shape in ((), (terms,)))
    for piece in slices(len(logits_RV), piece_rows(logits_RV.shape[1], logits_RV.device)):
        rows = slice(start + piece.start, start + piece.stop)
        value, value_T, piece_grad_RV = loss(
            _computed(logits_RV[piece], dtype, "piece of logits"),
            _computed(target_R[piece], dtype, "piece of targets"),
            rows,
            wants_grad,
        )
        total += value
        total_T += value_T
        if piece_grad_RV is not None:
            grad_RV[piece] = piece_grad_RV
    return total, total_T, grad_RV


def _computed(piece_R: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Rounded logits in the dtype that the loss computes in; all else as it is."""
    if piece_R.dtype != torch.bfloat16:
        return piece_R
    return buffer(name, piece_R.shape, dtype, piece_R.device).copy_(piece_R)


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

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

from entkd.products import RowsOf, add_weight_gradient, cast, compute_dtype, hidden_gradient, projection
from entkd.rounded import copy_of, rounded
from entkd.workspace import buffer, recycled

TileLoss = Callable[[Tensor, Tensor, slice, Tensor | None], tuple[Tensor, Tensor]]
"""(logits, target, rows, gradient) → summed loss and its terms (T,). Into ``gradient``, where it is given, goes the
gradient of the loss by the logits, in its own type; it may be the logits' tensor. Logits and target may be overwritten,
a target in half precision excepted."""


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
        Weighted loss of some rows of a tile and its terms; writes its gradient.
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
            used_VD = _operand(weight_VD, product_dtype)[:vocab_size]
            logits = projection(used_ND, used_VD, "logits", rounded)
            hidden_grad_ND = torch.zeros(hidden_ND.shape, dtype=dtype, device=device) if wants[0] else None
            weight_grad_VD = recycled(weight_VD.shape, dtype, device) if wants[1] else None
            if weight_grad_VD is not None:
                weight_grad_VD[vocab_size if len(hidden_ND) else 0 :] = 0
            total = torch.zeros((), dtype=dtype, device=device)
            total_T = torch.zeros(terms, dtype=dtype, device=device)
            for tile in slices(len(hidden_ND), tile_rows(vocab_size, device)):
                logits_RV, targets_R = logits(tile), target(tile)
                grad_RV = _room_for_gradient(logits_RV, product_dtype) if any(wants) else None
                # In pieces of few rows: elementwise passes over a vocabulary are bound by memory, and a piece stays in
                # cache from the first pass to the last.
                for piece in slices(len(logits_RV), piece_rows(vocab_size, device)):
                    rows = slice(tile.start + piece.start, tile.start + piece.stop)
                    value, value_T = loss(
                        logits_RV[piece], targets_R[piece], rows, None if grad_RV is None else grad_RV[piece]
                    )
                    total += value
                    total_T += value_T
                if grad_RV is None:
                    continue
                if hidden_grad_ND is not None:
                    hidden_gradient(grad_RV, used_VD, hidden_grad_ND[tile])
                if weight_grad_VD is not None:
                    add_weight_gradient(weight_grad_VD[:vocab_size], grad_RV, used_ND[tile], tile.start == 0)
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
        # In place: a second tensor of the weight's size costs more than the multiplication. That by 1 is left out where
        # a look at the number is free.
        spared = grad_output.device.type == "cpu" and float(grad_output) == 1
        hidden_grad_ND, weight_grad_VD = (
            None if gradient is None else (gradient if spared else gradient.mul_(grad_output)).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        gradients.clear()
        return hidden_grad_ND, weight_grad_VD, *(None,) * 7


def _operand(weight_VD: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight as the products take it: a copy that is kept where one is, else in a buffer."""
    if dtype == torch.bfloat16 and copy_of(weight_VD) is not None:
        return rounded(weight_VD)
    return cast(weight_VD, dtype, "weight of products")


def _room_for_gradient(logits_RV: Tensor, dtype: torch.dtype) -> Tensor:
    """Where a tile's gradient goes: over logits of its own type, else into a buffer."""
    if dtype == logits_RV.dtype:
        return logits_RV
    return buffer("gradient of logits", logits_RV.shape, dtype, logits_RV.device)


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

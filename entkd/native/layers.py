"""Norms, gated activations and rotary positions in single passes, as autograd functions for training under autocast.

Only for what `entkd.models.faster_layers` has asked about; there is no other way to the same numbers in here.

Shapes: R rows (tokens), D width, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from entkd.native.build import library


class RMSNorm(torch.autograd.Function):
    """weight · x / √(mean(x²) + ε) of each row (arXiv 1910.07467, eq. 4), fp32."""

    @staticmethod
    def forward(ctx: Any, states_RD: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        states_RD = states_RD.contiguous()
        width = states_RD.shape[-1]
        inverse_R = states_RD.new_empty(states_RD.shape[:-1])
        out_RD = torch.empty_like(states_RD)
        _call("entkd_rms_norm", states_RD, weight_D, inverse_R, out_RD, epsilon, inverse_R.numel(), width)
        ctx.save_for_backward(states_RD, weight_D, inverse_R)
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_RD: Tensor) -> tuple[Tensor | None, ...]:
        states_RD, weight_D, inverse_R = ctx.saved_tensors
        of_states_RD, of_weight_D = torch.empty_like(states_RD), torch.empty_like(weight_D)
        tensors = states_RD, weight_D, inverse_R, gradient_RD.contiguous(), of_states_RD, of_weight_D
        _call("entkd_rms_norm_gradient", *tensors, inverse_R.numel(), len(weight_D))
        return of_states_RD, of_weight_D if ctx.needs_input_grad[1] else None, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) · up (arXiv 2002.05202, eq. 6) of bf16 tensors of one shape, rounded once."""

    @staticmethod
    def forward(ctx: Any, gate_RD: Tensor, up_RD: Tensor) -> Tensor:
        gate_RD, up_RD = gate_RD.contiguous(), up_RD.contiguous()
        out_RD = torch.empty_like(gate_RD)
        _call("entkd_swiglu", gate_RD, up_RD, out_RD, gate_RD.numel())
        ctx.save_for_backward(gate_RD, up_RD)
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_RD: Tensor) -> tuple[Tensor, Tensor]:
        gate_RD, up_RD = ctx.saved_tensors
        of_gate_RD, of_up_RD = torch.empty_like(gate_RD), torch.empty_like(up_RD)
        tensors = gate_RD, up_RD, gradient_RD.contiguous(), of_gate_RD, of_up_RD
        _call("entkd_swiglu_gradient", *tensors, gate_RD.numel())
        return of_gate_RD, of_up_RD


class Rotation(torch.autograd.Function):
    """Rotary positions (arXiv 2104.09864, eq. 34) of the heads (1, R, H, D), bf16, by cos and sin (1, R, D), fp32."""

    @staticmethod
    def forward(ctx: Any, states_1RHD: Tensor, cos_1RD: Tensor, sin_1RD: Tensor) -> Tensor:
        cos_1RD, sin_1RD = cos_1RD.contiguous(), sin_1RD.contiguous()
        ctx.save_for_backward(cos_1RD, sin_1RD)
        return _rotated(states_1RHD, cos_1RD, sin_1RD, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_1RHD: Tensor) -> tuple[Tensor, None, None]:
        cos_1RD, sin_1RD = ctx.saved_tensors
        return _rotated(gradient_1RHD, cos_1RD, sin_1RD, back=True), None, None


def _rotated(states_1RHD: Tensor, cos_1RD: Tensor, sin_1RD: Tensor, back: bool) -> Tensor:
    states_1RHD = states_1RHD.contiguous()
    out_1RHD = torch.empty_like(states_1RHD)
    _, tokens, heads, width = states_1RHD.shape
    _call("entkd_rotate", states_1RHD, cos_1RD, sin_1RD, out_1RHD, int(back), tokens, heads, width)
    return out_1RHD


def _call(name: str, *arguments: Tensor | float) -> None:
    """Call a kernel with the memory of tensors, which live until it returns, and numbers."""
    found = library()
    if found is None:
        raise RuntimeError("the compiled kernels are not there")
    getattr(found, name)(*(each.data_ptr() if isinstance(each, Tensor) else each for each in arguments))

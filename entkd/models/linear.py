"""Linear layers under autocast on a CPU: bf16 copies of the weights are kept, and their gradients summed in fp32.

Autocast casts every fp32 weight in every forward pass, and makes the gradient of the copy, in bf16, to cast it back.

Shapes: N tokens, D inputs, V outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from entkd import native
from entkd.models.access import output_weight
from entkd.rounded import rounded


def keep_rounded_weights(model: PreTrainedModel) -> None:
    """Let the model's linear layers work so, wherever autocast to bf16 is on, and the loss's products with the head.

    Without the compiled kernels nothing is changed. The layers' numbers are autocast's; gradients of weights are not
    rounded to bf16.
    """
    if not native.available():
        return
    rounded(output_weight(model))  # losses use a copy where there is one
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.float32 and "forward" not in vars(module):
            module.forward = _forward(module)  # type: ignore[method-assign]


def _forward(module: nn.Linear) -> Any:
    def forward(input_ND: Tensor) -> Tensor:
        if not (torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16):
            return nn.functional.linear(input_ND, module.weight, module.bias)
        out_NV: Tensor = _Linear.apply(input_ND, module.weight, module.bias, rounded(module.weight))  # type: ignore[no-untyped-call]
        return out_NV

    return forward


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, rounded_VD: Tensor) -> Tensor:
        ctx.dtypes = input_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype
        with torch.autocast("cpu", enabled=False):
            input_ND = input_ND.to(torch.bfloat16)
            ctx.save_for_backward(input_ND, rounded_VD)
            return nn.functional.linear(input_ND, rounded_VD, None if bias_V is None else bias_V.to(torch.bfloat16))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NV: Tensor) -> tuple[Tensor | None, ...]:
        input_ND, rounded_VD = ctx.saved_tensors
        of_input, of_weight, of_bias = (
            dtype if needed else None for needed, dtype in zip(ctx.needs_input_grad, ctx.dtypes, strict=False)
        )
        with torch.autocast("cpu", enabled=False):
            flat_NV, flat_ND = (each.flatten(0, -2).contiguous() for each in (gradient_NV, input_ND))
            return (
                None if of_input is None else (gradient_NV @ rounded_VD).to(of_input),
                None if of_weight is None else _weight_gradient(flat_NV, flat_ND, of_weight),
                None if of_bias is None else flat_NV.sum(0, dtype=of_bias),
                None,
            )


def _weight_gradient(gradient_NV: Tensor, input_ND: Tensor, dtype: torch.dtype) -> Tensor:
    sum_VD = input_ND.new_empty(gradient_NV.shape[1], input_ND.shape[1], dtype=dtype)
    if not native.weight_gradient(gradient_NV, input_ND, sum_VD, add=False):
        sum_VD.copy_(gradient_NV.T @ input_ND)
    return sum_VD

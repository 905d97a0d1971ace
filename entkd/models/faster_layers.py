"""Norms, gated MLPs and rotary positions of Llama and Qwen models on a CPU, each in a pass over memory.

Transformers' own code makes each of their operations a pass of its own, and another for its gradient: a fifth of a
training step. Under autocast to bf16 the results here are the same numbers, rounded once.

Shapes: R tokens of a row, D width, I width of the MLP, H heads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from entkd import native
from entkd.models.access import decoder_layers
from entkd.native.layers import RMSNorm, Rotation, SwiGLU

_TYPES = ("llama", "qwen2", "qwen3")
"""Model types whose norms, MLPs and rotary positions are as here, to which tests hold them."""


def use_faster_layers(model: PreTrainedModel) -> None:
    """Let norms and MLPs work so wherever autocast to bf16 is on. Without the compiled kernels nothing is changed."""
    if not (native.available() and model.config.model_type in _TYPES):
        return
    for module in model.modules():
        if "forward" in vars(module) or type(module).__module__ != _modeling(model):
            continue
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _norm(module)
        elif type(module).__name__.endswith("MLP") and type(module.act_fn).__name__ == "SiLUActivation":
            module.forward = _mlp(module)


@contextmanager
def faster_rotation(model: PreTrainedModel) -> Iterator[None]:
    """Let the model's layers rotate queries and keys so, within the block, under autocast to bf16.

    They look the function up in their module, where it is exchanged: no other thread may call a model of this type.
    """
    if not (_autocast() and native.available() and model.config.model_type in _TYPES):
        yield
        return
    modeling: Any = sys.modules[_modeling(model)]
    own = modeling.apply_rotary_pos_emb

    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        fits = unsqueeze_dim == 1 and len(query) == len(cos) == 1 and cos.dtype == sin.dtype == torch.float32
        if not fits or {query.dtype, key.dtype} != {torch.bfloat16} or query.shape[-1] != cos.shape[-1]:
            rotated: tuple[Tensor, Tensor] = own(query, key, cos, sin, unsqueeze_dim)
            return rotated
        query, key = (
            each if each.shape[1] == 0 else Rotation.apply(each.transpose(1, 2), cos, sin).transpose(1, 2)  # type: ignore[no-untyped-call]
            for each in (query, key)
        )
        return query, key

    modeling.apply_rotary_pos_emb = rotate
    try:
        yield
    finally:
        modeling.apply_rotary_pos_emb = own


def _modeling(model: PreTrainedModel) -> str:
    """The module in Transformers that the model's layers are written in; another for layers of somebody else."""
    layer = type(decoder_layers(model)[0]).__module__
    kind = model.config.model_type
    return layer if layer == f"transformers.models.{kind}.modeling_{kind}" else ""


def _autocast() -> bool:
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


def _norm(module: Any) -> Callable[[Tensor], Tensor]:
    plain = module.forward

    def forward(states_RD: Tensor) -> Tensor:
        if not (_autocast() and states_RD.dtype == module.weight.dtype == torch.float32):
            out_RD: Tensor = plain(states_RD)
            return out_RD
        out_RD = RMSNorm.apply(states_RD, module.weight, module.variance_epsilon)  # type: ignore[no-untyped-call]
        return out_RD

    return forward


def _mlp(module: Any) -> Callable[[Tensor], Tensor]:
    def forward(states_RD: Tensor) -> Tensor:
        gate_RI, up_RI = module.gate_proj(states_RD), module.up_proj(states_RD)
        if gate_RI.device.type == "cpu" and gate_RI.dtype == up_RI.dtype == torch.bfloat16:
            product_RI = SwiGLU.apply(gate_RI, up_RI)  # type: ignore[no-untyped-call]
        else:
            product_RI = module.act_fn(gate_RI) * up_RI
        out_RD: Tensor = module.down_proj(product_RI)
        return out_RD

    return forward

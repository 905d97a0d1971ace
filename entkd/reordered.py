"""Weights in the order in which a CPU's bf16 units read them, for as long as a model generates.

For every product of bf16 tensors oneDNN brings the weight into that order, which for the few rows of a decoding step is
a third of the product or more. Here that is done once, in place of the weight: memory holds either of the two.
"""

from __future__ import annotations

import ctypes
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_TYPES = ("gpt2", "llama", "qwen2", "qwen3")
"""Model types that read the weights of their linear layers by calling the layers alone, which tests hold them to."""

_TRIM = 2**26
"""Bytes of weights that at most are there in both orders."""


@contextmanager
def reordered_weights(model: PreTrainedModel) -> Iterator[None]:
    """Let the linear layers of a bf16 model on a CPU multiply reordered weights; other models are left alone.

    The products are those of the layers, to the bit but for a few shapes. Meanwhile the weights of the layers are
    empty; afterwards they are as before. Both ways together take as long as some ten decoding steps save.
    """
    freed = 0
    with ExitStack() as stack:
        if _can_be_reordered(model):
            owners = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
            for layer in model.modules():
                if type(layer) is nn.Linear and layer.weight.dtype == torch.bfloat16 and "forward" not in vars(layer):
                    # An embedding that is the output projection too needs its own order: that one is there twice.
                    keep, size = owners[id(layer.weight)] > 1, layer.weight.nbytes
                    stack.enter_context(_reordered(layer, keep))
                    freed += 0 if keep else size
                    if freed > _TRIM:
                        _give_back_freed_memory()
                        freed = 0
        yield


def _can_be_reordered(model: PreTrainedModel) -> bool:
    return (
        model.device.type == "cpu"
        and model.dtype == torch.bfloat16
        and model.config.model_type in _TYPES
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


@contextmanager
def _reordered(layer: nn.Linear, keep: bool) -> Iterator[None]:
    # Out of inference mode, whose tensors could not become weights again that autograd knows.
    with torch.inference_mode(False), torch.no_grad():
        weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().contiguous(), None)
        if not keep:
            layer.weight.data = layer.weight.new_empty(0)
    layer.forward = _forward(weight, layer.bias)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del layer.forward
        if not keep:
            with torch.inference_mode(False), torch.no_grad():
                layer.weight.data = weight.to_dense()


def _forward(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    def forward(states: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
        return product

    return forward


def _give_back_freed_memory() -> None:
    """To the system. Transformers loads by threads, and glibc keeps what one of them took from all the others."""
    if sys.platform == "linux":
        malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if malloc_trim is not None:
            malloc_trim(0)

"""bf16 copies of fp32 weights, made once per change of the weight and not at every use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["copy_of", "rounded", "written"]


@dataclass
class _Copy:
    tensor: Tensor
    state: tuple[int, int] | None = None
    """Of the weight that it is a copy of: version and memory."""


_copies = WeakTensorKeyDictionary()


def rounded(weight: Tensor) -> Tensor:
    """The weight in bf16, without gradient. Made again if the weight was written to since the last call.

    Writes to ``weight.data``, which autograd does not see either, are not noticed.
    """
    found: _Copy | None = _copies.get(weight)
    if found is None:
        with torch.inference_mode(mode=False):  # one made in this mode could never be saved for a backward pass
            copy = torch.empty_like(weight, dtype=torch.bfloat16, requires_grad=False)
        found = _copies[weight] = _Copy(copy)
    if found.state != _state(weight):
        found.tensor.copy_(weight.detach())
        found.state = _state(weight)
    return found.tensor


def copy_of(weight: Tensor) -> Tensor | None:
    """The copy, for whoever writes to it with the weight; None where nobody asked for one."""
    found: _Copy | None = _copies.get(weight)
    return None if found is None else found.tensor


def written(weight: Tensor) -> None:
    """Say that the copy has been written with the weight."""
    found: _Copy | None = _copies.get(weight)
    if found is not None:
        found.state = _state(weight)


def _state(weight: Tensor) -> tuple[int, int]:
    return weight._version, weight.data_ptr()

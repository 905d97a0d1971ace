"""Buffers that outlive the call that fills them.

A training step writes some hundred megabytes of logits and forgets them. Taken from the allocator each time, on a CPU
they come as fresh pages, and faulting those in cost up to half of the arithmetic that fills them. An accelerator's
caching allocator keeps its memory, so there a buffer is simply new.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor


class _Kept(threading.local):
    """Per thread, since two threads may each be inside a loss."""

    def __init__(self) -> None:
        self.bytes: dict[str, Tensor] = {}
        self.recycled: dict[int, list[Tensor]] = {}


_kept = _Kept()


def buffer(name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor, valid until the next call of the same name.

    Never keep one, nor save one for a backward pass: copy what has to last.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    kept = _kept.bytes.get(name)
    if kept is None or len(kept) < size:
        kept = _kept.bytes[name] = torch.empty(size, dtype=torch.uint8)
    return kept[:size].view(dtype).view(*shape)


def recycled(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor of one's own, where possible in memory of an earlier one that no tensor uses any more.

    Unlike a `buffer` it may be kept and handed on, as gradients are: its memory is given out again only once every
    tensor that shares it is gone.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    pool = _kept.recycled.setdefault(size, [])
    free = next((kept for kept in pool if _users(kept) == _UNUSED), None)
    if free is None:
        free = torch.empty(size, dtype=torch.uint8)
        pool.append(free)
    return free.view(dtype).view(*shape)


def _users(tensor: Tensor) -> int:
    """References to the memory of a tensor, by whatever tensor."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


_UNUSED = _users(torch.empty(1))
"""What `_users` says of memory that one tensor alone uses."""

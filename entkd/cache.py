"""A key-value cache that grows in place.

Shape suffixes: B rows of the batch, H key-value heads, L tokens so far, D head width.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

_ROOM = 64
"""Tokens by which the buffers grow: one copy of the cache in so many steps."""


def growing_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache whose layers of full attention grow in place; other kinds stay as transformers has them."""
    cache = DynamicCache(config=model.config)
    cache.layers = [
        _GrowingLayer() if type(layer) is DynamicLayer else layer  # type: ignore[no-untyped-call]
        for layer in cache.layers
    ]
    return cache


class _GrowingLayer(DynamicLayer):
    """Keys and values of one layer as the filled parts of buffers with room for further tokens.

    The layer that it replaces copies everything it holds at every step.
    """

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.key_buffer_BHLD, self.value_buffer_BHLD = self.keys, self.values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (B, H, new, D) keys and values; returns all so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.key_buffer_BHLD, self.keys = _extend(self.key_buffer_BHLD, self.keys, key_states)
        self.value_buffer_BHLD, self.values = _extend(self.value_buffer_BHLD, self.values, value_states)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``; the buffers of all rows are freed now, not at the next update of each layer."""
        super().batch_select_indices(indices)
        if self.keys is not None and self.values is not None:
            self.key_buffer_BHLD, self.value_buffer_BHLD = self.keys, self.values


def _extend(
    buffer_BHLD: torch.Tensor, filled_BHLD: torch.Tensor, new_BHLD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The buffer with the new states behind the filled part, and the filled part.

    It is another buffer if there is no room, or if an inherited method has put a copy in place of the filled part.
    """
    start = filled_BHLD.shape[2]
    end = start + new_BHLD.shape[2]
    if end > buffer_BHLD.shape[2] or filled_BHLD.data_ptr() != buffer_BHLD.data_ptr():
        rows, heads, _, width = new_BHLD.shape
        buffer_BHLD = new_BHLD.new_empty(rows, heads, end + _ROOM, width)
        buffer_BHLD[:, :, :start] = filled_BHLD
    buffer_BHLD[:, :, start:end] = new_BHLD
    return buffer_BHLD, buffer_BHLD[:, :, :end]

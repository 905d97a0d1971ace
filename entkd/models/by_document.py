"""Packed blocks without gradient on a CPU: padding is left out, and attention runs document by document.

A block-diagonal mask makes attention compute every pair of tokens of a block and throw most of them away, and padding
goes through every layer. Without gradient neither is needed: all documents lie behind one another in a single row, and
each is one causal call of the attention that Transformers would call. In training the same costs more than it saves:
the backward pass cuts and joins the pieces of every layer once more.

Shapes: B blocks, L tokens of a block, N predicting positions, K tokens that are kept, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from entkd.models.access import trunk_forward

if TYPE_CHECKING:
    from entkd.data.packing import Batch

_ATTENTION = "entkd_by_document"
_TYPES = ("gpt2", "llama", "qwen2", "qwen3")
"""Model types whose attention takes what it is given from the interface, and that tests hold to their own outputs."""
_ROUND = 16
"""Rows of a matrix product: an odd number of them costs more than the rows up to the next multiple."""


def packed_states(
    model: PreTrainedModel, batch: Batch, capture: Sequence[int] = ()
) -> tuple[Tensor, dict[int, Tensor]]:
    """`trunk_forward` of a batch at its predicting positions: (N, D) last hidden states, and those of the layers."""
    if not _can_go_by_document(model, batch):
        hidden_BLD, captured = trunk_forward(model, batch.input_ids_BL, batch.position_ids_BL, capture)
        states = {layer: each_BLD.flatten(0, 1)[batch.positions_N] for layer, each_BLD in captured.items()}
        return hidden_BLD.flatten(0, 1)[batch.positions_N], states
    ids_K, positions_K, index_N = _kept(batch)
    with _attention_by_document(model, (positions_K == 0).nonzero()[:, 0].tolist(), len(ids_K)):
        hidden_1KD, captured = trunk_forward(model, ids_K[None], positions_K[None], capture)
    return hidden_1KD[0, index_N], {layer: each_1KD[0, index_N] for layer, each_1KD in captured.items()}


def _can_go_by_document(model: PreTrainedModel, batch: Batch) -> bool:
    config = model.config
    return (
        not torch.is_grad_enabled()
        and batch.input_ids_BL.device.type == "cpu"
        and config.model_type in _TYPES
        and config._attn_implementation == "sdpa"
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    )


def _kept(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and positions of the tokens of documents, and where the predicting positions are among them."""
    # Padding has position 0 each. A document has at least two tokens, one that predicts and one that is predicted.
    positions_BL = batch.position_ids_BL
    goes_on_BL = torch.zeros_like(positions_BL, dtype=torch.bool)
    goes_on_BL[:, :-1] = positions_BL[:, 1:] != 0
    kept_BL = (positions_BL != 0) | goes_on_BL
    index_N = (kept_BL.flatten().cumsum(0) - 1)[batch.positions_N]
    ids_K, positions_K = batch.input_ids_BL[kept_BL], positions_BL[kept_BL]
    rest = -len(ids_K) % _ROUND
    return nn.functional.pad(ids_K, (0, rest)), torch.cat([positions_K, torch.arange(rest)]), index_N


@contextmanager
def _attention_by_document(model: PreTrainedModel, starts: list[int], tokens: int) -> Iterator[None]:
    """Let the model's layers attend within the documents that start there."""
    lengths = [stop - start for start, stop in zip(starts, [*starts[1:], tokens], strict=True)]

    def attention(
        module: nn.Module,
        query_1HKD: Tensor,
        key_1HKD: Tensor,
        value_1HKD: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        del module, attention_mask, kwargs
        groups = query_1HKD.shape[1] // key_1HKD.shape[1]
        key_1HKD, value_1HKD = key_1HKD.repeat_interleave(groups, 1), value_1HKD.repeat_interleave(groups, 1)
        out_1KHD = query_1HKD.new_empty(query_1HKD.transpose(1, 2).shape)
        parts = (each.split(lengths, 2) for each in (query_1HKD, key_1HKD, value_1HKD))
        for query, key, value, out in zip(*parts, out_1KHD.split(lengths, 1), strict=True):
            found = nn.functional.scaled_dot_product_attention(
                query, key, value, dropout_p=dropout, is_causal=True, scale=scaling
            )
            out.copy_(found.transpose(1, 2))
        return out_1KHD, None

    AttentionInterface.register(_ATTENTION, attention)
    before = model.config._attn_implementation
    model.config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        model.config._attn_implementation = before

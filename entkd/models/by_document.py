"""Packed blocks on a CPU: no padding, attention document by document, and the last layer only where it is read.

A block-diagonal mask makes attention compute every pair of tokens of a block and throw most of them away, padding goes
through every layer, and the last layer computes tokens that predict nothing. None of that is needed: all documents lie
behind one another in a single row, and each is one causal call of the attention that Transformers would call.

Shapes: B blocks, L tokens of a block, N predicting positions, K tokens that are kept, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from entkd.models.access import decoder_layers, output_weight, trunk_forward
from entkd.models.attention import Document, at_positions, attend, whole
from entkd.models.faster_layers import faster_rotation
from entkd.models.last_layer import can_be_cut, last_layer_at

if TYPE_CHECKING:
    from entkd.data.packing import Batch

_ATTENTION = "entkd"
_TYPES = ("gpt2", "llama", "qwen2", "qwen3")
"""Model types whose attention takes what it is given from the interface, and that tests hold to their own outputs."""
_DROPOUTS = ("attention_dropout", "attn_pdrop")
"""Where their configurations have the dropout of attention, which the kernel for CPUs has not."""
ROUND = 16
"""Rows of a matrix product: an odd number of them costs more than the rows up to the next multiple."""


def packed_states(
    model: PreTrainedModel, batch: Batch, capture: Sequence[int] = ()
) -> tuple[Tensor, dict[int, Tensor]]:
    """`trunk_forward` of a batch at its predicting positions: (N, D) last hidden states, and those of the layers.

    With gradient where it is on.
    """
    if not _can_go_by_document(model, batch):
        hidden_BLD, captured = trunk_forward(model, batch.input_ids_BL, batch.position_ids_BL, capture)
        states = {layer: each_BLD.flatten(0, 1)[batch.positions_N] for layer, each_BLD in captured.items()}
        return hidden_BLD.flatten(0, 1)[batch.positions_N], states
    ids_K, positions_K, index_N = _kept(batch)
    documents = whole((positions_K == 0).nonzero()[:, 0].tolist(), len(ids_K))
    cut = can_be_cut(model) and bool((index_N.diff() > 0).all())
    with ExitStack() as stack:
        stack.enter_context(with_attention(model, _by_document(documents)))
        stack.enter_context(faster_rotation(model))
        if cut:
            stack.enter_context(last_layer_at(model, index_N, at_positions(documents, index_N)))
        hidden, captured = trunk_forward(model, ids_K[None], positions_K[None], capture)
    last = len(decoder_layers(model)) - 1

    def at_index(states_1KD: Tensor, layer: int) -> Tensor:
        return states_1KD[0] if cut and layer == last else states_1KD[0].index_select(0, index_N)

    return at_index(hidden, last), {layer: at_index(each, layer) for layer, each in captured.items()}


def _can_go_by_document(model: PreTrainedModel, batch: Batch) -> bool:
    dropout = any(getattr(model.config, name, 0) for name in _DROPOUTS)
    return (
        batch.input_ids_BL.device.type == output_weight(model).device.type == "cpu"
        and has_other_attention(model)
        # What checkpointing computes again, it would compute with the model's own attention.
        and not (model.training and (dropout or model.is_activation_checkpointing))
    )


def has_other_attention(model: PreTrainedModel) -> bool:
    """Whether `with_attention` may be used: the model attends to all that came before, by way of the interface."""
    config = model.config
    return (
        config.model_type in _TYPES
        and config._attn_implementation == "sdpa"
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    )


def _kept(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and positions of the tokens of documents, and where the predicting positions are among them."""
    # Padding has position 0 each. A document has at least two tokens, or its only one predicts.
    positions_BL = batch.position_ids_BL
    goes_on_BL = torch.zeros_like(positions_BL, dtype=torch.bool)
    goes_on_BL[:, :-1] = positions_BL[:, 1:] != 0
    kept_BL = (positions_BL != 0) | goes_on_BL
    kept_BL.view(-1)[batch.positions_N] = True
    index_N = (kept_BL.flatten().cumsum(0) - 1)[batch.positions_N]
    ids_K, positions_K = batch.input_ids_BL[kept_BL], positions_BL[kept_BL]
    rest = -len(ids_K) % ROUND if len(ids_K) else ROUND  # a batch of padding alone has gradients too: zeros
    return nn.functional.pad(ids_K, (0, rest)), torch.cat([positions_K, torch.arange(rest)]), index_N


def _by_document(documents: Sequence[Document]) -> Callable[..., tuple[Tensor, None]]:
    """Attention within the documents."""

    def attention(
        module: nn.Module,
        query_1HKD: Tensor,
        key_1HKD: Tensor,
        value_1HKD: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        del module, attention_mask, kwargs
        return attend(query_1HKD, key_1HKD, value_1HKD, documents, scaling), None

    return attention


@contextmanager
def with_attention(model: PreTrainedModel, attention: Callable[..., tuple[Tensor, None]]) -> Iterator[None]:
    """Let the model's layers attend by this function, as Transformers' interface calls it."""
    AttentionInterface.register(_ATTENTION, attention)
    before = model.config._attn_implementation
    model.config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        model.config._attn_implementation = before

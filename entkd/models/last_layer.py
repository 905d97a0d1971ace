"""The last decoder layer at some tokens alone: nobody reads what it makes of the others.

Keys and values are still of all tokens; queries, output projection, residual and MLP of the tokens asked for.

Shapes: K tokens of a row, N of them that are asked for, D width, H heads.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from entkd.models.access import decoder_layers
from entkd.models.attention import Document, attend

_TYPES = ("llama", "qwen2", "qwen3")
"""Model types whose layers are built as here."""


def can_be_cut(model: PreTrainedModel) -> bool:
    """Whether the last layer is one of Transformers' own of the known types, as it was written."""
    layer, kind = decoder_layers(model)[-1], model.config.model_type
    own = f"transformers.models.{kind}.modeling_{kind}"
    modules = (layer, getattr(layer, "self_attn", None))
    return kind in _TYPES and all(type(each).__module__ == own and "forward" not in vars(each) for each in modules)


@contextmanager
def last_layer_at(model: PreTrainedModel, index_N: Tensor, documents: Sequence[Document]) -> Iterator[None]:
    """Let the model's last layer map (1, K, D) to (1, N, D), the tokens ``index_N``.

    Parameters
    ----------
    documents
        With queries of these tokens.
    """
    layer: Any = decoder_layers(model)[-1]
    attention = layer.self_attn
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb

    def heads(name: str, hidden_1KD: Tensor) -> Tensor:
        states_1KHD = getattr(attention, f"{name}_proj")(hidden_1KD).unflatten(-1, (-1, attention.head_dim))
        norm = getattr(attention, f"{name}_norm", None)
        states_1HKD: Tensor = (states_1KHD if norm is None else norm(states_1KHD)).transpose(1, 2)
        return states_1HKD

    def forward(hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], **_unused: Any) -> Tensor:
        normed_1KD = layer.input_layernorm(hidden_states)
        query, key = heads("q", normed_1KD.index_select(1, index_N)), heads("k", normed_1KD)
        # The function turns two tensors at the same tokens: an empty one is free.
        query, _ = rotate(query, query[:, :0], *(each.index_select(1, index_N) for each in position_embeddings))
        _, key = rotate(key[:, :0], key, *position_embeddings)
        out_1NHD = attend(query, key, heads("v", normed_1KD), documents, attention.scaling)
        hidden_1ND = hidden_states.index_select(1, index_N) + attention.o_proj(out_1NHD.flatten(2))
        result_1ND: Tensor = hidden_1ND + layer.mlp(layer.post_attention_layernorm(hidden_1ND))
        return result_1ND

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward

"""What makes a training step on a CPU cheaper without changing a number.

Shape suffixes: B batch, L tokens of a row, D width, V rows of the output projection, N tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from entkd.models.access import output_weight
from entkd.models.faster_layers import use_faster_layers
from entkd.models.linear import keep_rounded_weights


def prepare_for_cpu(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Do what makes training steps on a CPU in this precision cheaper: nothing else is to be done before training."""
    gather_embedding_gradient(model)
    if dtype == torch.bfloat16:
        keep_rounded_weights(model)
        use_faster_layers(model)


def gather_embedding_gradient(model: PreTrainedModel) -> None:
    """Let an embedding that is also the output projection add its rows' gradients into that of the projection.

    Autograd makes a dense tensor of the weight's size, zero but for the rows of the tokens at hand, and adds both:
    passes over fresh memory. Here the rows wait until the projection's gradient is there. A model whose embedding is a
    weight of its own, or does more than look up rows (Gemma scales them), is left alone. Losses must read the
    projection: one without its gradient is refused.
    """
    embedding = model.get_input_embeddings()
    if type(embedding) is not nn.Embedding or embedding.weight is not output_weight(model):
        return
    weight, padding_id = embedding.weight, embedding.padding_idx
    waiting: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Rows(torch.autograd.Function):
        """The embedding. It stays an ancestor of the weight, whose gradient is complete only after it."""

        @staticmethod
        def forward(ctx: Any, weight_VD: torch.Tensor, ids_BL: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(ids_BL)
            return nn.functional.embedding(ids_BL, weight_VD)

        @staticmethod
        def backward(ctx: Any, gradient_BLD: torch.Tensor) -> tuple[None, None]:
            (ids_BL,) = ctx.saved_tensors
            own_BL = torch.ones_like(ids_BL, dtype=torch.bool) if padding_id is None else ids_BL != padding_id
            waiting.append((ids_BL[own_BL], gradient_BLD[own_BL]))
            return None, None

    def add_rows(_weight: torch.Tensor) -> None:
        if weight.grad is None:
            raise RuntimeError("the loss gives the output projection no gradient to add the embedding's to")
        for ids_N, gradient_ND in waiting:
            weight.grad.index_add_(0, ids_N, gradient_ND.to(weight.grad.dtype))
        waiting.clear()

    def forward(ids_BL: torch.Tensor) -> torch.Tensor:
        embedded_BLD: torch.Tensor = Rows.apply(weight, ids_BL)  # type: ignore[no-untyped-call]
        return embedded_BLD

    weight.register_post_accumulate_grad_hook(add_rows)
    embedding.forward = forward  # type: ignore[method-assign,assignment]

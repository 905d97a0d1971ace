"""Greedy continuations for lm-eval on a CPU, by this project's own loop instead of Transformers'.

Shapes: B rows of a batch, L tokens of a row.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entkd.generate import generate

_HARMLESS = {
    *("bos_token_id", "pad_token_id", "eos_token_id"),
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p"),
    *("output_attentions", "output_hidden_states", "use_cache", "transformers_version", "_from_model_config"),
}
"""Settings of a model's generation that do not change which token is the most probable one."""


def is_greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], kwargs: Mapping[str, Any]
) -> bool:
    """Whether ``model.generate`` would take the most probable tokens until EOS, and `continued` says the same sooner.

    Parameters
    ----------
    stop, kwargs
        Stop strings and arguments that lm-eval gives.
    """
    own = {} if model.generation_config is None else model.generation_config.to_diff_dict()
    return (
        model.device.type == "cpu"
        and list(stop) == [tokenizer.eos_token]
        and own.get("eos_token_id") == tokenizer.eos_token_id
        and own.keys() <= _HARMLESS
        and kwargs.keys() <= {"attention_mask", "do_sample", "temperature"}
        and not kwargs.get("do_sample")
        and not kwargs.get("temperature")
    )


def continued(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context_BL: Tensor, mask_BL: Tensor, max_length: int
) -> Tensor:
    """(B, ``max_length``) the left-padded contexts and what follows, then EOS."""
    prompts = [ids_L[mask_L.bool()].tolist() for ids_L, mask_L in zip(context_BL, mask_BL, strict=True)]
    limit = max_length - context_BL.shape[1]
    rows = generate(model, tokenizer, prompts, max_new_tokens=limit, max_length=sys.maxsize, batch=len(prompts))
    padded = [row + [tokenizer.eos_token_id] * (limit - len(row)) for row in rows]
    return torch.cat([context_BL, torch.tensor(padded)], dim=1)

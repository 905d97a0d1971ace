"""Hidden states of rows that begin alike: on a CPU each distinct prefix passes the model once.

What a causal model makes of a token depends on the tokens before it, so rows that begin alike have the same states
there: the two sentences of a minimal pair, the choices of a question. All distinct prefixes lie in a single row, each
as its last token at its position. Short rows attend in blocks of some prefixes, each to its own beginnings; PyTorch's
kernel takes several times as long for as many tokens in rows of ten.

Shapes: N distinct prefixes, K of them that are asked for, B rows or blocks, of L tokens each or padded to L, T tokens
of all blocks, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from entkd.models.access import output_weight, trunk_forward
from entkd.models.by_document import ROUND, has_other_attention, with_attention

_BLOCK = 64
"""Prefixes that attend together; longer rows attend alone."""


@dataclass(frozen=True)
class Prefixes:
    """The distinct prefixes of some rows, numbered."""

    rows: Sequence[Sequence[int]]
    """Token ids."""
    of_rows: list[list[int]]
    """The numbers of each row's prefixes, short to long."""
    first: list[tuple[int, int]]
    """Of each prefix: a row that begins with it, and where its last token is there."""
    beginnings: list[int]
    """The number of the prefix without its last token; -1 where that is none."""

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Prefixes:
        numbers: dict[tuple[int, int], int] = {}  # (prefix, next token) → the longer prefix
        first: list[tuple[int, int]] = []
        of_rows = []
        for index, row in enumerate(rows):
            prefix, own = -1, []
            for step, token in enumerate(row):
                prefix = numbers.setdefault((prefix, token), len(numbers))
                if prefix == len(first):
                    first.append((index, step))
                own.append(prefix)
            of_rows.append(own)
        return cls(rows, of_rows, first, [beginning for beginning, _ in numbers])


def goes_by_prefix(model: PreTrainedModel) -> bool:
    """Whether `prefix_states` takes each prefix once; else it takes the rows, padded to the longest."""
    return output_weight(model).device.type == "cpu" and not model.training and has_other_attention(model)


def prefix_states(model: PreTrainedModel, prefixes: Prefixes, index_K: Tensor) -> Tensor:
    """(K, D) last hidden states of the last tokens of the prefixes with these numbers."""
    if not goes_by_prefix(model):
        return _padded_states(model, prefixes, index_K)
    rest = -len(prefixes.first) % ROUND
    ids_N = torch.tensor([prefixes.rows[row][step] for row, step in prefixes.first] + [0] * rest)
    positions_N = torch.tensor([step for _, step in prefixes.first] + [0] * rest)
    blocks = _blocks(prefixes)
    every_T = torch.cat([index_BL.flatten() for index_BL, _ in blocks])
    # Any token with a prefix has its state; the padding gets that of some token.
    one_N = torch.zeros(len(ids_N), dtype=torch.int64).scatter_(0, every_T, torch.arange(len(every_T)))

    def attention(
        module: nn.Module,
        query_1HND: Tensor,
        key_1HND: Tensor,
        value_1HND: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        del module, attention_mask, kwargs
        states = [each[0].transpose(0, 1) for each in (query_1HND, key_1HND, value_1HND)]
        parts = []
        for index_BL, seen_B1LL in blocks:
            query_BHLD, key_BHLD, value_BHLD = (each_NHD[index_BL].transpose(1, 2) for each_NHD in states)
            out_BHLD = nn.functional.scaled_dot_product_attention(
                *(query_BHLD, key_BHLD, value_BHLD, seen_B1LL),
                is_causal=seen_B1LL is None,
                scale=scaling,
                enable_gqa=True,
            )
            parts.append(out_BHLD.transpose(1, 2).flatten(0, 1))
        return torch.cat(parts)[one_N][None], None

    with with_attention(model, attention):
        hidden_1ND, _ = trunk_forward(model, ids_N[None], positions_N[None])
    return hidden_1ND[0, index_K]


def _blocks(prefixes: Prefixes) -> list[tuple[Tensor, Tensor | None]]:
    """(B, L) numbers of prefixes that attend together, and (B, 1, L, L) which see which; None is causal.

    With a row, all its prefixes are in a block. Where the block has room left, its first prefix comes again.
    """
    blocks: list[tuple[Tensor, Tensor | None]] = []
    short: list[dict[int, int]] = []  # blocks of short rows: prefix → place
    for own in prefixes.of_rows:
        if len(own) > _BLOCK:
            blocks.append((torch.tensor([own]), None))
            continue
        if not short or len(short[-1].keys() | own) > _BLOCK:
            short.append({})
        for prefix in own:
            short[-1].setdefault(prefix, len(short[-1]))
    if short:
        index_BL = np.asarray([[*places, *[next(iter(places))] * (_BLOCK - len(places))] for places in short])
        seen_BLL = np.tile(np.eye(_BLOCK, dtype=bool), (len(short), 1, 1))
        for places, seen_LL in zip(short, seen_BLL, strict=True):
            for prefix, place in places.items():
                beginning = places.get(prefixes.beginnings[prefix])
                if beginning is not None:
                    seen_LL[place] |= seen_LL[beginning]
        blocks.append((torch.from_numpy(index_BL), torch.from_numpy(seen_BLL)[:, None]))
    return blocks


def _padded_states(model: PreTrainedModel, prefixes: Prefixes, index_K: Tensor) -> Tensor:
    longest = max(map(len, prefixes.rows))
    ids_BL = torch.tensor([[*row, *[0] * (longest - len(row))] for row in prefixes.rows], device=index_K.device)
    hidden_BLD, _ = trunk_forward(model, ids_BL, torch.arange(longest, device=index_K.device).expand(len(ids_BL), -1))
    flat_N = torch.tensor([row * longest + step for row, step in prefixes.first], device=index_K.device)
    return hidden_BLD.flatten(0, 1)[flat_N[index_K]]

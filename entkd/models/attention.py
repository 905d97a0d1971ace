"""Causal attention of documents that lie behind one another in a single row, on a CPU.

No pair of tokens of two documents is computed, and every document reads and writes its part of the row: nothing is
split or joined for autograd. The forward pass is PyTorch's own kernel. Its backward kernel takes several times as long
as the matrix products that it consists of, so those are done by `native.attention_gradient` where that can, and here
otherwise, some queries at a time.

Shapes: Q queries and K keys of the row, q and k those of one document, H heads, G heads of the keys, D width of a head,
S = Q · H / G queries of all heads that share keys, d = D + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from entkd import native
from entkd.products import compute_dtype
from entkd.workspace import buffer

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_QUERIES = 128
"""Queries at a time in the backward pass: their products with the keys stay in the cache."""


class Document(NamedTuple):
    """Where the queries and the keys of a document are in the row."""

    queries: slice
    keys: slice
    at_q: Tensor
    """Ascending: which of these keys is the query's own, the last that it sees."""


def whole(starts: Sequence[int], tokens: int) -> list[Document]:
    """The documents that start there, of ``tokens`` in all, with a query of every token."""
    parts = [slice(start, stop) for start, stop in zip(starts, [*starts[1:], tokens], strict=True)]
    return [Document(part, part, torch.arange(part.stop - part.start)) for part in parts]


def at_positions(documents: Sequence[Document], index_Q: Tensor) -> list[Document]:
    """The same documents with queries of the tokens ``index_Q`` alone, which ascend."""
    stops = torch.tensor([document.keys.stop for document in documents], dtype=torch.int64)
    ends = torch.searchsorted(index_Q, stops).tolist()
    parts = []
    for document, first, last in zip(documents, [0, *ends[:-1]], ends, strict=True):
        if first < last:
            at_q = index_Q[first:last] - document.keys.start
            keys = slice(document.keys.start, document.keys.start + int(at_q[-1]) + 1)  # nobody sees those behind
            parts.append(Document(slice(first, last), keys, at_q))
    return parts


def attend(
    query_1HQD: Tensor, key_1GKD: Tensor, value_1GKD: Tensor, documents: Sequence[Document], scaling: float | None
) -> Tensor:
    """Attention within the documents, (1, Q, H, D); in the dtype of autocast where it is on, as PyTorch's own is.

    Parameters
    ----------
    documents
        Queries that are of none give zeros.
    scaling
        Of the products of queries and keys; None is D^-½.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query_1HQD.dtype
    scaling = query_1HQD.shape[-1] ** -0.5 if scaling is None else scaling
    out_1QHD: Tensor = _Attention.apply(query_1HQD, key_1GKD, value_1GKD, documents, scaling, dtype)  # type: ignore[no-untyped-call]
    return out_1QHD


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_1HQD: Tensor,
        key_1GKD: Tensor,
        value_1GKD: Tensor,
        documents: Sequence[Document],
        scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.dtypes = query_1HQD.dtype, key_1GKD.dtype, value_1GKD.dtype
        query_1HQD, key_1GKD, value_1GKD = (each.to(dtype) for each in (query_1HQD, key_1GKD, value_1GKD))
        out_1QHD = query_1HQD.new_zeros(query_1HQD.transpose(1, 2).shape)
        logsumexp_1HQ = query_1HQD.new_zeros(query_1HQD.shape[:-1], dtype=compute_dtype(query_1HQD))
        for queries, keys, at_q in documents:
            mask_qk = None
            if len(at_q) != keys.stop - keys.start:
                # In the dtype of the queries: the kernel reads fp32 masks of fp64 queries as something else.
                mask_qk = torch.zeros(len(at_q), keys.stop - keys.start, dtype=dtype)
                mask_qk.masked_fill_(_unseen(at_q, 0, mask_qk.shape[1]), float("-inf"))
            out_1HqD, logsumexp_1HQ[:, :, queries] = _forward(
                query_1HQD[:, :, queries],
                key_1GKD[:, :, keys],
                value_1GKD[:, :, keys],
                is_causal=mask_qk is None,
                attn_mask=mask_qk,
                scale=scaling,
            )
            out_1QHD[:, queries] = out_1HqD.transpose(1, 2)
        ctx.documents, ctx.scaling = documents, scaling
        ctx.save_for_backward(query_1HQD, key_1GKD, value_1GKD, out_1QHD, logsumexp_1HQ)
        return out_1QHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_1QHD: Tensor) -> tuple[Tensor | None, ...]:
        query_1HQD, key_1GKD, value_1GKD, out_1QHD, logsumexp_1HQ = ctx.saved_tensors
        found = native.attention_gradient(
            *(query_1HQD, key_1GKD, value_1GKD, out_1QHD, gradient_1QHD, logsumexp_1HQ),
            *(ctx.documents, ctx.scaling, ctx.dtypes),
        )
        if found is not None:
            return *found, None, None, None
        heads, shared = key_1GKD.shape[1], query_1HQD.shape[1] // key_1GKD.shape[1]
        with torch.autocast("cpu", enabled=False):
            mean_1QH = torch.linalg.vecdot(*(each.to(logsumexp_1HQ.dtype) for each in (gradient_1QHD, out_1QHD)))
            ones_1GK = torch.ones(key_1GKD.shape[:-1])
            # One column more of both operands subtracts logsumexp and mean within the products.
            of_query_GSd, of_key_GKd, of_value_GKd = _gradients(
                _with_column(query_1HQD, -logsumexp_1HQ, heads, ctx.scaling),
                _with_column(gradient_1QHD.transpose(1, 2), -mean_1QH.transpose(1, 2), heads),
                _with_column(key_1GKD, ones_1GK, heads),
                _with_column(value_1GKD, ones_1GK, heads),
                ctx.documents,
                shared,
            )
            of_query_GSd *= ctx.scaling
        dtype_of_query, dtype_of_key, dtype_of_value = ctx.dtypes
        return (
            _without_column(of_query_GSd, shared, dtype_of_query),
            _without_column(of_key_GKd, 1, dtype_of_key),
            _without_column(of_value_GKd, 1, dtype_of_value),
            *(None, None, None),
        )


def _gradients(
    query_GSd: Tensor,
    gradient_GSd: Tensor,
    key_GKd: Tensor,
    value_GKd: Tensor,
    documents: Sequence[Document],
    shared: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of scaled queries, of keys and of values; their last column means nothing."""
    of_query_GSd, of_key_GKd, of_value_GKd = (torch.zeros_like(each) for each in (query_GSd, key_GKd, value_GKd))
    for queries, keys, at_q in documents:
        for first in range(0, len(at_q), _QUERIES):
            at = at_q[first : first + _QUERIES]
            own = slice((queries.start + first) * shared, (queries.start + first + len(at)) * shared)
            seen, some = slice(keys.start, keys.start + int(at[-1]) + 1), int(at[0])
            shape = (len(key_GKd), len(at) * shared, seen.stop - seen.start)
            p, of_logits = (buffer(name, shape, key_GKd.dtype, at.device) for name in ("attention", "its gradient"))
            torch.bmm(query_GSd[:, own], key_GKd[:, seen].mT, out=p).exp_()
            p.unflatten(1, (-1, shared))[..., some:].masked_fill_(_unseen(at, some, shape[2])[:, None], 0)
            of_value_GKd[:, seen].baddbmm_(p.mT, gradient_GSd[:, own])
            torch.bmm(gradient_GSd[:, own], value_GKd[:, seen].mT, out=of_logits).mul_(p)
            of_key_GKd[:, seen].baddbmm_(of_logits.mT, query_GSd[:, own])
            of_query_GSd[:, own].baddbmm_(of_logits, key_GKd[:, seen])
    return of_query_GSd, of_key_GKd, of_value_GKd


def _with_column(states_1HQD: Tensor, column_1HQ: Tensor, heads: int, scaling: float = 1.0) -> Tensor:
    """(G, S, d) the scaled states and a column in `compute_dtype`, heads that share keys next to one another."""
    _, all_heads, tokens, width = states_1HQD.shape
    shape_GQRd = heads, tokens, all_heads // heads, width + 1
    out_GQRd = states_1HQD.new_empty(shape_GQRd, dtype=compute_dtype(states_1HQD))
    out_GQRd[..., :-1] = states_1HQD[0].unflatten(0, (heads, -1)).transpose(1, 2)
    out_GQRd[..., :-1] *= scaling
    out_GQRd[..., -1] = column_1HQ[0].unflatten(0, (heads, -1)).transpose(1, 2)
    return out_GQRd.flatten(1, 2)


def _without_column(states_GSd: Tensor, shared: int, dtype: torch.dtype) -> Tensor:
    """(1, H, Q, D) the states without the column, laid out as the projections write them: token by token."""
    states_QGRD = states_GSd[..., :-1].unflatten(1, (-1, shared)).transpose(0, 1)
    out_QGRD = torch.empty(states_QGRD.shape, dtype=dtype).copy_(states_QGRD)
    return out_QGRD.flatten(1, 2)[None].transpose(1, 2)


def _unseen(at_q: Tensor, first: int, stop: int) -> Tensor:
    """Which of the keys from ``first`` on lie behind the query's own."""
    return torch.arange(first, stop) > at_q[:, None]

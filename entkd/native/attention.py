"""The backward pass of causal attention of documents that lie behind one another in a row; see attention.cpp.

Shapes: Q queries and K keys of the row, q queries of a document, H heads, G heads of the keys, D width of a head,
N documents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from entkd.native.build import library

_CODES = {torch.float32: 0, torch.bfloat16: 1}
"""Types of the results, as attention.cpp tells them apart."""


def attention_gradient(
    query_1HQD: Tensor,
    key_1GKD: Tensor,
    value_1GKD: Tensor,
    out_1QHD: Tensor,
    gradient_1QHD: Tensor,
    logsumexp_1HQ: Tensor,
    documents: Sequence[tuple[slice, slice, Tensor]],
    scaling: float,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Gradients of queries (1, H, Q, D), keys and values (1, G, K, D), as views of (1, tokens, heads, D).

    None where it was not done.

    Parameters
    ----------
    query_1HQD, key_1GKD, value_1GKD, out_1QHD, gradient_1QHD
        bf16; ``out_1QHD`` is what attention gave, and ``gradient_1QHD`` is its gradient.
    logsumexp_1HQ
        fp32, of what every query sees.
    documents
        Their queries, their keys, and (q,) int64, ascending: the last of these keys that each of these queries sees.
        Queries and keys of none get zeros.
    dtypes
        Of the results, fp32 or bf16.
    """
    tensors = query_1HQD, key_1GKD, value_1GKD, out_1QHD, gradient_1QHD
    if any(each.device.type != "cpu" or each.dtype != torch.bfloat16 for each in tensors):
        return None
    found = library() if logsumexp_1HQ.dtype == torch.float32 and _CODES.keys() >= set(dtypes) else None
    if found is None:
        return None
    (_, H, Q, D), (_, G, K, _) = query_1HQD.shape, key_1GKD.shape
    by_token = [*(each.transpose(1, 2) for each in tensors[:3]), *tensors[3:]]
    shapes = [(1, Q, H, D), (1, K, G, D), (1, K, G, D), (1, Q, H, D), (1, Q, H, D)]
    if [tuple(each.shape) for each in by_token] != shapes or logsumexp_1HQ.shape != (1, H, Q) or H % G:
        raise ValueError(f"shapes {', '.join(str(tuple(each.shape)) for each in (*tensors, logsumexp_1HQ))} differ")
    by_token = [each if each.stride(3) == 1 else each.contiguous() for each in by_token]
    results = [torch.zeros(shape, dtype=dtype) for shape, dtype in zip(shapes[:3], dtypes, strict=True)]
    if any(
        queries.stop > Q or keys.stop > K or len(at_q) != queries.stop - queries.start
        for queries, keys, at_q in documents
    ):
        raise ValueError(f"documents reach beyond {Q} queries or {K} keys, or have another number of them")
    for _, keys, at_q in documents:
        if at_q.dtype != torch.int64 or (len(at_q) and int(at_q[-1]) >= keys.stop - keys.start):
            raise ValueError(f"a document's queries see up to {at_q}, which must be int64 and among its keys, {keys}")
    rows = [(queries.start, len(at_q), keys.start, keys.stop - keys.start) for queries, keys, at_q in documents]
    if rows and D:
        strides = torch.tensor([stride for each in by_token for stride in each.stride()[1:3]])
        at = torch.cat([at_q for _, _, at_q in documents])
        logsumexp_1HQ = logsumexp_1HQ.contiguous()
        table = torch.tensor(rows)
        found.entkd_attention_gradient(
            *(each.data_ptr() for each in (*by_token, strides, logsumexp_1HQ, table, at)),
            *(part for each in results for part in (each.data_ptr(), _CODES[each.dtype])),
            scaling,
            *(len(rows), H, G, Q, D),
        )
    of_query, of_key, of_value = (each.transpose(1, 2) for each in results)
    return of_query, of_key, of_value

"""What a mode keeps of the teacher's distributions: room for it, and what fills the room, tile by tile.

Shape suffixes: N tokens of a tile, R rows of the result, E teacher width, U tokens of the vocabulary, K slots and S
draws of a sparse target.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from entkd.config import Signals
from entkd.runtime import numpy_stream
from entkd.signals.split import SPARSE_SPLIT
from entkd.sparse import draw_target, pack

Keep = Callable[[Tensor, Tensor, Tensor], None]
"""(rows of the result, logits, their logsumexp) of a tile: puts away what is kept of the distributions."""


def room(
    settings: Signals,
    split: str,
    documents: NDArray[np.int64],
    response_lengths: NDArray[np.int64],
    vocab_size: int,
    width: int,
) -> tuple[dict[str, Tensor], Tensor | None, Keep | None]:
    """Tensors for the response tokens of some documents of a split, in the order of the documents.

    Returns
    -------
    tuple
        ``hidden`` (R, E) bf16, for the caller to fill, or ``sparse_ids`` (R, K) int32 and ``sparse_mass`` (R, K) fp16;
        (R, U) fp16 log-probabilities in mode ``logprobs``; what fills all but ``hidden``.
    """
    rows = int(response_lengths[documents].sum())
    sparse = settings.sparse
    if sparse is not None and split == SPARSE_SPLIT:
        shape = (rows, sparse.top_k + sparse.samples)
        ids_RK, mass_RK = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.float16)
        uniform_RS = tail_uniforms(split, documents, response_lengths, sparse.samples)

        def keep_sparse(row_N: Tensor, logits_NU: Tensor, _: Tensor) -> None:
            uniform_NS = uniform_RS[row_N].to(logits_NU.device)
            ids_NK, mass_NK = pack(*draw_target(logits_NU, sparse.top_k, uniform_NS))
            ids_RK[row_N], mass_RK[row_N] = ids_NK.cpu(), mass_NK.cpu()

        return {"sparse_ids": ids_RK, "sparse_mass": mass_RK}, None, keep_sparse
    hidden = {"hidden": torch.empty(rows, width, dtype=torch.bfloat16)}
    if settings.mode != "logprobs":
        return hidden, None, None
    logprobs_RU = torch.empty(rows, vocab_size, dtype=torch.float16)

    def keep_logprobs(row_N: Tensor, logits_NU: Tensor, logsumexp_N: Tensor) -> None:
        logprobs_RU[row_N] = (logits_NU - logsumexp_N[:, None]).half().cpu()

    return hidden, logprobs_RU, keep_logprobs


def tail_uniforms(
    split: str, documents: NDArray[np.int64], response_lengths: NDArray[np.int64], samples: int
) -> Tensor:
    """(R, S) fp64 numbers for the draws of some documents: a random stream for each document, so that what is drawn
    depends on no batch, shard or interruption."""
    drawn = [
        numpy_stream(0, f"sparse/{split}/{document}").random((int(response_lengths[document]), samples))
        for document in documents.tolist()
    ]
    return torch.from_numpy(np.concatenate(drawn)) if drawn else torch.empty(0, samples, dtype=torch.float64)

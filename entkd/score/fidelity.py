"""Fidelity: how close the student's distribution is to the teacher's on the test split.

Shapes: N response tokens of a batch, R of the split, D documents.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from entkd.data import Corpus
from entkd.data.packing import collate, plan_batches
from entkd.errors import UserError
from entkd.fused import linear_statistics
from entkd.models import output_weight, packed_states
from entkd.names import FIDELITY
from entkd.score.items import ratio_items
from entkd.signals import SignalStore
from entkd.tiles import slices, tile_rows

VERSION = "1"


@torch.inference_mode()
def fidelity(
    model: PreTrainedModel, data: Path, signals: Path, batch_tokens: int, limit: int | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """KL(teacher ‖ student) in nats per response token, and how often both have the same most likely token.

    Parameters
    ----------
    batch_tokens
        Tokens in one forward pass.
    limit
        Use only this many test documents.

    Returns
    -------
    tuple
        Rows of scores: ``kl``, ``top1_agreement``, and ``kl_decile_01`` to ``_10``, the KL over the tenths of the
        tokens by teacher entropy, low to high. Rows of items: one per test document for the first two.

    Raises
    ------
    UserError
        If the signals are not those of this data.
    """
    corpus, store = Corpus.open(data, "test"), SignalStore.open(signals)
    teacher = store.split("test")
    if not np.array_equal(teacher.response_offsets, corpus.response_offsets):
        raise UserError(f"{signals}: its test split is not that of {data}; run `entkd signals` on this data")
    documents = np.arange(len(corpus) if limit is None else min(limit, len(corpus)))
    kl_R, agreement_R = _per_token(model, corpus, store, documents, batch_tokens)

    scores, items = [], []
    lengths_D = corpus.response_lengths[documents].astype(np.float64)
    for metric, value_R in (("kl", kl_R), ("top1_agreement", agreement_R)):
        sums_D = np.asarray([_of(value_R, corpus, document).sum() for document in documents.tolist()])
        items_D, weights_D, stderr = ratio_items(sums_D, lengths_D)
        scores.append(_score(metric, float(items_D.mean()), stderr, len(documents)))
        items += [
            {"task": FIDELITY, "metric": metric, "item": str(document), "value": float(value), "weight": float(weight)}
            for document, value, weight in zip(documents, items_D, weights_D, strict=True)
        ]
    tokens = int(corpus.response_offsets[len(documents)])
    entropy_R = teacher.entropy_R[:tokens].numpy()
    for index, own in enumerate(np.array_split(np.argsort(entropy_R, kind="stable"), 10)):
        if len(own):
            scores.append(_score(f"kl_decile_{index + 1:02d}", float(kl_R[own].mean()), float("nan"), len(own)))
    return scores, items


def _per_token(
    model: PreTrainedModel, corpus: Corpus, store: SignalStore, documents: NDArray[np.int64], batch_tokens: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """KL and agreement of every response token, by its global index; NaN for documents that are left out."""
    teacher = store.split("test")
    kl_R = np.full(corpus.response_tokens, np.nan)
    agreement_R = np.full(corpus.response_tokens, np.nan)
    weight_VD = output_weight(model)
    head_UE = None if store.has_logprobs else store.head_UE.to(model.device)
    for blocks, length in plan_batches(corpus.lengths, documents, batch_tokens):
        batch = collate(corpus, blocks, length, pad_id=0).to(model.device)
        hidden_ND, _ = packed_states(model, batch)
        tokens_N = batch.tokens_N.cpu()
        # The teacher's side of a tile at a time: stored log-probabilities are as large as logits.
        for tile in slices(len(tokens_N), tile_rows(store.vocab_size, model.device)):
            tokens_R = tokens_N[tile]
            teacher_R = teacher.logprobs(tokens_R) if head_UE is None else teacher.hidden(tokens_R)
            statistics = linear_statistics(
                hidden_ND[tile],
                weight_VD,
                teacher_R.to(model.device),
                head_UE,
                wants=("divergence", "agreement"),
                vocab_size=store.vocab_size,
            )
            kl_R[tokens_R] = statistics["divergence"].double().cpu()
            agreement_R[tokens_R] = statistics["agreement"].double().cpu()
    return kl_R, agreement_R


def _of(value_R: NDArray[np.float64], corpus: Corpus, document: int) -> NDArray[np.float64]:
    return value_R[corpus.response_offsets[document] : corpus.response_offsets[document + 1]]


def _score(metric: str, value: float, stderr: float, n: int) -> dict[str, Any]:
    return {"task": FIDELITY, "metric": metric, "value": value, "stderr": stderr, "n": n, "task_version": VERSION}

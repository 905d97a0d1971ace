"""Packed blocks: several documents in one row, kept apart by positions that restart at each of them.

Shape suffixes: B blocks, L tokens of a block, N predicting positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from entkd.config import Training
from entkd.data.corpus import Corpus
from entkd.errors import UserError
from entkd.runtime import numpy_stream, to_device

Block = NDArray[np.int64]
"""Indices of the documents that share one row."""


@dataclass(frozen=True)
class Batch:
    """Packed blocks as tensors, with the positions that predict a response token."""

    input_ids_BL: torch.Tensor
    """int64 token ids."""
    position_ids_BL: torch.Tensor
    """int64 positions; they restart at each document, and padding has 0 each: a tail of padding may be longer than
    the positions that a model has learned."""
    positions_N: torch.Tensor
    """int64 flat index into B·L of each predicting position: the one before its response token."""
    labels_N: torch.Tensor
    """int64 response token that each position predicts."""
    tokens_N: torch.Tensor
    """int64 global response-token index of each label."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(
            to_device(self.input_ids_BL, device),
            to_device(self.position_ids_BL, device),
            to_device(self.positions_N, device),
            to_device(self.labels_N, device),
            to_device(self.tokens_N, device),
        )


def pack(lengths: NDArray[np.int64], block: int, order: NDArray[np.int64], open_blocks: int = 1) -> list[Block]:
    """Put the documents ``order`` into rows of at most ``block`` tokens.

    A document goes into the first of the last ``open_blocks`` rows with room for it, else into a new one. One open
    row keeps the documents exactly in order; more of them leave less padding and keep documents near their place.

    Raises
    ------
    UserError
        If a document alone is longer than a block.
    """
    blocks: list[list[int]] = []
    filled: list[int] = []
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if length > block:
            raise UserError(
                f"training.block: document {index} has {length} tokens and a block has {block}; "
                "raise training.block or lower data.max_tokens"
            )
        for row in range(max(0, len(blocks) - open_blocks), len(blocks)):
            if filled[row] + length <= block:
                blocks[row].append(index)
                filled[row] += length
                break
        else:
            blocks.append([index])
            filled.append(length)
    return [np.asarray(documents, dtype=np.int64) for documents in blocks]


def collate(corpus: Corpus, blocks: Sequence[Block], block: int, pad_id: int) -> Batch:
    """The blocks as one batch on the CPU. Padding is at the end of a row and predicts nothing."""
    input_ids_BL = np.full((len(blocks), block), pad_id, dtype=np.int64)
    position_ids_BL = np.zeros((len(blocks), block), dtype=np.int64)
    positions: list[NDArray[np.int64]] = []
    labels: list[NDArray[np.int64]] = []
    tokens: list[NDArray[np.int64]] = []
    for row, documents in enumerate(blocks):
        start = 0
        for document in documents.tolist():
            ids, prompt_length = corpus.document(document)
            stop = start + len(ids)
            input_ids_BL[row, start:stop] = ids
            position_ids_BL[row, start:stop] = np.arange(len(ids))
            response = np.arange(prompt_length, len(ids))
            positions.append(row * block + start + response - 1)
            labels.append(ids[prompt_length:].astype(np.int64))
            tokens.append(corpus.response_offsets[document] + response - prompt_length)
            start = stop
    return Batch(
        torch.from_numpy(input_ids_BL),
        torch.from_numpy(position_ids_BL),
        *(
            torch.from_numpy(np.concatenate(parts) if parts else np.empty(0, dtype=np.int64))
            for parts in (positions, labels, tokens)
        ),
    )


def plan_batches(
    lengths: NDArray[np.int64], documents: NDArray[np.int64], batch_tokens: int
) -> Iterator[tuple[list[Block], int]]:
    """Forward passes over the documents: blocks and the length of a block.

    Longest documents first, and a block is as long as the longest document of its own pass, so neighbours in a
    pass are of like length and little of it is padding.
    """
    order = documents[np.argsort(-lengths[documents], kind="stable")]
    while len(order):
        block = int(lengths[order[0]])
        rows = max(1, batch_tokens // block)
        blocks = pack(lengths, block, order[:batch_tokens])[:rows]
        yield blocks, block
        order = order[sum(len(part) for part in blocks) :]


def plan_steps(corpus: Corpus, settings: Training, seed: int) -> list[list[Block]]:
    """Which blocks each optimizer step sees, where the settings say how many steps or epochs.

    With ``epochs`` the number of steps is rounded up, and the last step is filled from the epoch that would follow.

    Raises
    ------
    UserError
        If a document is longer than a block.
    """
    if settings.steps is not None:
        steps = settings.steps
    else:
        assert settings.epochs is not None  # a budget is planned by who knows what a step costs
        steps = _steps_of_epochs(corpus.lengths, settings, settings.epochs, seed)
    return list(itertools.islice(stream_steps(corpus, settings, seed), steps))


def stream_steps(corpus: Corpus, settings: Training, seed: int) -> Iterator[list[Block]]:
    """The blocks of one optimizer step after another, without end: each exactly ``blocks_per_step`` blocks.

    The documents are shuffled anew in each epoch and packed; a step may span two epochs.
    """
    stream = _shuffled_blocks(corpus.lengths, settings.block, seed)
    while True:
        yield [next(stream) for _ in range(settings.blocks_per_step)]


def _shuffled_blocks(lengths: NDArray[np.int64], block: int, seed: int) -> Iterator[Block]:
    generator = numpy_stream(seed, "data order")
    while True:
        yield from pack(lengths, block, generator.permutation(len(lengths)), open_blocks=16)


def _steps_of_epochs(lengths: NDArray[np.int64], settings: Training, epochs: float, seed: int) -> int:
    """Steps that show at least ``epochs`` × the number of documents."""
    wanted, shown, blocks = epochs * len(lengths), 0, 0
    for documents in _shuffled_blocks(lengths, settings.block, seed):
        shown += len(documents)
        blocks += 1
        if shown >= wanted:
            break
    return -(-blocks // settings.blocks_per_step)

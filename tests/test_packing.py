from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entkd.config import Training
from entkd.data.corpus import Corpus
from entkd.data.packing import collate, pack, plan_steps
from entkd.errors import UserError


@pytest.fixture
def by_hand() -> Corpus:
    """Documents [10 11 | 12 13 14], [20 | 21 22], [30 31 32 | 33]; response tokens after the bar."""
    ids = np.array([10, 11, 12, 13, 14, 20, 21, 22, 30, 31, 32, 33], dtype=np.int32)
    return Corpus.build(ids, np.array([0, 5, 8, 12]), np.array([2, 1, 3], dtype=np.int32))


def test_next_fit_by_hand() -> None:
    blocks = pack(np.array([5, 3, 4, 2]), 7, np.array([0, 3, 2, 1]))
    assert [block.tolist() for block in blocks] == [[0, 3], [2, 1]]


def test_open_blocks_take_what_still_fits_by_hand() -> None:
    # with two open rows, document 3 (size 1) can no longer go to row 0, which still has room for it
    sizes = np.array([5, 6, 4, 1, 2])
    assert [b.tolist() for b in pack(sizes, 7, np.arange(5), open_blocks=2)] == [[0], [1, 3], [2, 4]]
    assert [b.tolist() for b in pack(sizes, 7, np.arange(5), open_blocks=3)] == [[0, 3], [1], [2, 4]]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=40), st.randoms(), st.integers(1, 8))
def test_open_blocks_pack_every_document_once_into_no_more_rows(lengths, random, open_blocks) -> None:
    order = np.array(random.sample(range(len(lengths)), len(lengths)))
    sizes = np.array(lengths)
    blocks = pack(sizes, 16, order, open_blocks)
    assert sorted(np.concatenate(blocks).tolist()) == list(range(len(lengths)))
    assert all(sizes[block].sum() <= 16 for block in blocks)
    assert len(pack(sizes, 16, order, len(lengths))) <= len(pack(sizes, 16, order))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=40), st.randoms())
def test_every_document_is_packed_once_in_order_and_no_block_overflows(lengths, random) -> None:
    order = np.array(random.sample(range(len(lengths)), len(lengths)))
    sizes = np.array(lengths)
    blocks = pack(sizes, 16, order)
    assert np.concatenate(blocks).tolist() == order.tolist()
    assert all(sizes[block].sum() <= 16 for block in blocks)
    # Next-fit closes a block only when the next document does not fit.
    for block, following in itertools.pairwise(blocks):
        assert sizes[block].sum() + sizes[following[0]] > 16


def test_document_longer_than_a_block_is_refused_with_both_sizes() -> None:
    with pytest.raises(UserError, match=r"training.block: document 1 has 9 tokens and a block has 8"):
        pack(np.array([3, 9]), 8, np.arange(2))


def test_batch_by_hand(by_hand: Corpus) -> None:
    batch = collate(by_hand, [np.array([0, 2]), np.array([1])], block=10, pad_id=99)
    assert batch.input_ids_BL.tolist() == [
        [10, 11, 12, 13, 14, 30, 31, 32, 33, 99],
        [20, 21, 22, 99, 99, 99, 99, 99, 99, 99],
    ]
    assert batch.position_ids_BL.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0], [0, 1, 2, 0, 0, 0, 0, 0, 0, 0]]
    # The first response token, 12, is predicted at the last prompt token, 11; the last, 14, at 13.
    assert batch.positions_N.tolist() == [1, 2, 3, 7, 10, 11]
    assert batch.labels_N.tolist() == [12, 13, 14, 33, 21, 22]
    # Documents 0, 1, 2 have 3, 2 and 1 response tokens.
    assert batch.tokens_N.tolist() == [0, 1, 2, 5, 3, 4]


def test_no_block_gives_an_empty_batch(by_hand: Corpus) -> None:
    batch = collate(by_hand, [], block=8, pad_id=0)
    assert batch.input_ids_BL.shape == (0, 8)
    assert batch.positions_N.shape == batch.labels_N.shape == batch.tokens_N.shape == (0,)
    assert batch.positions_N.dtype == torch.int64


def test_labels_follow_their_positions_for_any_packing(tiny_corpus: Path) -> None:
    corpus = Corpus.open(tiny_corpus, "train")
    seen: dict[int, int] = {}
    for block, seed in ((64, 0), (90, 7)):
        for blocks in plan_steps(corpus, Training(epochs=1, block=block), seed):
            batch = collate(corpus, blocks, block, pad_id=2)
            following = batch.input_ids_BL.flatten()[batch.positions_N + 1]
            assert torch.equal(following, batch.labels_N)
            for token, label in zip(batch.tokens_N.tolist(), batch.labels_N.tolist(), strict=True):
                assert seen.setdefault(token, label) == label
    assert sorted(seen) == list(range(corpus.response_tokens))


def test_an_epoch_shows_every_document_and_reshuffles(tiny_corpus: Path) -> None:
    corpus = Corpus.open(tiny_corpus, "train")
    training = Training(steps=30, block=64, blocks_per_step=1, micro_blocks=1)
    shown = np.concatenate([block for step in plan_steps(corpus, training, 3) for block in step])
    first, second = shown[: len(corpus)], shown[len(corpus) : 2 * len(corpus)]
    assert sorted(first.tolist()) == list(range(len(corpus)))
    assert len(set(second.tolist())) == len(second)
    assert first[: len(second)].tolist() != second.tolist()


def test_steps_are_exact_full_and_depend_on_the_seed_alone(tiny_corpus: Path) -> None:
    corpus = Corpus.open(tiny_corpus, "train")
    training = Training(steps=25, block=64, blocks_per_step=4)
    plan = plan_steps(corpus, training, 1)
    assert len(plan) == 25  # cycles several epochs
    assert {len(step) for step in plan} == {4}

    def flat(steps):
        return [block.tolist() for step in steps for block in step]

    assert flat(plan) == flat(plan_steps(corpus, training, 1))
    assert flat(plan) != flat(plan_steps(corpus, training, 2))


@pytest.mark.parametrize("epochs", [0.5, 1, 2.25])
def test_epochs_are_rounded_up_to_whole_steps(tiny_corpus: Path, epochs: float) -> None:
    corpus = Corpus.open(tiny_corpus, "train")
    plan = plan_steps(corpus, Training(epochs=epochs, block=64, blocks_per_step=2), 0)
    documents = sum(len(block) for step in plan for block in step)
    assert documents >= epochs * len(corpus)
    without_last = sum(len(block) for step in plan[:-1] for block in step)
    assert without_last < epochs * len(corpus)

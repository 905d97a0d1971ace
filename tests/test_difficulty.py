"""What stands in for the teacher's entropy: permutations, frequencies, and F over the training tokens."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import formulas

from entkd.config import Curriculum, Features, Method, Temperature
from entkd.config import Difficulty as Settings
from entkd.curriculum import raw_weights
from entkd.data import Corpus
from entkd.difficulty import permutation, training_difficulty, unigram_surprise
from entkd.entropy import Difficulty
from entkd.errors import UserError
from entkd.features import select_tokens, threshold
from entkd.temperature import token_temperature

LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=8)
SOURCES = Settings.model_fields["source"].annotation.__args__


def sequences(lengths: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(0, 2**31), st.booleans())
def test_a_permutation_deals_every_value_once_and_within_stays_within(lengths, seed, within) -> None:
    sequence_R = sequences(lengths)
    order_R = permutation(sequence_R, seed, within)
    assert torch.equal(order_R.sort().values, torch.arange(len(sequence_R)))
    assert torch.equal(order_R, permutation(sequence_R, seed, within))
    if within:
        assert torch.equal(sequence_R[order_R], sequence_R)


def test_permutations_differ_by_seed_and_are_uniform() -> None:
    """Each token of a sequence of 4 gets each of its values in about a quarter of the seeds."""
    sequence_R = sequences([4, 3])
    assert len({tuple(permutation(sequences([30]), seed, False).tolist()) for seed in range(20)}) == 20
    for within, size in ((True, 4), (False, 7)):
        drawn = np.stack([permutation(sequence_R, seed, within).numpy() for seed in range(2000)])
        for token in range(4):
            share = np.bincount(drawn[:, token], minlength=7) / 2000
            assert share[:size] == pytest.approx(1 / size, abs=5 * math.sqrt(1 / size / 2000))
            assert share[size:].sum() == 0
    assert not torch.equal(permutation(sequences([30]), 0, True), permutation(sequences([30]), 0, False))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=60))
def test_unigram_is_the_surprise_of_the_id(ids) -> None:
    counts = Counter(ids)
    expected = [-math.log(counts[i] / len(ids)) for i in ids]
    assert unigram_surprise(torch.tensor(ids, dtype=torch.int32)).tolist() == pytest.approx(expected, rel=1e-6)


def fake(lengths: list[int], seed: int = 0, vocab_size: int = 50) -> tuple[SimpleNamespace, Corpus]:
    """A store and a corpus of documents with these response lengths, with random numbers in them."""
    generator = np.random.default_rng(seed)
    prompts = generator.integers(1, 5, len(lengths)).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(prompts + lengths)]).astype(np.int64)
    corpus = Corpus.build(generator.integers(0, vocab_size, offsets[-1]).astype(np.int32), offsets, prompts)
    entropy_R = torch.from_numpy(generator.gamma(1.0, 1.0, sum(lengths))).float()
    # F of the teacher's entropy is fitted on a part of the tokens
    fitted = entropy_R[: max(1, len(entropy_R) // 2)]
    target_logprob_R = -torch.from_numpy(generator.exponential(1.0, sum(lengths))).float()
    split = SimpleNamespace(entropy_R=entropy_R, target_logprob_R=target_logprob_R)
    store = SimpleNamespace(
        vocab_size=vocab_size,
        split=lambda name: {"train": split}[name],
        difficulty=lambda scale: Difficulty.fit(fitted, scale, vocab_size),
    )
    return store, corpus


def difficulty(source: str, lengths: list[int], scale: str = "rank", seed: int = 0) -> torch.Tensor:
    store, corpus = fake(lengths)
    student_R = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(4)) * 3
    return training_difficulty(Settings(source=source, scale=scale), store, corpus, seed, student_R)


def test_response_ids_are_those_behind_the_prompts() -> None:
    _, corpus = fake([3, 0, 5])
    expected = [token for d in range(3) for token in (lambda ids, prompt: ids[prompt:])(*corpus.document(d)).tolist()]
    assert corpus.response_ids.tolist() == expected
    assert len(expected) == corpus.response_tokens == 8


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("scale", ["rank", "minmax"])
def test_every_source_and_scale_by_the_definition(source: str, scale: str) -> None:
    lengths = [7, 1, 12, 5]
    store, corpus = fake(lengths)
    split, sequence = store.split("train"), sequences(lengths).tolist()
    labels = [int(i) for d in range(len(corpus)) for i in corpus.document(d)[0][corpus.document(d)[1] :]]
    student = (torch.rand(25, generator=torch.Generator().manual_seed(4)) * 3).tolist()
    value = {
        "unigram": [-math.log(labels.count(i) / 25) for i in labels],
        "label_nll": [-x for x in split.target_logprob_R.tolist()],
        "initial_kl": student,
        "initial_student_entropy": student,
    }.get(source, split.entropy_R.tolist())
    value = np.asarray(value, dtype=np.float32).tolist()  # ties of the definition are ties here
    sample = split.entropy_R[:12].tolist() if source in ("teacher_entropy", "permuted", "permuted_within") else value
    if scale == "rank":
        expected = [formulas.mid_rank(v, sample) for v in value]
    else:
        own = [[v for v, s in zip(value, sequence, strict=True) if s == t] for t in sequence]
        expected = [
            0.5 if max(o) == min(o) else (v - min(o)) / (max(o) - min(o)) for v, o in zip(value, own, strict=True)
        ]
    found = difficulty(source, lengths, scale, seed=3)
    if source.startswith("permuted"):
        order = permutation(sequences(lengths), 3, source == "permuted_within")
        expected = np.asarray(expected)[order.numpy()].tolist()
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert found.dtype == torch.float32


def test_the_mean_of_a_rank_is_one_half_for_sources_ranked_over_the_training_tokens() -> None:
    for source in ("unigram", "label_nll", "initial_kl", "initial_student_entropy"):
        assert difficulty(source, [40, 3, 17]).double().mean().item() == pytest.approx(0.5, abs=1e-6), source


def test_student_entropy_is_an_entropy_and_other_sources_are_none() -> None:
    student_R = torch.rand(12, generator=torch.Generator().manual_seed(4)) * 3
    found = difficulty("initial_student_entropy", [12], "logv")
    assert found.tolist() == pytest.approx((student_R / math.log(50)).tolist(), rel=1e-6)
    for source in ("unigram", "label_nll", "initial_kl"):
        with pytest.raises(ValueError, match=f"{source} is none; use rank or minmax"):
            Settings(source=source, scale="logv")


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 15), min_size=2, max_size=6),
    st.sampled_from(["permuted", "permuted_within"]),
    st.sampled_from(["rank", "logv", "minmax"]),
    st.floats(0, 1),
    st.integers(0, 100),
)
def test_permuted_tokens_have_the_histograms_of_the_true_ones(lengths, source, scale, u, seed) -> None:
    """Weights, temperatures and hard set: exactly the same numbers, dealt to other tokens."""
    true_R, dealt_R = difficulty("teacher_entropy", lengths, scale), difficulty(source, lengths, scale, seed)
    parts = [(0, sum(lengths))]
    if source == "permuted_within":
        ends = np.cumsum(lengths).tolist()
        parts = list(zip([0, *ends[:-1]], ends, strict=True))
    for start, end in parts:
        a, b = true_R[start:end], dealt_R[start:end]
        for of in (
            lambda d: raw_weights(d, u, Curriculum()),
            lambda d: token_temperature(d, Temperature()),
            lambda d: select_tokens(d, Features(threshold_end=0.5), progress=u).float(),
        ):
            assert torch.equal(of(a).sort().values, of(b).sort().values)


def test_only_permutations_read_the_seed() -> None:
    for source in SOURCES:
        one, other = difficulty(source, [30, 20], seed=0), difficulty(source, [30, 20], seed=1)
        assert torch.equal(one, other) != source.startswith("permuted"), source


def test_an_infinite_source_is_refused_by_name() -> None:
    store, corpus = fake([5, 5])
    store.split("train").target_logprob_R[3] = -math.inf
    with pytest.raises(UserError, match=r"difficulty.source: label_nll is infinite or NaN for 1 of 10 training tokens"):
        training_difficulty(Settings(source="label_nll"), store, corpus, 0)
    with pytest.raises(ValueError, match="pass student_R"):
        training_difficulty(Settings(source="initial_kl"), store, corpus, 0)


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_a_moving_threshold_is_linear_and_its_sets_are_nested(start, end, u, v) -> None:
    moving = Features(threshold=start, threshold_end=end)
    assert threshold(moving, u) == pytest.approx((1 - u) * start + u * end, abs=1e-12)
    assert threshold(Features(threshold=start), u) == start
    d, tokens = torch.linspace(0, 1, 401, dtype=torch.float64), torch.arange(401)
    for kind in ("hard", "easy", "random"):
        chosen = Features(threshold=start, threshold_end=end, tokens=kind)
        fixed = Features(threshold=threshold(moving, u), tokens=kind)
        now = select_tokens(d, chosen, tokens, seed=2, progress=u)
        assert torch.equal(now, select_tokens(d, fixed, tokens, seed=2))
        other = select_tokens(d, chosen, tokens, seed=2, progress=v)
        assert not (now & ~other).any() or not (other & ~now).any(), kind  # one holds the other


@pytest.mark.parametrize("kind", ["hard", "easy", "random"])
def test_the_share_of_feature_tokens_follows_the_threshold(kind: str) -> None:
    d, tokens = (torch.arange(20_000) + 0.5) / 20_000, torch.arange(20_000)
    settings_ = Features(threshold=0.9, threshold_end=0.5, tokens=kind)
    for u in (0.0, 0.25, 1.0):
        share = select_tokens(d, settings_, tokens, seed=1, progress=u).double().mean().item()
        assert share == pytest.approx(0.1 + 0.4 * u, abs=0.015 if kind == "random" else 1e-4)


def test_methods_ask_the_student_only_where_something_reads_it() -> None:
    plain = Method.model_validate({"divergence": "forward_kl", "difficulty": {"source": "initial_kl"}})
    assert plain.difficulty.of_student
    assert not plain.needs_difficulty

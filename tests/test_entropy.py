"""Entropy and difficulty (method limits 7 and 14)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import formulas

from entkd.entropy import Difficulty, token_entropy


def test_entropy_equals_scipy_in_nats():
    logits = torch.randn(20, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4
    expected = scipy.stats.entropy(torch.softmax(logits, -1).numpy(), axis=1)
    np.testing.assert_allclose(token_entropy(logits).numpy(), expected, rtol=1e-12)
    assert token_entropy(logits).dtype == torch.float64


def test_entropy_of_bf16_logits_is_computed_in_fp32():
    logits = (torch.randn(8, 200, generator=torch.Generator().manual_seed(1)) * 3).bfloat16()
    expected = [formulas.entropy(row) for row in logits.double().numpy()]
    result = token_entropy(logits)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5)


def test_entropy_at_its_ends():
    one_hot = torch.full((1, 7), -math.inf)
    one_hot[0, 3] = 2.0
    assert token_entropy(one_hot).item() == 0.0
    assert token_entropy(torch.zeros(1, 7)).item() == pytest.approx(math.log(7), rel=1e-6)


def test_entropy_carries_no_gradient():
    assert not token_entropy(torch.randn(2, 5, requires_grad=True)).requires_grad


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-30, 30), min_size=2, max_size=40), st.floats(-100, 100), st.randoms())
def test_entropy_ignores_shifts_and_order(values, shift, random):
    logits = torch.tensor([values], dtype=torch.float64)
    order = list(range(len(values)))
    random.shuffle(order)
    changed = logits[:, order] + shift
    torch.testing.assert_close(token_entropy(changed), token_entropy(logits), rtol=1e-9, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.5, 7.0]), min_size=1, max_size=30),
    st.lists(st.sampled_from([0.0, 0.05, 0.1, 0.5, 1.0, 2.5, 9.0]), min_size=1, max_size=10),
)
def test_rank_is_the_mid_rank_of_scipy(calibration, queries):
    difficulty = Difficulty.fit(torch.tensor(calibration))
    expected = [scipy.stats.percentileofscore(calibration, query, kind="mean") / 100 for query in queries]
    result = difficulty(torch.tensor(queries))
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-6)


def test_rank_is_uniform_on_its_calibration_and_flat_on_equal_entropies():
    entropy = torch.rand(1001, generator=torch.Generator().manual_seed(2))
    d = Difficulty.fit(entropy)(entropy)
    assert d.double().mean().item() == pytest.approx(0.5, abs=1e-7)
    np.testing.assert_allclose(d.sort().values.numpy(), (np.arange(1001) + 0.5) / 1001, atol=1e-6)
    assert (Difficulty.fit(torch.full((9,), 1.5))(torch.full((4,), 1.5)) == 0.5).all()


def test_rank_of_a_token_is_independent_of_its_batch():
    generator = torch.Generator().manual_seed(3)
    difficulty = Difficulty.fit(torch.rand(100, generator=generator))
    entropy = torch.rand(12, generator=generator)
    assert torch.equal(difficulty(entropy), torch.cat([difficulty(part) for part in entropy.split(5)]))


def test_logv_and_minmax_by_hand():
    entropy = torch.tensor([0.0, 0.5, 1.0, 3.0, 2.0, 2.0])
    logv = Difficulty.fit(entropy, scale="logv", vocab_size=100)
    np.testing.assert_allclose(logv(entropy).numpy(), entropy.numpy() / math.log(100), rtol=1e-6)
    minmax = Difficulty.fit(entropy, scale="minmax")
    sequence = torch.tensor([7, 7, 3, 3, 5, 5])
    # Sequence 7: 0 and 0.5; sequence 3: 1 and 3; sequence 5: equal entropies.
    assert minmax(entropy, sequence_N=sequence).tolist() == [0.0, 1.0, 0.0, 1.0, 0.5, 0.5]


def test_state_restores_every_scale():
    entropy = torch.rand(30, generator=torch.Generator().manual_seed(4))
    fitted = Difficulty.fit(entropy)
    restored = Difficulty.from_state(fitted.state())
    assert torch.equal(restored(entropy), fitted(entropy))
    logv = Difficulty.from_state(fitted.state(), scale="logv", vocab_size=50)
    np.testing.assert_allclose(logv(entropy).numpy(), entropy.numpy() / math.log(50), rtol=1e-6)


def test_bad_calibrations_are_refused():
    with pytest.raises(ValueError, match="at least one calibration token"):
        Difficulty.fit(torch.zeros(0))
    with pytest.raises(ValueError, match="NaN or infinity"):
        Difficulty.fit(torch.tensor([0.1, math.nan]))
    with pytest.raises(ValueError, match="vocab_size"):
        Difficulty.fit(torch.rand(3), scale="logv")
    with pytest.raises(ValueError, match="sequence_N"):
        Difficulty.fit(torch.rand(3), scale="minmax")(torch.rand(3))

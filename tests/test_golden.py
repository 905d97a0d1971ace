"""One golden value for each version of each component, worked out by hand.

If a value here has to change, the component's formula has changed: bump its ``version`` in ``entkd/config/method.py``
and add a line, so that results of both formulas are never mixed. Divergences have theirs in ``test_divergences.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from entkd.config import CrossEntropy, Curriculum, Difficulty, Features, Temperature
from entkd.curriculum import raw_weights
from entkd.difficulty import unigram_surprise
from entkd.entropy import Difficulty as FittedDifficulty
from entkd.features import feature_loss, threshold
from entkd.fused import linear_cross_entropy
from entkd.temperature import loss_scale, token_temperature

D = torch.tensor([0.9], dtype=torch.float64)
IDENTITY = torch.nn.Identity()


def _curriculum(shape: str) -> float:
    return raw_weights(D, 0.75, Curriculum(shape=shape)).item()


def _difficulty(scale: str) -> float:
    sample = torch.tensor([1.0, 2.0, 2.0, 5.0])
    fitted = FittedDifficulty.fit(sample, scale=scale, vocab_size=100)
    return fitted(sample, sequence_N=torch.zeros(4, dtype=torch.long))[1].item()


def _features(loss: str) -> float:
    return feature_loss(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]]), IDENTITY, loss).item()


def _scaled_temperature(t2: str) -> float:
    return loss_scale(token_temperature(D, Temperature(t2=t2)), t2).item()


GOLDEN: dict[tuple[type, int], list[tuple[Callable[[], float], float]]] = {
    (Curriculum, 1): [
        (lambda: _curriculum("soft"), 1.32),  # 1 + 0.8 · 0.5 · 0.8
        (lambda: _curriculum("exp"), math.exp(0.32)),
        (lambda: _curriculum("window"), 0.0),  # the window is [0.525, 0.825]
    ],
    (Temperature, 1): [
        (lambda: token_temperature(D, Temperature()).item(), math.exp(0.4)),  # 0.5 · (2 · 0.9 − 1)
        (lambda: _scaled_temperature("per_token"), math.exp(0.8)),
        (lambda: _scaled_temperature("linear"), math.exp(0.4)),
        (lambda: _scaled_temperature("off"), 1.0),
    ],
    (Features, 1): [
        (lambda: _features("cosine"), 1 - 24 / 25),
        (lambda: _features("mse"), 1.0),
        (lambda: threshold(Features(threshold_end=0.4), 0.75), 0.5),  # 0.8 − 0.75 · 0.4
    ],
    (Difficulty, 1): [
        (lambda: _difficulty("rank"), 0.5),  # one value below, two equal of four: (1 + 2/2) / 4
        (lambda: _difficulty("logv"), 2 / math.log(100)),
        (lambda: _difficulty("minmax"), 0.25),  # (2 − 1) / (5 − 1)
        (lambda: unigram_surprise(torch.tensor([7, 7, 9, 3]))[0].item(), math.log(2)),  # two of four
    ],
    (CrossEntropy, 1): [
        # logits 0 and ln 3, label 0
        (
            lambda: linear_cross_entropy(
                torch.ones(1, 1), torch.tensor([[0.0], [math.log(3)]]), torch.tensor([0])
            ).item(),
            math.log(4),
        ),
    ],
}


@pytest.mark.parametrize(("component", "version"), GOLDEN, ids=lambda value: getattr(value, "__name__", str(value)))
def test_values(component: type, version: int) -> None:
    for compute, expected in GOLDEN[component, version]:
        assert compute() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("component", [Curriculum, Temperature, Features, Difficulty, CrossEntropy])
def test_the_current_version_has_golden_values(component: type) -> None:
    assert (component, component().version) in GOLDEN

"""What the three components say of every token of one optimizer step's global batch.

The training loop calls :func:`token_plan` once per step, on CPU, over all devices and micro-batches together:
means and normalisers are then global, and how the batch is cut into micro-batches cannot change the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from entkd.config import Method
from entkd.curriculum import token_weights
from entkd.features import select_tokens
from entkd.temperature import loss_scale, token_temperature


@dataclass(frozen=True)
class TokenPlan:
    """Weights, temperatures and feature tokens of a global batch; None where the method has no such component."""

    weight_N: Tensor | None
    """Factor of each token's divergence; None is 1."""
    temperature_N: Tensor | None
    """Softmax temperature of each token; None is 1."""
    features_N: Tensor | None
    """Bool: the token has a feature loss."""
    summary: dict[str, float]
    """For the log: ``weight_mean``; ``weight_scale_mean``, the mean of w·s(T) before any joint normalisation;
    ``temperature_mean``; ``hard``, the number of feature tokens."""


def token_plan(
    difficulty_N: Tensor | None, progress: float, method: Method, tokens_N: Tensor | None = None, seed: int = 0
) -> TokenPlan:
    """Apply curriculum, temperature and feature selection to a global batch.

    Parameters
    ----------
    difficulty_N
        (N,) d of every valid token of the global batch; None where no component needs it.
    progress
        u in [0, 1].
    method
        The arm's method.
    tokens_N
        (N,) global response-token indices; only ``features.tokens: random`` needs them.
    seed
        Seed of ``features.tokens: random``.

    Raises
    ------
    ValueError
        A component is on and the difficulty is missing.
    """
    weight_N = temperature_N = features_N = None
    weight_scale_mean = 1.0
    if method.needs_difficulty:
        if difficulty_N is None:
            raise ValueError("curriculum, temperature and features need difficulty_N; got None")
        weight_scale_N = torch.ones_like(difficulty_N)
        if method.curriculum is not None:
            weight_N = weight_scale_N = token_weights(difficulty_N, progress, method.curriculum)
        if method.temperature is not None:
            temperature_N = token_temperature(difficulty_N, method.temperature)
            weight_scale_N = weight_scale_N * loss_scale(temperature_N, method.temperature.t2)
        weight_scale_mean = _mean(weight_scale_N)
        if method.temperature is not None and method.temperature.normalise == "joint":
            weight_N = torch.ones_like(difficulty_N) if weight_N is None else weight_N
            weight_N = weight_N / weight_scale_mean if weight_scale_mean > 0 else torch.zeros_like(weight_N)
        if method.features is not None:
            features_N = select_tokens(difficulty_N, method.features, tokens_N, seed, progress)
    return TokenPlan(
        weight_N,
        temperature_N,
        features_N,
        {
            "weight_mean": _mean(weight_N),
            "weight_scale_mean": weight_scale_mean,
            "temperature_mean": _mean(temperature_N),
            "hard": 0 if features_N is None else int(features_N.sum()),
        },
    )


def _mean(values_N: Tensor | None) -> float:
    """Mean over the batch; 1, the neutral value of weights and temperatures, where the component is off."""
    if values_N is None:
        return 1.0
    return float(values_N.double().sum()) / max(1, values_N.numel())

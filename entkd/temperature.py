"""A softmax temperature per token, shared by teacher and student (docs/method.md, section 3).

    T_i = T_0 exp(c(2d_i-1)),   token loss s(T_i) D(p_i(T_i) ‖ q_i(T_i))

with s(T) = T² (`per_token`), T (`linear`) or 1 (`off`). T is never differentiated.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from entkd.config import Temperature


def token_temperature(difficulty_N: Tensor, settings: Temperature) -> Tensor:
    """Temperature of each token.

    Parameters
    ----------
    difficulty_N
        (N,) d in [0, 1].
    settings
        T_0 (`base`) and c.

    Returns
    -------
    Tensor
        (N,) in [T_0 e^-|c|, T_0 e^|c|], in the dtype of the difficulty, without gradient.
    """
    return settings.base * torch.exp(settings.c * (2 * difficulty_N.detach() - 1))


def loss_scale(temperature_N: Tensor, t2: Literal["per_token", "linear", "off"]) -> Tensor:
    """s(T), the factor of each token's divergence.

    Parameters
    ----------
    temperature_N
        (N,) temperatures.
    t2
        ``per_token``: T², as Hinton 2015 scales the soft target; ``linear``: T, under which the gradient of
        forward KL carries no factor; ``off``: 1.

    Returns
    -------
    Tensor
        (N,), without gradient.
    """
    temperature_N = temperature_N.detach()
    if t2 == "per_token":
        return temperature_N.square()
    if t2 == "linear":
        return temperature_N
    if t2 == "off":
        return torch.ones_like(temperature_N)
    raise ValueError(f"t2 {t2!r}: allowed are per_token, linear and off")

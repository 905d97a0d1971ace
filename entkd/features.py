"""Hidden-state distillation on hard tokens (docs/method.md, section 4).

    L_feat = 1/max(1, |H|) Σ_{i in H} 1/|M| Σ_{(s,t) in M} [1 - cos(W_s h^S_{s,i}, h^T_{t,i})]

The functions here give sums over tokens of one layer pair; the caller divides by the global |H|·|M|, so that
micro-batches and devices do not change the loss.

Shapes: N tokens, D student width, E teacher width.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from entkd.config import Features
from entkd.errors import UserError


def threshold(settings: Features, progress: float) -> float:
    """θ(u) = θ + (θ_end - θ) u, or θ where no end is given."""
    if settings.threshold_end is None:
        return settings.threshold
    return settings.threshold + (settings.threshold_end - settings.threshold) * progress


def select_tokens(
    difficulty_N: Tensor,
    settings: Features,
    tokens_N: Tensor | None = None,
    seed: int = 0,
    progress: float = 0.0,
) -> Tensor:
    """Which tokens get the feature loss.

    ``hard``: d > θ. ``easy``: d < 1 - θ. ``all``: every token. ``random``: the share 1 - θ, by a hash of token and
    seed, so that a token's fate depends on neither batch nor order. θ is that of the progress.

    Parameters
    ----------
    difficulty_N
        (N,) d in [0, 1].
    settings
        θ and the kind of tokens.
    tokens_N
        (N,) global response-token index; only ``random`` needs it.
    seed
        Seed of ``random``.
    progress
        u in [0, 1].

    Returns
    -------
    Tensor
        (N,) bool.
    """
    limit = threshold(settings, progress)
    if settings.tokens == "hard":
        return difficulty_N > limit
    if settings.tokens == "easy":
        return difficulty_N < 1 - limit
    if settings.tokens == "all":
        return torch.ones_like(difficulty_N, dtype=torch.bool)
    if tokens_N is None:
        raise ValueError("features.tokens: random draws by token; pass tokens_N")
    return _uniform(tokens_N, seed).to(difficulty_N.device) < 1 - limit


def _uniform(tokens_N: Tensor, seed: int) -> Tensor:
    """A number in [0, 1) per token: SplitMix64 (Steele, Lea & Flood 2014) over index and seed."""
    state = tokens_N.cpu().numpy().astype(np.uint64)  # arithmetic modulo 2^64 is the algorithm
    for key in (np.uint64(seed), np.uint64(0)):
        state = (state + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + key
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return torch.from_numpy((state >> np.uint64(11)).astype(np.float64) / 2.0**53)


class Projectors(nn.ModuleList):
    """One map from student to teacher width per layer pair, thrown away after training.

    Parameters
    ----------
    student_width, teacher_width
        D and E.
    pairs
        |M|, the number of layer pairs.
    kind
        ``linear`` (no bias) or ``identity``.
    generator
        Random stream of the initial weights, normal with variance 1/D.

    Raises
    ------
    UserError
        ``identity`` between different widths.
    """

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        pairs: int,
        kind: Literal["linear", "identity"] = "linear",
        generator: torch.Generator | None = None,
    ) -> None:
        if kind == "identity":
            if student_width != teacher_width:
                raise UserError(
                    f"features.projector: identity needs equal widths; the student has {student_width} and the "
                    f"teacher {teacher_width}; use projector: linear"
                )
            super().__init__(nn.Identity() for _ in range(pairs))
            return
        projectors = [nn.Linear(student_width, teacher_width, bias=False) for _ in range(pairs)]
        super().__init__(projectors)
        for projector in projectors:
            nn.init.normal_(projector.weight, std=student_width**-0.5, generator=generator)


def feature_loss(
    student_hidden_ND: Tensor, teacher_hidden_NE: Tensor, projector: nn.Module, loss: Literal["cosine", "mse"]
) -> Tensor:
    """Feature loss of one layer pair, summed over tokens.

    Parameters
    ----------
    student_hidden_ND, teacher_hidden_NE
        (N, D) and (N, E) hidden states before the final norm, any floating dtype; computed in at least fp32. The
        teacher gets no gradient. N = 0 gives 0 and zero gradients.
    projector
        Maps (N, D) to (N, E).
    loss
        ``cosine``: 1 - cos; ``mse``: squared error, mean over E.

    Returns
    -------
    Tensor
        Scalar sum over tokens.
    """
    dtype = torch.promote_types(student_hidden_ND.dtype, torch.float32)
    with torch.autocast(student_hidden_ND.device.type, enabled=False):
        projected_NE: Tensor = projector(student_hidden_ND.to(dtype))
        target_NE = teacher_hidden_NE.detach().to(dtype)
        if loss == "cosine":
            return (1 - torch.cosine_similarity(projected_NE, target_NE, dim=-1)).sum()
        if loss == "mse":
            return (projected_NE - target_NE).square().mean(-1).sum()
    raise ValueError(f"features.loss {loss!r}: allowed are cosine and mse")

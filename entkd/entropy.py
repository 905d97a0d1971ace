"""Teacher entropy per token and the difficulty made from it (docs/method.md, section 1).

    H_i = -Σ_v p_i log p_i        nats, at temperature 1, over the full vocabulary
    d_i = F(H_i) in [0, 1]        F fixed over a calibration sample, so d does not depend on batch or world size

Shapes: N tokens, V vocabulary, C calibration tokens.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor


@torch.no_grad()
def token_entropy(logits_NV: Tensor) -> Tensor:
    """Entropy of softmax(logits) per token.

    Parameters
    ----------
    logits_NV
        (N, V) logits; -inf is probability 0.

    Returns
    -------
    Tensor
        (N,) nats, without gradient; fp64 for fp64 logits, else fp32.
    """
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    log_p_NV = torch.log_softmax(logits_NV, dim=-1, dtype=dtype)
    p_NV = log_p_NV.exp()
    # 0·(-inf) is 0 here: an impossible token carries no surprise.
    return -(p_NV * log_p_NV.masked_fill_(p_NV == 0, 0.0)).sum(-1)


Scale = Literal["rank", "logv", "minmax"]


class Difficulty:
    """Maps teacher entropy to a difficulty d in [0, 1]; made by :meth:`fit` or :meth:`from_state`.

    Scales: ``rank``, the mid-rank empirical CDF of the calibration entropies (uniform on them, ½ when all are
    equal); ``logv``, H / log V; ``minmax``, (H - min) / (max - min) within each sequence (½ where max = min).
    """

    def __init__(self, sorted_entropy_C: Tensor, scale: Scale, vocab_size: int | None):
        if scale == "rank" and sorted_entropy_C.numel() == 0:
            raise ValueError("difficulty scale rank needs at least one calibration token; got none")
        if not torch.isfinite(sorted_entropy_C).all():
            raise ValueError("the calibration entropies hold NaN or infinity; the teacher's logits are broken")
        if scale == "logv" and (vocab_size is None or vocab_size < 2):
            raise ValueError(f"difficulty scale logv needs vocab_size >= 2; got {vocab_size}")
        self.sorted_entropy_C = sorted_entropy_C
        self.scale = scale
        self.largest_entropy = math.log(vocab_size) if vocab_size else math.inf

    @classmethod
    def fit(
        cls,
        entropy_N: Tensor,
        scale: Scale = "rank",
        vocab_size: int | None = None,
    ) -> Difficulty:
        """Fix F on the entropies of a calibration sample.

        Parameters
        ----------
        entropy_N
            (N,) nats, finite, of training response tokens.
        scale
            ``rank``, ``logv`` or ``minmax``.
        vocab_size
            V; only ``logv`` needs it.

        Raises
        ------
        ValueError
            No calibration token, a non-finite entropy, or ``logv`` without a vocabulary size.
        """
        return cls(entropy_N.detach().float().flatten().sort().values, scale, vocab_size)

    def state(self) -> dict[str, Tensor]:
        """What a store keeps: ``entropy``, the (C,) sorted calibration entropies in fp32."""
        return {"entropy": self.sorted_entropy_C}

    @classmethod
    def from_state(
        cls,
        state: dict[str, Tensor],
        scale: Scale = "rank",
        vocab_size: int | None = None,
    ) -> Difficulty:
        """The inverse of :meth:`state`; the calibration serves every scale."""
        return cls(state["entropy"], scale, vocab_size)

    @torch.no_grad()
    def __call__(self, entropy_N: Tensor, sequence_N: Tensor | None = None) -> Tensor:
        """Difficulty of tokens.

        Parameters
        ----------
        entropy_N
            (N,) nats.
        sequence_N
            (N,) integer sequence of each token; only ``minmax`` needs it, and whole sequences.

        Returns
        -------
        Tensor
            (N,) fp32 in [0, 1], without gradient.
        """
        entropy_N = entropy_N.float()
        if self.scale == "rank":
            calibration_C = self.sorted_entropy_C.to(entropy_N.device)
            entropy_N = entropy_N.contiguous()
            below_N = torch.searchsorted(calibration_C, entropy_N, right=False)
            up_to_N = torch.searchsorted(calibration_C, entropy_N, right=True)
            # Double precision: the sum of two counts has to stay exact before the division.
            return ((below_N + up_to_N).double() / (2 * calibration_C.numel())).float()
        if self.scale == "logv":
            return (entropy_N / self.largest_entropy).clamp(0.0, 1.0)
        return self._minmax(entropy_N, sequence_N)

    def _minmax(self, entropy_N: Tensor, sequence_N: Tensor | None) -> Tensor:
        if sequence_N is None:
            raise ValueError("difficulty scale minmax works within sequences; pass sequence_N")
        sequences, index_N = torch.unique(sequence_N, return_inverse=True)
        low_S = entropy_N.new_zeros(len(sequences)).scatter_reduce(0, index_N, entropy_N, "amin", include_self=False)
        high_S = entropy_N.new_zeros(len(sequences)).scatter_reduce(0, index_N, entropy_N, "amax", include_self=False)
        range_N = (high_S - low_S)[index_N]
        flat_N = range_N == 0
        return ((entropy_N - low_S[index_N]) / range_N.masked_fill(flat_N, 1.0)).masked_fill(flat_N, 0.5)

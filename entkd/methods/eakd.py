"""EA-KD: weights by the entropies of teacher and student (arXiv 2311.13621).

    w_i = ½ H^T_i (1 + H^S_i / log V)

with both entropies in nats at a temperature T′ of their own, without gradient; V is the vocabulary. The released code,
which is for images, takes the plain mean of w_i D_i (``normalise: none``), so that the size of the loss follows the
entropies; ``mean`` divides by the mean of w over the global batch. The code's T′ is 3; 2 is the value for
transformers that `docs/method.md` states.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from entkd.methods.base import Approach, Factors, Tokens

if TYPE_CHECKING:
    from torch import Tensor


class EAKD(Approach):
    """Token weights by the entropies of teacher and student (arXiv 2311.13621)."""

    citation: ClassVar[str] = "EA-KD, 2023, arXiv 2311.13621"

    name: Literal["eakd"] = "eakd"
    """Which approach."""
    entropy_t: float = Field(2.0, gt=0)
    """T′, the temperature of the entropies alone."""
    normalise: Literal["none", "mean"] = "none"
    """`none` as released; `mean` divides the weights by their mean over the global batch."""
    version: Literal[1] = 1
    """Version of the formula."""

    @property
    def statistics(self) -> tuple[str, ...]:
        return ("entropy", "teacher_entropy")

    @property
    def entropy_temperature(self) -> float:
        return self.entropy_t

    @property
    def scope(self) -> Literal["micro", "batch"]:
        return "batch" if self.normalise == "mean" else "micro"

    def factors(self, tokens: Tokens, state: dict[str, Tensor]) -> Factors:
        student_N, teacher_N = tokens.statistics["entropy"], tokens.statistics["teacher_entropy"]
        weight_N = 0.5 * teacher_N * (1 + student_N / math.log(tokens.vocab_size))
        if self.normalise == "mean":
            total = weight_N.double().sum()
            # No token with any entropy: weights of 0 and not 0/0.
            weight_N = weight_N * (tokens.positions / total.clamp_min(1e-30)).to(weight_N.dtype)
        return Factors(weight_N)

"""SE-KD: distillation on the positions where an entropy is highest (arXiv 2602.01395).

In every document with n response tokens, the k = max(1, ⌈share · n⌉) tokens with the highest entropy are kept, of the
student as it is in this step (the paper's choice) or of the teacher; ties go to the earlier token (equation 6). The
entropy is at T = 1 and has no gradient.

Where paper and released code differ: the paper's loss is the mean over the kept tokens of a document, then over
documents (equations 4 and 5; ``variant: paper``); the code's is one mean over all kept tokens (``variant: authors``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from entkd.methods.base import Approach, Factors, Tokens

if TYPE_CHECKING:
    from torch import Tensor

_SLACK = 1e-9
"""Taken off before rounding up: 0.07 · 100 is a little more than 7 in floating point."""


class SEKD(Approach):
    """Distillation on the tokens of highest entropy in each document (arXiv 2602.01395)."""

    citation: ClassVar[str] = "SE-KD, 2026, arXiv 2602.01395"

    name: Literal["sekd"] = "sekd"
    """Which approach."""
    by: Literal["student", "teacher"] = "student"
    """Whose entropy."""
    share: float = Field(0.2, gt=0, le=1)
    """Share of a document's response tokens that have a loss."""
    variant: Literal["authors", "paper"] = "authors"
    """Mean over all kept tokens, or mean over documents of their means."""
    version: Literal[1] = 1
    """Version of the formula."""

    @property
    def statistics(self) -> tuple[str, ...]:
        return ("entropy" if self.by == "student" else "teacher_entropy",)

    @property
    def needs_distribution(self) -> bool:
        return self.by == "teacher"

    def selected(self, lengths: Sequence[int]) -> int:
        if self.variant == "paper":
            return sum(length > 0 for length in lengths)
        return sum(max(1, math.ceil(self.share * length - _SLACK)) for length in lengths if length)

    def factors(self, tokens: Tokens, state: dict[str, Tensor]) -> Factors:
        import torch  # settings are read where there is none

        (entropy_N,) = tokens.statistics.values()
        document_N = tokens.document_N
        # By document, and within it from the highest entropy down; both sorts keep the order of equals.
        order_N = entropy_N.argsort(descending=True, stable=True)
        order_N = order_N[document_N[order_N].argsort(stable=True)]
        place_N = order_N.argsort()
        first_N = torch.searchsorted(document_N, document_N)
        length_N = torch.searchsorted(document_N, document_N, right=True) - first_N
        kept_N = (self.share * length_N.double() - _SLACK).ceil().clamp_min(1.0)
        weight_N = (place_N - first_N < kept_N).double() * tokens.positions / max(1, tokens.selected)
        if self.variant == "paper":
            weight_N = weight_N / kept_N
        return Factors(weight_N.to(entropy_N.dtype))

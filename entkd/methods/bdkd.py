"""BDKD: forward and reverse KL, weighted by which of the two models is the less certain (arXiv 2212.12965).

    D_i = 3 KL(p_i‖q_i) +   KL(q_i‖p_i)    where H(p_i) > H(q_i)
    D_i =   KL(p_i‖q_i) + 3 KL(q_i‖p_i)    elsewhere

with entropies of the distributions that are compared, without gradient. The paper's method is for images and trains
the teacher as well; this is the form in which others have brought it to language models. ``scale: mean`` divides by
the sum of both weights. Ports differ in the factor (3 or 2), take the cross-entropy -Σ p log q for the forward term,
which has the same gradient, and give equal entropies the weights 1 and 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from entkd.methods.base import Approach, Problem

if TYPE_CHECKING:
    from torch import Tensor

    from entkd.config.method import Method


def _terms(
    p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, *, strength: float = 3.0, scale: str = "sum"
) -> tuple[Tensor, Tensor]:
    """f and a of ``entkd.kernels.TERMS``."""
    teacher_R1, student_R1 = -(p * log_p).sum(-1, keepdim=True), -(q * log_q).sum(-1, keepdim=True)
    prefers_forward = (teacher_R1 > student_R1).to(p.dtype)
    total = strength + 1 if scale == "mean" else 1.0
    forward_R1 = (1 + (strength - 1) * prefers_forward) / total
    reverse_R1 = (strength - (strength - 1) * prefers_forward) / total
    forward, reverse = forward_R1 * p * (log_p - log_q), reverse_R1 * q * (log_q - log_p)
    return forward + reverse, reverse - forward_R1 * p


class BDKD(Approach):
    """Forward and reverse KL by which model is less certain (arXiv 2212.12965)."""

    citation: ClassVar[str] = "BD-KD, 2022, arXiv 2212.12965"

    own_terms = staticmethod(_terms)
    name: Literal["bdkd"] = "bdkd"
    """Which approach."""
    strength: float = Field(3.0, ge=1)
    """Weight of the preferred KL; the other has 1."""
    scale: Literal["sum", "mean"] = "sum"
    """`mean` divides by `strength` + 1."""
    version: Literal[1] = 1
    """Version of the formula."""

    def problems(self, method: Method) -> Iterator[Problem]:
        if method.divergence is not None and method.divergence.name != "forward_kl":
            yield "divergence", f"bdkd is a divergence of its own, not {method.divergence.name}; use forward_kl"

    def divergence(self, name: str, settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return "bdkd", {"strength": self.strength, "scale": self.scale}

    def contains_reverse_kl(self, of_divergence: bool) -> bool:
        return True

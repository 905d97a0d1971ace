"""TAID: a teacher that starts near the student and moves away from it (arXiv 2501.16937).

    p_t = softmax((1-t) z^S + t z^T),  z^S without gradient,     D = KL(p_t‖q)

t starts at t_start. After the first step J is kept; after every later one, with n steps finished before it of N,

    δ = (J_before - J) / J_before,   m ← β m + (1-β) δ
    t ← min(t_end, max(t_start + (t_end - t_start) n/N,  t + α σ(m) (1-t)))

(algorithm 1). J is the loss over the global batch, once per optimizer step: in the released code the cross-entropy
-Σ p_t log q of the mixed teacher (``variant: authors``), in the paper the divergence (``variant: paper``). The code
takes it per process and per accumulation step. With ``adaptive: false`` t is the straight line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from entkd.methods.base import Approach, Problem

if TYPE_CHECKING:
    from torch import Tensor

    from entkd.config.method import Method


class TAID(Approach):
    """A teacher mixed with the student in logit space, by a share that rises to 1 (arXiv 2501.16937)."""

    citation: ClassVar[str] = "TAID, 2025, arXiv 2501.16937"
    terms: ClassVar[tuple[str, ...]] = ("target_cross_entropy",)

    name: Literal["taid"] = "taid"
    """Which approach."""
    start: float = Field(0.4, gt=0, le=1)
    """t_start, the teacher's share in the first step."""
    end: float = Field(1.0, gt=0, le=1)
    """t_end, the largest share."""
    adaptive: bool = True
    """Whether t rises faster than the line while the loss falls."""
    alpha: float = Field(5e-4, ge=0)
    """α, size of the adaptive increase."""
    beta: float = Field(0.99, ge=0, lt=1)
    """β of the moving average of the loss's relative fall."""
    variant: Literal["authors", "paper"] = "authors"
    """J: the cross-entropy of the mixed teacher, or the divergence."""
    version: Literal[1] = 1
    """Version of the formula."""

    @model_validator(mode="after")
    def _rises(self) -> TAID:
        if self.start > self.end:
            raise ValueError(f"start {self.start:g} is above end {self.end:g}, but t rises")
        return self

    def idle(self) -> dict[str, str]:
        return {} if self.adaptive else dict.fromkeys(("alpha", "beta", "variant"), "adaptive: false")

    def problems(self, method: Method) -> Iterator[Problem]:
        if method.divergence is not None and method.divergence.name != "forward_kl":
            yield "divergence", f"taid trains KL(p_t‖q), not {method.divergence.name}; use forward_kl"

    def state(self) -> dict[str, float]:
        return {"t": self.start, "momentum": 0.0, "before": 0.0}

    def teacher_share(self, state: dict[str, Tensor]) -> Tensor | None:
        return state["t"]

    def end_step(self, state: dict[str, Tensor], terms: Mapping[str, Tensor], step: int, steps: int) -> None:
        t, momentum, before = state["t"], state["momentum"], state["before"]
        loss = terms["target_cross_entropy" if self.variant == "authors" else "kd"].to(t.dtype)
        line = self.start + (self.end - self.start) * step / steps
        if not self.adaptive:
            t.fill_(line)
        elif step:
            momentum.mul_(self.beta).add_((1 - self.beta) * (before - loss) / (before + 1e-15))
            t.copy_((t + self.alpha * momentum.sigmoid() * (1 - t)).clamp(line, self.end))
        before.copy_(loss)

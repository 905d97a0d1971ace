"""CTKD: one temperature that learns to make the student's task harder (arXiv 2211.16231).

    T = T_start + width · σ(θ),    L(T) = s(T) D(p(T)‖q(T))    with s(T) = T²
    θ ← θ + η λ g,    g the moving sum  g ← μ g + dL/dθ

The gradient is reversed: θ ascends the loss that the student descends. λ rises along half a cosine from 0 to 1 during
the ramp and stays there. The derivative goes through s(T), as in the released code; θ is moved by gradient ascent with
momentum, not by Adam, whose steps would not know λ. The released code's ramp is 10 of 240 epochs, θ starts at 1, and η
is the student's own rate of plain SGD; its weight decay of θ is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from entkd.methods.base import Approach, Problem

if TYPE_CHECKING:
    from torch import Tensor

    from entkd.config.method import Method


class CTKD(Approach):
    """A learned temperature with a reversed gradient (arXiv 2211.16231)."""

    citation: ClassVar[str] = "CTKD, 2022, arXiv 2211.16231"
    terms: ClassVar[tuple[str, ...]] = ("temperature_gradient",)

    name: Literal["ctkd"] = "ctkd"
    """Which approach."""
    start: float = Field(1.0, gt=0)
    """T_start, the lowest temperature."""
    width: float = Field(20.0, gt=0)
    """Temperatures stay below `start` + `width`."""
    theta: float = 1.0
    """θ at the start; 1 gives T = 15.6 with the other defaults."""
    lr: float = Field(0.05, gt=0)
    """η, the step of θ."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """μ."""
    ramp: float = Field(10 / 240, ge=0, le=1)
    """Share of the steps in which λ rises."""
    version: Literal[1] = 1
    """Version of the formula."""

    def problems(self, method: Method) -> Iterator[Problem]:
        if method.temperature is not None:
            yield "temperature", "ctkd learns one temperature of all tokens; remove temperature"
        if method.divergence is not None and method.divergence.name not in ("forward_kl", "reverse_kl"):
            name = method.divergence.name
            yield "divergence", f"ctkd differentiates the two KLs by the temperature, not {name}; use one of them"

    def state(self) -> dict[str, float]:
        return {"theta": self.theta, "velocity": 0.0}

    def temperature(self, state: dict[str, Tensor]) -> Tensor | None:
        return self.start + self.width * state["theta"].sigmoid()

    def reversal(self, step: int, steps: int) -> float:
        """λ in step number ``step``, counted from 0."""
        length = self.ramp * steps
        return 1.0 if step + 1 >= length else 0.5 * (1 - math.cos(math.pi * (step + 1) / length))

    def end_step(self, state: dict[str, Tensor], terms: Mapping[str, Tensor], step: int, steps: int) -> None:
        theta, velocity = state["theta"], state["velocity"]
        sigmoid = theta.sigmoid()
        slope = terms["temperature_gradient"].to(theta.dtype) * self.width * sigmoid * (1 - sigmoid)
        velocity.mul_(self.momentum).add_(self.reversal(step, steps) * slope)
        theta.add_(self.lr * velocity)

"""AdaKD: token-adaptive distillation (arXiv 2510.11615).

The distance of a token is s_i = √(1 - Σ_v √(p_iv q_iv)), the Hellinger distance at T = 1 (equation 3).

LATF, loss-driven adaptive token focusing (equations 4 to 7): the loss is the mean over the k = max(1, ⌊r N⌋) tokens
with the largest s. After every step the moving average of that loss is L̄ ← β L̄ + (1-β) L; the share r is 1 during
warm-up, whose end sets L_ref = L̄, and from then on

    L̄ < L_ref (1-ε):  r ← max(r_min, r (1-δ)),  L_ref ← L̄
    L̄ > L_ref (1+ε):  r ← min(1, r (1+δ)),      L_ref ← L̄

IDTS, inverse difficulty temperature scaling (equations 9 and 10): τ_i = exp(-c tanh log(s_i / median s)), the median
over the kept tokens, and the token's divergence is multiplied by τ².

Where paper and released code differ: the code bounds r below by 0.1 and the paper does not (``least``). Both take N, k
and the median over the tokens that one process has in one forward pass; here they are those of the global batch of a
step, so that neither accumulation nor the number of devices changes the loss. The paper detaches τ, and so does
``detach: true``. The code lets gradients flow through it, as ``detach: false`` does: with x_i = log(s_i / s_m), m the
token of the median, the loss then also has the gradient

    Σ_i w_i d[τ_i² D_i]/dτ_i · (-c) τ_i (1 - tanh² x_i) · (d log s_i - d log s_m)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from entkd.methods.base import Approach, Factors, Problem, Tokens
from entkd.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from entkd.config.method import Method


class Focusing(Settings):
    """LATF: only the most distant tokens have a loss, and how many follows the loss."""

    decay: float = Field(0.99, ge=0, lt=1)
    """β of the loss's moving average."""
    tolerance: float = Field(0.1, gt=0, lt=1)
    """ε: relative change of the average that changes the share."""
    change: float = Field(0.1, gt=0, lt=1)
    """δ: relative change of the share."""
    least: float = Field(0.1, ge=0, le=1)
    """r_min: 0.1 in the released code; 0 as in the paper, which has no bound."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps in which all tokens are kept."""


class Tempering(Settings):
    """IDTS: a lower temperature on more distant tokens."""

    c: float = Field(0.5, ge=-3, le=3)
    """Strength; negative softens distant tokens instead."""


class AdaKD(Approach):
    """Token-adaptive distillation: the most distant tokens, at lower temperatures (arXiv 2510.11615)."""

    citation: ClassVar[str] = "AdaKD, 2025, arXiv 2510.11615"

    name: Literal["adakd"] = "adakd"
    """Which approach."""
    parts: Literal["both", "focusing", "tempering"] = "both"
    """LATF and IDTS, or one of them alone."""
    focusing: Focusing = Focusing()
    """LATF."""
    tempering: Tempering = Tempering()
    """IDTS."""
    detach: bool = True
    """Whether temperatures are constants of a step, as in the paper; gradients flow through them in the release."""
    version: Literal[1] = 1
    """Version of the formula."""

    @property
    def focuses(self) -> bool:
        """Whether LATF is on."""
        return self.parts != "tempering"

    @property
    def tempers(self) -> bool:
        """Whether IDTS is on."""
        return self.parts != "focusing"

    @property
    def statistics(self) -> tuple[str, ...]:
        return ("hellinger",)

    @property
    def scope(self) -> Literal["micro", "batch"]:
        return "batch"

    @property
    def moves_temperature(self) -> bool:
        return self.tempers and not self.detach

    def idle(self) -> dict[str, str]:
        if self.parts == "both":
            return {}
        keys = ("tempering", "detach") if self.parts == "focusing" else ("focusing",)
        return dict.fromkeys(keys, f"parts: {self.parts}")

    def problems(self, method: Method) -> Iterator[Problem]:
        if (
            self.moves_temperature
            and method.divergence is not None
            and method.divergence.name not in ("forward_kl", "reverse_kl")
        ):
            yield (
                "divergence",
                "adakd's detach: false needs the derivative by the temperature, known of forward_kl and reverse_kl and "
                f"not of {method.divergence.name}; use one of them, or detach: true",
            )
        if self.tempers and method.temperature is not None:
            yield "temperature", "adakd's tempering sets each token's temperature itself; remove one of the two"

    def state(self) -> dict[str, float]:
        return {"share": 1.0, "average": 0.0, "reference": 0.0} if self.focuses else {}

    def factors(self, tokens: Tokens, state: dict[str, Tensor]) -> Factors:
        distance_N = tokens.statistics["hellinger"]
        count = len(distance_N)
        if not count:
            return Factors()
        order_N = distance_N.argsort(descending=True, stable=True)
        weight_N = temperature_N = None
        middle_1 = order_N.new_full((1,), count // 2)
        if self.focuses:
            # A little more, or 0.3 · 10 could keep 2 tokens where 3 are meant.
            kept = (state["share"] * count + 1e-9).floor().clamp(1, count)
            weight_N = (order_N.argsort() < kept).to(distance_N.dtype) * (count / kept).to(distance_N.dtype)
            middle_1 = (kept / 2).floor().long().view(1)
        if self.tempers:
            # Entry k // 2 from the largest down is the lower of two middle ones, the release's median.
            median = distance_N[order_N].index_select(0, middle_1)
            tiny = 1e-8  # equal distributions have distance 0; where the median is 0, too, they have τ = 1
            relative_N = distance_N.clamp_min(tiny) / median.clamp_min(tiny)
            temperature_N = (-self.tempering.c * relative_N.log().tanh()).exp()
        return Factors(weight_N, temperature_N)

    def end_step(self, state: dict[str, Tensor], terms: Mapping[str, Tensor], step: int, steps: int) -> None:
        if not self.focuses:
            return
        settings, share, average, reference = self.focusing, state["share"], state["average"], state["reference"]
        loss = terms["kd"].to(average.dtype)
        average.copy_(loss if step == 0 else settings.decay * average + (1 - settings.decay) * loss)
        warm = int(settings.warmup * steps)
        if step < warm:
            return
        if step == warm:
            reference.copy_(average)
            return
        falls, rises = average < reference * (1 - settings.tolerance), average > reference * (1 + settings.tolerance)
        fewer, more = (share * (1 - settings.change)).clamp_min(settings.least), share * (1 + settings.change)
        share.copy_(fewer.where(falls, more.clamp_max(1.0).where(rises, share)))
        reference.copy_(average.where(falls | rises, reference))

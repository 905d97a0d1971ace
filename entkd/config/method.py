"""The method: divergence, cross-entropy and the three entropy-guided components, each present or absent.

Names, formulas and defaults follow the method description in ``docs/method.md``. ``null`` or absent means
off. Every component carries a ``version``: it is bumped when the numbers it produces change, so that
results made by different formulas are never mixed.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from entkd.config.base import Settings
from entkd.methods.distillm import DistiLLM
from entkd.methods.gkd import GKD


class _Divergence(Settings):
    weight: float = Field(1.0, gt=0)
    """a_kd, the weight of the distillation term in the total loss."""
    version: Literal[1] = 1
    """Version of the formula."""

    def parameters(self) -> dict[str, Any]:
        """The keyword arguments of the divergence function (β, α, μ, variant, ...), without name and weight."""
        return self.model_dump(exclude={"name", "weight", "version"})


class ForwardKL(_Divergence):
    """KL(p‖q), teacher to student (Hinton 2015; Kim & Rush 2016)."""

    name: Literal["forward_kl"] = "forward_kl"
    """Which divergence."""


class ReverseKL(_Divergence):
    """KL(q‖p), the token-level form of MiniLLM (arXiv 2306.08543)."""

    name: Literal["reverse_kl"] = "reverse_kl"
    """Which divergence."""


class JSD(_Divergence):
    """Generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649)."""

    name: Literal["jsd"] = "jsd"
    """Which divergence."""
    beta: float = Field(0.5, ge=0, le=1)
    """Mixture weight of the teacher; 0 is forward KL, 1 is reverse KL."""


class SkewKL(_Divergence):
    """KL(p ‖ αp + (1−α)q), DistiLLM (arXiv 2402.03898)."""

    name: Literal["skew_kl"] = "skew_kl"
    """Which divergence."""
    alpha: float = Field(0.1, ge=0, lt=1)
    """Share of the teacher in the mixture."""


class SkewReverseKL(_Divergence):
    """KL(q ‖ (1−α)p + αq), DistiLLM (arXiv 2402.03898)."""

    name: Literal["skew_reverse_kl"] = "skew_reverse_kl"
    """Which divergence."""
    alpha: float = Field(0.1, ge=0, lt=1)
    """Share of the student in the mixture."""


class AdaptiveKL(_Divergence):
    """Forward and reverse KL weighted by the head and tail gaps (AKL, arXiv 2404.02657)."""

    name: Literal["adaptive_kl"] = "adaptive_kl"
    """Which divergence."""
    mu: float = Field(0.5, gt=0, lt=1)
    """Probability mass of the head."""
    variant: Literal["authors", "cover"] = "authors"
    """Head as the authors' code forms it, or the smallest prefix that covers μ."""


class AlphaBeta(_Divergence):
    """α-β divergence, ABKD (arXiv 2505.04560)."""

    name: Literal["alpha_beta"] = "alpha_beta"
    """Which divergence."""
    alpha: float = Field(0.2, gt=0)
    """Exponent of the teacher."""
    beta: float = Field(0.7, gt=0)
    """Exponent of the student."""


class ToDi(_Divergence):
    """Token-wise forward/reverse KL mix per vocabulary entry (arXiv 2505.16297)."""

    name: Literal["todi"] = "todi"
    """Which divergence."""


class TVD(_Divergence):
    """Total variation distance, ½ Σ|p − q|."""

    name: Literal["tvd"] = "tvd"
    """Which divergence."""


Divergence = Annotated[
    ForwardKL | ReverseKL | JSD | SkewKL | SkewReverseKL | AdaptiveKL | AlphaBeta | ToDi | TVD,
    Field(discriminator="name"),
]

DIVERGENCE_NAMES = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_kl",
    "skew_reverse_kl",
    "adaptive_kl",
    "alpha_beta",
    "todi",
    "tvd",
)


OnPolicy = Annotated[GKD | DistiLLM, Field(discriminator="name")]
"""When the student writes the text that it is trained on."""


class CrossEntropy(Settings):
    """Cross-entropy on the data's own tokens."""

    weight: float = Field(1.0, gt=0)
    """a_ce, the weight of the cross-entropy term in the total loss."""
    version: Literal[1] = 1
    """Version of the formula."""


class Difficulty(Settings):
    """How the teacher's entropy H becomes a difficulty d in [0, 1]. Used only where a component needs d."""

    scale: Literal["rank", "logv", "minmax"] = "rank"
    """Mid-rank empirical CDF over a calibration sample, H / log V, or min-max within a sequence."""
    version: Literal[1] = 1
    """Version of the formula."""


class Curriculum(Settings):
    """Token weights that move from low- to high-entropy tokens over training."""

    kappa: float = Field(0.8, ge=-10, le=10)
    """κ, strength. 0 is vanilla; negative is the anti-curriculum. |κ| ≤ 1 for `soft` and at most 10 for `exp`."""
    shape: Literal["soft", "exp", "window"] = "soft"
    """1 + κ(2u−1)(2d−1), its exponential, or a sliding window over d."""
    window: float = Field(0.3, gt=0, le=1)
    """Width of the sliding window in d (only `shape: window`)."""
    progress: Literal["lr", "step", "easy", "hard"] = "lr"
    """u measured in cumulative learning rate or in steps; `easy` and `hard` hold u at 0 and 1."""
    version: Literal[1] = 1
    """Version of the formula."""

    @model_validator(mode="after")
    def _soft_weights_stay_non_negative(self) -> Curriculum:
        if self.shape == "soft" and abs(self.kappa) > 1:
            raise ValueError(f"kappa {self.kappa} makes negative soft weights; use |kappa| <= 1 or shape: exp")
        return self


class Temperature(Settings):
    """A softmax temperature per token, shared by teacher and student."""

    base: float = Field(1.0, gt=0)
    """T_0, the temperature at the median difficulty."""
    c: float = Field(0.5, ge=-3, le=3)
    """T = T_0·exp(c(2d−1)). Positive softens uncertain tokens, negative is AdaKD's direction, 0 is a fixed T_0."""
    t2: Literal["per_token", "linear", "off"] = "per_token"
    """Scale of the token loss: T², T or 1."""
    normalise: Literal["none", "joint"] = "none"
    """`joint` divides by the global batch's mean of weight × scale."""
    version: Literal[1] = 1
    """Version of the formula."""


class Features(Settings):
    """Hidden-state distillation on hard tokens, on top of the logits loss."""

    weight: float = Field(0.5, gt=0)
    """λ, the weight of the feature term in the total loss."""
    threshold: float = Field(0.8, ge=0, le=1)
    """θ: tokens with d > θ are hard. For `random` and `easy` the same share 1 − θ of tokens is used."""
    tokens: Literal["hard", "all", "random", "easy"] = "hard"
    """Which tokens get the feature loss."""
    loss: Literal["cosine", "mse"] = "cosine"
    """1 − cosine similarity, or mean squared error over the width."""
    projector: Literal["linear", "identity"] = "linear"
    """A linear map from student to teacher width, or none where the widths agree."""
    projector_lr: float = Field(1e-3, gt=0)
    """The projectors' own learning rate."""
    points: int = Field(3, ge=1)
    """Layer pairs at 1/points, 2/points, ... of each network's depth; the last layer is always one."""
    version: Literal[1] = 1
    """Version of the formula."""


class Method(Settings):
    """What an arm trains: each term present or null."""

    divergence: Divergence | None = None
    """Distillation term. A bare name stands for that divergence with its defaults."""
    ce: CrossEntropy | None = None
    """Cross-entropy term."""
    curriculum: Curriculum | None = None
    """Curriculum over token entropy."""
    temperature: Temperature | None = None
    """Temperature per token."""
    features: Features | None = None
    """Feature distillation on hard tokens."""
    difficulty: Difficulty = Difficulty()
    """How entropy becomes difficulty, where a component needs it."""
    on_policy: OnPolicy | None = Field(None, exclude_if=lambda value: value is None)
    """Steps on text that the student writes and the teacher then reads (`pipeline: onpolicy`). A bare name stands for
    that schedule with its defaults."""

    @field_validator("divergence", "on_policy", mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _terms_fit_together(self) -> Method:
        if self.divergence is None and self.ce is None:
            raise ValueError("a method needs a divergence, or ce, or both; this one has neither")
        if self.divergence is None:
            for name in ("curriculum", "temperature"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} shapes the divergence term, which is null here; set {name}: null")
        if self.on_policy is not None:
            if self.divergence is None:
                raise ValueError(
                    f"on_policy: {self.on_policy.name} has the teacher judge what the student writes, by a divergence, "
                    "which is null here; set one, or remove on_policy"
                )
            if self.ce is not None:
                raise ValueError(
                    f"ce would teach the student the text that it wrote itself under on_policy: {self.on_policy.name}; "
                    "remove one of the two"
                )
        return self

    @property
    def needs_difficulty(self) -> bool:
        """Whether any term reads the per-token difficulty."""
        return self.curriculum is not None or self.temperature is not None or self.features is not None

    @property
    def needs_signals(self) -> bool:
        """Whether the arm reads the teacher signal store."""
        return self.divergence is not None or self.needs_difficulty

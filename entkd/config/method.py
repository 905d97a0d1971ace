"""The method: divergence, cross-entropy and the three components (``components.py``), each present or absent.

Names, formulas and defaults follow the method description in ``docs/method.md``. ``null`` or absent means
off. Every component carries a ``version``: it is bumped when the numbers it produces change, so that
results made by different formulas are never mixed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import Field, field_validator, model_validator

from entkd.config.components import Curriculum, Difficulty, Features, Temperature
from entkd.methods import AnyApproach
from entkd.methods.distillm import DistiLLM
from entkd.methods.gkd import GKD
from entkd.settings import Settings


class _Divergence(Settings):
    if TYPE_CHECKING:
        name: str  # stated by each class below
    weight: float = Field(1.0, gt=0)
    """a_kd, the weight of the distillation term in the total loss."""
    version: Literal[1] = 1
    """Version of the formula."""

    def parameters(self) -> dict[str, Any]:
        """The keyword arguments of the divergence function (β, α, μ, variant, ...), without name and weight."""
        return self.model_dump(exclude={"name", "weight", "version"})

    @property
    def contains_reverse_kl(self) -> bool:
        """Whether it holds a KL(q‖p), which is infinite where the teacher gives a token probability 0."""
        return False


class ForwardKL(_Divergence):
    """KL(p‖q), teacher to student (Hinton 2015; Kim & Rush 2016)."""

    name: Literal["forward_kl"] = "forward_kl"
    """Which divergence."""


class ReverseKL(_Divergence):
    """KL(q‖p), the token-level form of MiniLLM (arXiv 2306.08543)."""

    name: Literal["reverse_kl"] = "reverse_kl"
    """Which divergence."""

    @property
    def contains_reverse_kl(self) -> bool:
        return True


class JSD(_Divergence):
    """Generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649)."""

    name: Literal["jsd"] = "jsd"
    """Which divergence."""
    beta: float = Field(0.5, ge=0, le=1)
    """Mixture weight of the teacher; 0 is forward KL, 1 is reverse KL, and between them it is 0.01 to 0.99."""

    @model_validator(mode="after")
    def _mixture_is_one(self) -> JSD:
        end = round(self.beta)
        if 0 < abs(self.beta - end) < 0.01:
            raise ValueError(
                f"beta {self.beta:g} gives a loss of nearly 0, as its size is that of β(1-β), and rounding; use {end}, "
                f"which is {'reverse' if end else 'forward'} KL, or 0.01 to 0.99"
            )
        return self

    @property
    def contains_reverse_kl(self) -> bool:
        return self.beta == 1


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

    @property
    def contains_reverse_kl(self) -> bool:
        return self.alpha == 0


class AdaptiveKL(_Divergence):
    """Forward and reverse KL weighted by the head and tail gaps (AKL, arXiv 2404.02657)."""

    name: Literal["adaptive_kl"] = "adaptive_kl"
    """Which divergence."""
    mu: float = Field(0.5, gt=0, lt=1)
    """Probability mass of the head."""
    variant: Literal["authors", "cover"] = "authors"
    """Head as the authors' code forms it, or the smallest prefix that covers μ."""

    @property
    def contains_reverse_kl(self) -> bool:
        return True


class AlphaBeta(_Divergence):
    """α-β divergence, ABKD (arXiv 2505.04560)."""

    name: Literal["alpha_beta"] = "alpha_beta"
    """Which divergence."""
    # Divided by αβ: below, the value is rounding; far above, powers of probabilities are 0, and nothing is trained.
    alpha: float = Field(0.2, ge=0.05, le=4)
    """Exponent of the teacher."""
    beta: float = Field(0.7, ge=0.05, le=4)
    """Exponent of the student."""


class ToDi(_Divergence):
    """Token-wise forward/reverse KL mix per vocabulary entry (arXiv 2505.16297)."""

    name: Literal["todi"] = "todi"
    """Which divergence."""

    @property
    def contains_reverse_kl(self) -> bool:
        return True


class TVD(_Divergence):
    """Total variation distance, ½ Σ|p − q|."""

    name: Literal["tvd"] = "tvd"
    """Which divergence."""


_DIVERGENCES = tuple(_Divergence.__subclasses__())

if TYPE_CHECKING:
    Divergence = _Divergence
else:
    Divergence = Annotated[Union[_DIVERGENCES], Field(discriminator="name")]  # noqa: UP007

DIVERGENCE_NAMES: tuple[str, ...] = tuple(cls.model_fields["name"].default for cls in _DIVERGENCES)
"""Of the classes above, in their order; nothing else in the settings has to be told of a new one."""


OnPolicy = Annotated[GKD | DistiLLM, Field(discriminator="name")]
"""When the student writes the text that it is trained on."""


class CrossEntropy(Settings):
    """Cross-entropy on the data's own tokens."""

    weight: float = Field(1.0, gt=0)
    """a_ce, the weight of the cross-entropy term in the total loss."""
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
    """What makes a token hard, where a component needs it."""
    approach: AnyApproach | None = Field(None, exclude_if=lambda value: value is None)
    """A published way to weigh, select or soften tokens. A bare name stands for it with its defaults."""

    on_policy: OnPolicy | None = Field(None, exclude_if=lambda value: value is None)
    """Steps on text that the student writes and the teacher then reads (`pipeline: onpolicy`). A bare name stands for
    that schedule with its defaults."""

    @field_validator("divergence", "approach", "on_policy", mode="before")
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
        if self.approach is not None:
            if self.divergence is None:
                raise ValueError(f"approach {self.approach.name} shapes the divergence term, which is null here")
            for key, why in self.approach.problems(self):
                raise ValueError(f"{key}: {why}")
            trained, _ = self.approach.divergence(self.divergence.name, self.divergence.parameters())
            if trained not in (*DIVERGENCE_NAMES, self.approach.name if self.approach.own_terms is not None else None):
                raise ValueError(
                    f"approach: {self.approach.name} trains `{trained}`, which is no divergence; give its class "
                    "`own_terms`, or let `divergence` name one that is there"
                )
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
    def trained_divergence(self) -> tuple[str, dict[str, Any]] | None:
        """Name and settings of the divergence that is trained: the method's, unless its approach has one of its own."""
        if self.divergence is None:
            return None
        name, settings = self.divergence.name, self.divergence.parameters()
        return (name, settings) if self.approach is None else self.approach.divergence(name, settings)

    @property
    def needs_difficulty(self) -> bool:
        """Whether any term reads the per-token difficulty."""
        return self.curriculum is not None or self.temperature is not None or self.features is not None

    @property
    def reads_difficulty(self) -> bool:
        """Whether the numbers depend on it: those of features on all tokens or on random ones do not."""
        others = self.curriculum is not None or self.temperature is not None
        return others or (self.features is not None and self.features.tokens in ("hard", "easy"))

    @property
    def needs_signals(self) -> bool:
        """Whether the arm reads the teacher signal store."""
        return self.divergence is not None or self.needs_difficulty

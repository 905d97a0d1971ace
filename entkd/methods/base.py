"""What every published alternative answers: settings, what it needs, and what it makes of a step's tokens.

An approach acts on the divergence term, in one or more of these ways, and each has a default that does nothing:

    factors             weights and temperatures of tokens, from statistics of the outputs
    teacher_share       t of a teacher mixed with the student
    temperature         one temperature of all tokens, moved by the derivative of the loss
    divergence          a divergence of its own

State is a dictionary of scalars on the device of the run. It is part of the resume state, and nothing reads it on the
host during a step.

Shapes: N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from entkd.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from entkd.config.method import Method

Problem = tuple[str, str]
"""Key of the method's settings, and why it does not fit together with the approach, with the remedy."""


@dataclass(frozen=True)
class Tokens:
    """The tokens that `Approach.factors` looks at: of a micro-batch, or of the global batch of a step."""

    statistics: dict[str, Tensor]
    """Name → (N,), as in ``entkd.closeness.linear_statistics``."""
    document_N: Tensor
    """Ascending number of each token's document."""
    positions: int
    """Tokens of the global batch."""
    selected: int
    """What `Approach.selected` said of the global batch."""
    vocab_size: int
    """V."""


@dataclass(frozen=True)
class Factors:
    """What an approach gives every token; None is 1."""

    weight_N: Tensor | None = None
    """Factor of the token's divergence. The loss is still divided by the global number of tokens, so that a mean over
    fewer tokens has larger weights."""
    temperature_N: Tensor | None = None
    """Softmax temperature."""
    distance_slope_N: Tensor | None = None
    """dL/ds of the token's Hellinger distance s, times the denominator of L; set where `Approach.moves_temperature`."""


class Approach(Settings):
    """A published way to weigh, select or soften tokens. Subclasses state ``name``, ``version`` and `citation`."""

    citation: ClassVar[str]
    """Authors, year, arXiv id."""
    terms: ClassVar[tuple[str, ...]] = ()
    """Further sums that the loss must report: ``target_cross_entropy``, ``temperature_gradient``."""

    own_terms: ClassVar[Callable[..., tuple[Tensor, Tensor]] | None] = None
    """f and a of a divergence Σ_v f(p_v, q_v) of its own, as ``entkd.kernels.TERMS`` has them. It has the approach's
    name, which `divergence` then returns with the settings that the function takes."""

    name: str
    """Which approach."""

    @property
    def statistics(self) -> tuple[str, ...]:
        """What `factors` reads, by the names of ``entkd.closeness.STATISTICS``. Finding it costs a second projection of
        the tokens, without gradient."""
        return ()

    @property
    def entropy_temperature(self) -> float:
        """Temperature of the entropies among the statistics."""
        return 1.0

    @property
    def needs_distribution(self) -> bool:
        """Whether it needs the teacher's whole distribution, which sparse signals do not hold."""
        return True

    @property
    def scope(self) -> Literal["micro", "batch"]:
        """Whether `factors` may see micro-batches one by one (documents are never cut), or needs the global batch."""
        return "micro"

    @property
    def moves_temperature(self) -> bool:
        """Whether gradients flow through the temperatures of `factors` into ``hellinger``, their statistic. The
        divergence must then be one of the two KLs, and the tokens are projected a third time."""
        return False

    def problems(self, method: Method) -> Iterator[Problem]:
        """What of the method does not fit together with this approach."""
        yield from ()

    def state(self) -> dict[str, float]:
        """Scalars that change during the run, at its start."""
        return {}

    def divergence(self, name: str, settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Name and settings of the divergence that is trained, given the method's."""
        return name, settings

    def contains_reverse_kl(self, of_divergence: bool) -> bool:
        """Whether `divergence` holds a KL(q‖p), which is infinite where the teacher gives a token probability 0, given
        whether the method's does."""
        return of_divergence

    def selected(self, lengths: Sequence[int]) -> int:
        """Denominator of `factors`, such as the tokens of the global batch that keep a weight, given the response
        lengths of its documents. Known before the forward pass, so that micro-batches have one denominator."""
        return sum(lengths)

    def factors(self, tokens: Tokens, state: dict[str, Tensor]) -> Factors:
        """Weights and temperatures; called where there are `statistics`. Leaves ``state`` as it is."""
        return Factors()

    def teacher_share(self, state: dict[str, Tensor]) -> Tensor | None:
        """t of the mixed teacher, a scalar in (0, 1], or None."""
        return None

    def temperature(self, state: dict[str, Tensor]) -> Tensor | None:
        """The temperature of all tokens, a scalar, or None."""
        return None

    def end_step(self, state: dict[str, Tensor], terms: Mapping[str, Tensor], step: int, steps: int) -> None:
        """Change ``state`` in place after step number ``step``, counted from 0, of ``steps``.

        ``terms`` are those of the loss, each divided by the tokens of the global batch: ``kd``, and what `terms` names.
        """

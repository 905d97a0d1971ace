"""Settings of the teacher signals, and what arms need that they do not keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from entkd.config.method import Method
from entkd.settings import Settings, Sparing


class SignalFeatures(Settings):
    """Whose hidden states are stored for the feature loss of arms."""

    points: int = Field(3, ge=1)
    """Teacher layers at 1/points, 2/points, ... of the depth. Arms may use any divisor of it."""
    tokens: Literal["hard", "all"] = "hard"
    """Tokens with d > threshold, or all of them. Arms with other than hard tokens need all."""
    threshold: float = Field(0.8, ge=0, le=1)
    """Tokens with d above it are stored. Arms may use this threshold or a higher one."""


class SparseSignals(Settings):
    """What `mode: sparse` keeps of each training token: 6 bytes × (top_k + samples)."""

    top_k: int = Field(32, ge=1)
    """Most probable tokens, kept with their probabilities."""
    samples: int = Field(32, ge=1, le=2048)
    """Draws from all other tokens. More make the loss less noisy; the expected gradient is exact with any number."""


class Signals(Sparing):
    """What is stored of the teacher's outputs. Changing it runs the teacher again and retrains what reads it."""

    mode: Literal["hidden", "logprobs", "sparse"] = "hidden"
    """`hidden`: the last hidden state in bf16, from which logits are recomputed exactly through the head; 2 bytes × the
    teacher's width per token. `logprobs`: besides it, all log-probabilities in fp16; 2 bytes × the vocabulary per token
    on disk instead of a product with the head in every step, which pays on a CPU. `sparse`: of training tokens only
    the most probable next tokens and an unbiased sample of the others, for `forward_kl` at temperature 1 alone; small
    for wide teachers, at the price of a noisier gradient."""
    sparse: SparseSignals | None = None
    """Size of `mode: sparse`, its defaults where left out; of no other mode."""
    features: SignalFeatures | None = SignalFeatures()
    """Hidden states for the feature loss; null stores none. Stated here, not taken from the arms, so that editing one
    arm never touches what the other arms read."""
    calibration_tokens: int = Field(16384, ge=16)
    """Response tokens of the training split over which the difficulty's CDF is fitted."""
    shard_tokens: int = Field(65536, ge=16)
    """Response tokens in a shard; an interrupted run continues at the last whole one."""
    batch_tokens: int = Field(4096, ge=8)
    """Tokens in one forward pass of the teacher."""

    @model_validator(mode="before")
    @classmethod
    def _sparse_has_a_size(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("mode") == "sparse" and values.get("sparse") is None:
            return {**values, "sparse": SparseSignals()}
        return values

    @model_validator(mode="after")
    def _size_is_of_sparse(self) -> Signals:
        if self.sparse is not None and self.mode != "sparse":
            raise ValueError(f"`sparse` means nothing with `mode: {self.mode}`; remove it or set `mode: sparse`")
        return self

    def left_out(self) -> set[str]:
        """Not the key that the mode has no use for: stores of other modes keep the content key that they had before
        there was one, and no teacher runs again for it."""
        return {"sparse"} if self.sparse is None else set()


def lacking_signals(method: Method, signals: Signals) -> Iterator[tuple[str, str]]:
    """What a method needs and a store of these settings does not keep: the method's key, and why, with the remedy."""
    if signals.mode == "sparse":
        yield from lacking_distribution(method)
    yield from _lacking_features(method, signals.features)


def lacking_distribution(method: Method) -> Iterator[tuple[str, str]]:
    """What a method needs that a sparse target does not hold: a sample of p at T = 1 gives what is linear in p without
    bias, and nothing else."""
    divergence, temperature = method.divergence, method.temperature
    if divergence is not None and divergence.name != "forward_kl":
        yield (
            "divergence",
            f"{divergence.name} needs the teacher's whole distribution, and `signals.mode: sparse` keeps a sample that "
            "serves forward_kl alone; set `signals.mode: hidden`, or use forward_kl",
        )
    if method.approach is not None and method.approach.needs_distribution:
        yield (
            "approach",
            f"{method.approach.name} needs the teacher's whole distribution, and `signals.mode: sparse` keeps a "
            "sample; set `signals.mode: hidden`",
        )
    if temperature is not None and (temperature.base, temperature.c) != (1.0, 0.0):
        yield (
            "temperature",
            f"base {temperature.base:g} with c {temperature.c:g} needs the teacher's whole distribution, and "
            "`signals.mode: sparse` keeps a sample at temperature 1 alone; set `signals.mode: hidden`, or remove "
            "temperature",
        )
    if method.needs_difficulty and method.difficulty.source == "initial_kl":
        yield (
            "difficulty.source",
            "initial_kl needs the teacher's whole distribution, and `signals.mode: sparse` keeps a sample of it; set "
            "`signals.mode: hidden`, or use another source",
        )
    if method.on_policy is not None:
        yield (
            "on_policy",
            f"{method.on_policy.name} meets the teacher's whole distribution on the student's text and a sample of it "
            "on the data, which are not one loss; set `signals.mode: hidden`, or remove on_policy",
        )


def _lacking_features(method: Method, stored: SignalFeatures | None) -> Iterator[tuple[str, str]]:
    """What the feature loss needs and the store does not keep."""
    wanted = method.features
    if wanted is None:
        return
    if stored is None:
        yield "features", "needs hidden states, and signals.features is null; set `signals: {features: {}}`"
        return
    if wanted.layers is None and stored.points % wanted.points:
        yield "features.points", f"{wanted.points} does not divide signals.features.points {stored.points}; change one"
    if stored.tokens == "all":
        return
    difficulty = method.difficulty
    if wanted.tokens != "hard":
        yield "features.tokens", f"{wanted.tokens} needs `signals.features.tokens: all`"
    elif difficulty.source != "teacher_entropy":
        yield "features", f"hard tokens by difficulty.source {difficulty.source} need `signals.features.tokens: all`"
    elif difficulty.scale != "rank":
        yield "features", f"hard tokens by difficulty.scale {difficulty.scale} need `signals.features.tokens: all`"
    elif wanted.lowest_threshold < stored.threshold:
        key = "threshold" if wanted.threshold == wanted.lowest_threshold else "threshold_end"
        yield (
            f"features.{key}",
            f"{wanted.lowest_threshold} is below signals.features.threshold {stored.threshold}, under which no hidden "
            f"states are stored; set `signals.features.threshold: {wanted.lowest_threshold}`",
        )

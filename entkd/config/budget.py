"""A budget of a training run: what it may spend, where the number of steps follows from it."""

from __future__ import annotations

from pydantic import Field, model_validator

from entkd.settings import Settings

BUDGETS = ("tokens", "tflops", "seconds")


class Budget(Settings):
    """What every run may spend. Exactly one of the three; a run takes as many whole steps as fit into it."""

    tokens: int | None = Field(None, ge=1)
    """Response tokens trained on, the table's `tokens`."""
    tflops: float | None = Field(None, gt=0)
    """Analytic TFLOPs of the run, the table's `tflops`: an arm whose steps cost more takes fewer of them."""
    seconds: float | None = Field(None, gt=0)
    """Seconds of training steps. A job of its own times a few steps of each arm and writes their number to
    `budget/{arm}.json`; the training takes exactly that many. Start, evaluations and saving come on top."""

    @model_validator(mode="after")
    def _one_kind(self) -> Budget:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(BUDGETS)}; here are {' and '.join(given) or 'none'}")
        return self

    @property
    def words(self) -> str:
        """`7 TFLOPs`, `20,000 tokens` or `60 seconds`."""
        if self.tokens is not None:
            return f"{self.tokens:,} tokens"
        return f"{self.tflops:g} TFLOPs" if self.tflops is not None else f"{self.seconds:g} seconds"

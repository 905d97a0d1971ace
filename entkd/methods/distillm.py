"""DistiLLM's adaptive off-policy use of student text (Ko et al., arXiv 2402.03898, section 3.2, Algorithm 1).

Its loss is a skew KL (`divergence: skew_kl` or `skew_reverse_kl`); this module holds the schedule. φ is the probability
that a step trains on text that a student wrote, t of T the step (counted from 1), r ~ U(0, 1) its draw:

    λ_R = φ (1 − t/T)
    r < λ_R, or r < φ and the buffer is not ready    the student writes, and what it writes enters the buffer
    r < φ otherwise                                  documents drawn from the buffer, without replacement
    else                                             the data

    φ ← min(1, φ + share_step)  after an evaluation whose dev loss is loss_tolerance or more above the reference

The buffer drops its oldest document for a new one. Paper and released code differ, and ``variant`` chooses:

- `authors`: what the student writes is trained on at once; the buffer is ready when it is full; the reference is the
  loss at the last rise, at first that before training. So φ never rises where the dev loss falls far below that of an
  untrained student; the release starts from a fine-tuned one. `replay` has the choices of the release.
- `paper`: a step on student text always draws from the buffer, after the new text has entered it; the buffer is ready
  when it holds as many documents as the step needs; the reference is the evaluation before, and the loss has to be
  above it by more than the tolerance.

Imports no torch.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from entkd.settings import Settings

Source = Literal["data", "written", "replayed"]
"""Where the responses of a step come from."""


class DistiLLM(Settings):
    """An adaptive share φ of the steps trains on the student's text, much of it from a buffer (DistiLLM, arXiv
    2402.03898, section 3.2)."""

    citation: ClassVar[str] = "DistiLLM, 2024, arXiv 2402.03898"

    name: Literal["distillm"] = "distillm"
    """Which schedule of the student's text."""
    share: float = Field(0.0, ge=0, le=1)
    """φ before the first rise: the probability that a step trains on student text. The release begins at 0, with a
    fine-tuned student; an untrained one needs more, or its φ stays 0."""
    share_step: float = Field(0.1, gt=0, le=1)
    """What φ rises by."""
    loss_tolerance: float = Field(0.1, ge=0)
    """φ rises where the dev loss, in nats, is so much above the reference."""
    replay: Literal["decreasing", "constant", "increasing"] = "decreasing"
    """λ_R/φ, the share of newly written text: 1 − t/T, one half, or t/T."""
    capacity: int = Field(1000, ge=1)
    """Documents in the buffer; at least as many as a step has."""
    variant: Literal["authors", "paper"] = "authors"
    """As the released code, or as the paper's Algorithm 1: they differ in what a step on new text trains on, and in the
    loss that the dev loss is compared with."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature of the student's text."""
    max_response_tokens: int = Field(128, ge=1)
    """Longest response that the student writes; a shorter one where the block would be too short."""
    version: Literal[1] = 1
    """Version of the formula."""

    def source(self, draw: float, share: float, progress: float, held: int, wanted: int) -> Source:
        """Where the responses of a step come from.

        Parameters
        ----------
        draw
            r, uniform in [0, 1).
        share
            φ.
        progress
            t/T in (0, 1].
        held, wanted
            Documents in the buffer, and in the step.
        """
        newly = {"decreasing": 1 - progress, "constant": 0.5, "increasing": progress}[self.replay]
        ready = held >= (self.capacity if self.variant == "authors" else wanted)
        if draw < share * newly or (draw < share and not ready):
            return "written"
        return "replayed" if draw < share else "data"

    def evaluated(self, loss: float, share: float, reference: float) -> tuple[float, float]:
        """φ and the reference after an evaluation with this dev loss, in nats."""
        risen = min(1.0, share + self.share_step)
        if self.variant == "paper":
            return risen if loss > reference + self.loss_tolerance else share, loss
        return (risen, loss) if loss >= reference + self.loss_tolerance else (share, reference)

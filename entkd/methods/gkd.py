"""GKD: on-policy distillation (Agarwal et al., arXiv 2306.13649, equation of L_GKD and Algorithm 1).

    L = (1 − λ) E_{(x, y) ~ data} [ D(p‖q)(y|x) ]  +  λ E_{x ~ data, y ~ q(·|x)} [ D(p‖q)(y|x) ]

D is any divergence per token, p the teacher, q the student. Each step draws u ~ U(0, 1): with u < λ the student writes
the responses to the step's prompts, otherwise those of the data are taken. No gradient flows through the sampling.
λ = 0 is distillation on the data, λ = 1 is purely on-policy. Imports no torch.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from entkd.settings import Settings


class GKD(Settings):
    """A fixed share λ of the steps trains on text that the student writes (GKD, arXiv 2306.13649, Algorithm 1)."""

    citation: ClassVar[str] = "GKD, 2023, arXiv 2306.13649"

    name: Literal["gkd"] = "gkd"
    """Which schedule of the student's text."""
    share: float = Field(0.5, ge=0, le=1)
    """λ, the probability that a step trains on the student's own text; 0 is the data alone."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature of the student's text."""
    max_response_tokens: int = Field(128, ge=1)
    """Longest response that the student writes; a shorter one where the block would be too short."""
    version: Literal[1] = 1
    """Version of the formula."""

    def writes(self, draw: float) -> bool:
        """Whether the student writes the text of a step that drew ``draw``, uniform in [0, 1)."""
        return draw < self.share

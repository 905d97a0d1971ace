"""Score a model: lm-eval tasks and fidelity to the teacher."""

from entkd.score.stage import score

__all__ = ["score"]

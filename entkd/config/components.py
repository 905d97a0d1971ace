"""Settings of the three components, and of the difficulty that they read.

Names, formulas and defaults follow ``docs/method.md``, sections 1 to 4. Keys that came later are left out of what is
written where they are at their default: an arm that does not use them keeps its results.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from entkd.settings import Settings, Sparing

Source = Literal[
    "teacher_entropy",
    "permuted",
    "permuted_within",
    "unigram",
    "label_nll",
    "initial_kl",
    "initial_student_entropy",
]
ENTROPIES = ("teacher_entropy", "permuted", "permuted_within", "initial_student_entropy")
"""Sources that are entropies, at most log V."""
OF_STUDENT = ("initial_kl", "initial_student_entropy")
"""Sources that one pass of the untrained student gives."""


class Difficulty(Sparing):
    """What makes a token hard, as d in [0, 1]. Used only where a component needs d."""

    source: Source = "teacher_entropy"
    """The entropy of the teacher's prediction. Controls without its knowledge: `permuted` deals the same difficulties
    anew to all training tokens, `permuted_within` to those of each sequence, for each seed in another way. Other
    notions of a hard token: `unigram` is −log of its label's share of the training responses, `label_nll` is −log
    p_T(label), `initial_kl` and `initial_student_entropy` are KL(p‖q) and the entropy of q of the untrained student."""
    scale: Literal["rank", "logv", "minmax"] = "rank"
    """Mid-rank empirical CDF (of the teacher's entropy over a calibration sample, of other sources over all training
    tokens), H / log V (of entropies only), or min-max within a sequence."""
    version: Literal[1] = 1
    """Version of the formula."""

    @model_validator(mode="after")
    def _log_v_is_of_entropies(self) -> Difficulty:
        if self.scale == "logv" and self.source not in ENTROPIES:
            raise ValueError(f"scale logv divides an entropy by log V, and {self.source} is none; use rank or minmax")
        return self

    @property
    def of_student(self) -> bool:
        """Whether the untrained student has to be asked."""
        return self.source in OF_STUDENT

    def left_out(self) -> set[str]:
        """Keys that are not written."""
        return {"source"} if self.source == "teacher_entropy" else set()


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

    def idle(self) -> dict[str, str]:
        key = "kappa" if self.shape == "window" else "window"
        return {key: f"shape: {self.shape}"}

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


Layer = Annotated[int, Field(ge=0)]


class Features(Sparing):
    """Hidden-state distillation on hard tokens, on top of the logits loss."""

    weight: float = Field(0.5, gt=0)
    """λ, the weight of the feature term in the total loss."""
    threshold: float = Field(0.8, ge=0, le=1)
    """θ: tokens with d > θ are hard. For `random` and `easy` the same share 1 − θ of tokens is used."""
    threshold_end: float | None = Field(None, ge=0, le=1)
    """θ at the end of the run: θ moves there linearly in the progress u, which `curriculum.progress` measures (without
    a curriculum it is `lr`). null holds θ."""
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
    layers: tuple[tuple[Layer, Layer], ...] | None = Field(None, min_length=1)
    """Layer pairs `[student, teacher]` in place of `points`, counted from 0. The teacher's have to be among those that
    the signals store."""
    version: Literal[1] = 1
    """Version of the formula."""

    @model_validator(mode="after")
    def _one_choice_of_layers(self) -> Features:
        if self.layers is not None and "points" in self.model_fields_set:
            raise ValueError("points and layers both choose the layer pairs; keep one (`points: null` removes it)")
        if self.layers is not None and len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers: {[list(pair) for pair in self.layers]} names a pair twice")
        return self

    def idle(self) -> dict[str, str]:
        of_tokens = dict.fromkeys(("threshold", "threshold_end"), "tokens: all") if self.tokens == "all" else {}
        of_pairs = {"layers": "points"} if self.layers is None else {"points": "layers"}
        return of_tokens | of_pairs | ({"projector_lr": "projector: identity"} if self.projector == "identity" else {})

    @property
    def lowest_threshold(self) -> float:
        """The smallest θ of the run."""
        return self.threshold if self.threshold_end is None else min(self.threshold, self.threshold_end)

    def left_out(self) -> set[str]:
        """Keys that are not written."""
        unused = {key for key in ("threshold_end", "layers") if getattr(self, key) is None}
        return unused if self.layers is None else unused | {"points"}

"""Cross-entropy and every divergence, alone and with all components, through the real objective, beside references."""

from __future__ import annotations

import numpy as np
import pytest
from references import components as ref

from entkd.config import DIVERGENCE_NAMES, Method
from methods.cases import LENGTHS, PROGRESS, TEACHER_WIDTH, WIDTH, Identity, V, logits, step

POINTS = 3
FULL = {"curriculum": {}, "temperature": {}, "features": {"points": POINTS}}
CASES = {"sft": {"ce": {}}} | {
    name + suffix: {"divergence": name, **components}
    for name in DIVERGENCE_NAMES
    for suffix, components in (("", {}), ("_full", FULL))
}
ROWS = {"sft": ["sft", "seqkd"], "forward_kl": ["forward_kl", "kd"]}
"""SeqKD is cross-entropy on other text, ``kd`` is the name of forward KL."""
ORIGINS = {
    "sft": "cross-entropy by its definition",
    "forward_kl": "Hinton et al. 1503.02531",
    "reverse_kl": "MiniLLM 2306.08543, per token",
    "jsd": "GKD 2306.13649",
    "skew_kl": "DistiLLM 2402.03898",
    "skew_reverse_kl": "DistiLLM 2402.03898",
    "adaptive_kl": "AKL 2404.02657, authors' head",
    "alpha_beta": "ABKD 2505.04560",
    "todi": "ToDi 2505.16297",
    "tvd": "total variation by its definition",
}
GOLDEN: dict[tuple[str, tuple[int, ...]], float] = {
    ("sft", (1,)): 3.201041902596,
    ("forward_kl", (1,)): 0.3291387463998,
    ("forward_kl_full", (1, 1, 1, 1)): 0.7832461617795,
    ("reverse_kl", (1,)): 0.4423746090921,
    ("reverse_kl_full", (1, 1, 1, 1)): 0.8544500439691,
    ("jsd", (1,)): 0.08226198492022,
    ("jsd_full", (1, 1, 1, 1)): 0.5491886198342,
    ("skew_kl", (1,)): 0.259036885942,
    ("skew_kl_full", (1, 1, 1, 1)): 0.7168889707401,
    ("skew_reverse_kl", (1,)): 0.2870489396554,
    ("skew_reverse_kl_full", (1, 1, 1, 1)): 0.7334828790867,
    ("adaptive_kl", (1,)): 0.3910541519084,
    ("adaptive_kl_full", (1, 1, 1, 1)): 0.8249896568613,
    ("alpha_beta", (1,)): 0.5066487366061,
    ("alpha_beta_full", (1, 1, 1, 1)): 0.9184368287402,
    ("todi", (1,)): 0.7715133554919,
    ("todi_full", (1, 1, 1, 1)): 1.1650143408,
    ("tvd", (1,)): 0.308244537661,
    ("tvd_full", (1, 1, 1, 1)): 0.8256055524961,
}
"""By name and the versions of its parts; computed by ``references.components``."""


class Problem:
    """Numbers of one seed, the reference's loss, and its gradients by logits, hidden states and projectors."""

    def __init__(self, seed: int) -> None:
        draw = np.random.default_rng(100 + seed)
        n = sum(LENGTHS)
        self.student, self.teacher = logits(seed)
        self.labels = draw.integers(0, V, n)
        self.states = draw.normal(size=(POINTS, n, WIDTH))
        self.targets = draw.normal(size=(POINTS, n, TEACHER_WIDTH))

    def ours(self, patch: dict) -> tuple[float, list[np.ndarray], list[np.ndarray]]:
        """Loss, gradients, and the projectors as they were."""
        model = Identity(self.student, self.states)
        terms, objective = step(
            model,
            self.teacher,
            Method.model_validate(patch),
            None,
            self.labels,
            self.targets if "features" in patch else (),
        )
        projectors = list(objective.projectors.parameters()) if "features" in patch else []
        found = [model.hidden, *(model.states if projectors else ()), *projectors]
        return terms["loss"], [p.grad.numpy() for p in found], [p.detach().numpy() for p in projectors]

    def reference(self, patch: dict, projectors: list[np.ndarray]) -> tuple[float, list[np.ndarray]]:
        if "divergence" not in patch:
            value, by_logits = ref.cross_entropy(self.student, self.labels)
            return value, [by_logits]
        d = ref.difficulties(self.teacher)
        factors = (ref.curriculum(d, PROGRESS), ref.temperatures(d)) if "curriculum" in patch else ()
        value, by_logits = ref.distillation(patch["divergence"], self.student, self.teacher, *factors)
        if not projectors:
            return value, [by_logits]
        further, by_state, by_projector = ref.features(self.states, self.targets, projectors, d)
        return value + 0.5 * further, [by_logits, *(0.5 * slope for slope in (*by_state, *by_projector))]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient(name: str, seed: int, evidence) -> None:
    problem = Problem(seed)
    loss, gradients, projectors = problem.ours(CASES[name])
    expected, slopes = problem.reference(CASES[name], projectors)
    assert all(np.abs(slope).max() > 1e-4 for slope in slopes)
    error = max(float(np.abs(a - b).max()) for a, b in zip(gradients, slopes, strict=True))
    assert abs(loss - expected) < (1e-8 if projectors else 1e-11)  # the difficulty is fp32
    assert error < 1e-8  # of central differences
    base = name.removesuffix("_full")
    assert base in ORIGINS, f"ORIGINS does not say where the reference of {base} is from; add a line"
    for row in ROWS.get(name, [name]):
        evidence(row, "loss", abs(loss - expected))
        evidence(row, "gradient", error)
        if row != "seqkd":
            evidence(row, "reference", ORIGINS[base] + "; components by docs/method.md" * name.endswith("_full"))


@pytest.mark.parametrize("name", CASES)
def test_golden_values(name: str, evidence) -> None:
    """A change means another formula: raise ``version`` of the part that changed and add a line."""
    method = Method.model_validate(CASES[name])
    parts = [method.divergence, method.ce, method.curriculum, method.temperature, method.features]
    versions = tuple(part.version for part in parts if part is not None)
    problem = Problem(0)
    value, _, projectors = problem.ours(CASES[name])
    line = f'("{name}", {versions}): {problem.reference(CASES[name], projectors)[0]:.13g},'
    assert (name, versions) in GOLDEN, f"GOLDEN has no value of these versions; the reference says {line}"
    assert value == pytest.approx(GOLDEN[name, versions], rel=1e-8)
    for row in ROWS.get(name, [name]):
        evidence(row, "golden", f"{GOLDEN[name, versions]:.12g}")

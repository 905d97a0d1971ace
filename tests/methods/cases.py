"""Every approach at the output projection alone, in fp64, beside its independent reference.

Hidden states are the logits themselves (the projection is the identity), so that references see the same numbers and
gradients by logits can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from references import methods as ref
from torch import nn

from entkd.config import Method
from entkd.data.packing import Batch
from entkd.distill import objective as module
from entkd.distill.approach import response_lengths
from entkd.distill.objective import MicroBatch, Objective

LENGTHS, V = (7, 12, 5), 11


class Identity(nn.Module):
    """A student whose last hidden states are parameters and whose output projection is the identity."""

    def __init__(self, logits_ND: np.ndarray) -> None:
        super().__init__()
        self.hidden = nn.Parameter(torch.tensor(logits_ND))
        self.head = nn.Linear(V, V, bias=False, dtype=torch.float64)
        self.head.weight = nn.Parameter(torch.eye(V, dtype=torch.float64), requires_grad=False)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


def logits(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Of student and teacher, (N, V)."""
    draw = np.random.default_rng(seed)
    teacher = draw.normal(size=(sum(LENGTHS), V)) * draw.uniform(0.5, 4, size=(sum(LENGTHS), 1))
    return teacher * 0.6 + draw.normal(size=teacher.shape), teacher


def by_document(rows: np.ndarray) -> list[np.ndarray]:
    return np.split(rows, np.cumsum(LENGTHS)[:-1])


def ours(
    student: np.ndarray,
    teacher: np.ndarray,
    approach: dict | str,
    state: dict[str, float] | None = None,
    divergence: str = "forward_kl",
    **more: object,
) -> tuple[dict[str, float], np.ndarray, Objective]:
    """Terms of the loss, gradient by the student's logits, and the objective."""
    method = Method.model_validate({"divergence": divergence, "approach": approach} | more)
    model = Identity(student)
    objective = Objective(model, method, V)
    for name, value in (state or {}).items():
        objective.approach.values[name].fill_(value)
    n = sum(LENGTHS)
    position_ids_BL = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    index_N = torch.arange(n)
    batch = Batch(torch.zeros(1, n, dtype=torch.long), position_ids_BL, index_N, torch.zeros_like(index_N), index_N)
    original = module.trunk_forward
    module.trunk_forward = lambda *_, **__: (model.hidden[None], {})
    try:
        selected = method.approach.selected(response_lengths([batch]))
        losses = objective(MicroBatch(batch, torch.tensor(teacher)), n, 0, selected=selected)
    finally:
        module.trunk_forward = original
    losses["loss"].backward()
    return {name: value.item() for name, value in losses.items()}, model.hidden.grad.numpy(), objective


@dataclass(frozen=True)
class Case:
    """An approach, and its loss by the reference as a function of the student's logits."""

    approach: dict
    origin: str
    """Where the reference's formula is from."""
    loss: Callable[[np.ndarray, np.ndarray, np.ndarray], float]
    """(student, teacher, frozen student) → loss; what carries no gradient is taken at the frozen logits."""
    state: dict[str, float] | None = None
    divergence: str = "forward_kl"


def _sekd(by: str, average: str) -> Callable[[np.ndarray, np.ndarray, np.ndarray], float]:
    def loss(student: np.ndarray, teacher: np.ndarray, frozen: np.ndarray) -> float:
        del frozen  # the selection does not move with small changes
        return ref.sekd_loss(by_document(student), by_document(teacher), by=by, average=average)

    return loss


CASES = {
    "adakd": Case(
        {"name": "adakd"},
        "AdaKD eq. 2-10, release",
        lambda s, t, f: ref.adakd_loss(s, t, 0.62, "reverse_kl", frozen=f),
        {"share": 0.62},
        "reverse_kl",
    ),
    "adakd_latf": Case(
        {"name": "adakd", "parts": "focusing"},
        "AdaKD eq. 4-5, release",
        lambda s, t, f: ref.adakd_loss(s, t, 0.3, "forward_kl", c=0.0, frozen=f),
        {"share": 0.3},
    ),
    "adakd_idts": Case(
        {"name": "adakd", "parts": "tempering"},
        "AdaKD eq. 9-10",
        lambda s, t, f: ref.adakd_loss(s, t, 1.0, "forward_kl", frozen=f),
    ),
    "sekd": Case({"name": "sekd"}, "SE-KD eq. 6, release's mean", _sekd("student", "positions")),
    "sekd_paper": Case({"name": "sekd", "variant": "paper"}, "SE-KD eq. 4-6", _sekd("student", "sequences")),
    "sekd_teacher": Case({"name": "sekd", "by": "teacher"}, "SE-KD section 5", _sekd("teacher", "positions")),
    "eakd": Case({"name": "eakd"}, "EA-KD release", lambda s, t, f: ref.eakd_loss(s, t, frozen=f)),
    "eakd_mean": Case(
        {"name": "eakd", "normalise": "mean"},
        "EA-KD, weights of mean 1",
        lambda s, t, f: ref.eakd_loss(s, t, normalise=True, frozen=f),
    ),
    "bdkd": Case({"name": "bdkd"}, "BD-KD as ported", lambda s, t, f: ref.bdkd_loss(s, t)),
    "bdkd_mean": Case(
        {"name": "bdkd", "scale": "mean"}, "BD-KD as ported, / 4", lambda s, t, f: ref.bdkd_loss(s, t, divide=True)
    ),
    "taid": Case({"name": "taid"}, "TAID eq. of p_t", lambda s, t, f: ref.taid_loss(s, t, 0.55, frozen=f), {"t": 0.55}),
    "ctkd": Case(
        {"name": "ctkd"},
        "CTKD release",
        lambda s, t, f: ref.ctkd_loss(s, t, ref.ctkd_temperature(-1.2)),
        {"theta": -1.2},
    ),
    "ctkd_reverse": Case(
        {"name": "ctkd"},
        "CTKD release, on reverse KL",
        lambda s, t, f: ref.ctkd_loss(s, t, ref.ctkd_temperature(-3.0), name="reverse_kl"),
        {"theta": -3.0},
        "reverse_kl",
    ),
}


def errors(case: Case, seed: int = 0) -> tuple[float, float, float]:
    """Our loss, and the largest errors of loss and of gradient by the logits."""
    student, teacher = logits(seed)
    terms, gradient, _ = ours(student, teacher, case.approach, case.state, case.divergence)
    expected = case.loss(student, teacher, student)
    slope = ref.difference(lambda moved: case.loss(moved, teacher, student), student)
    return terms["loss"], abs(terms["loss"] - expected), float(np.abs(gradient - slope).max())

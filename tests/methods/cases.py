"""Every approach at the output projection alone, in fp64, beside its independent reference.

Hidden states are the logits themselves (the projection is the identity), so that references see the same numbers and
gradients by logits can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import torch
from references import methods as ref
from torch import nn

from entkd.components import token_plan
from entkd.config import Method
from entkd.data.packing import Batch
from entkd.distill import objective as module
from entkd.distill.approach import response_lengths
from entkd.distill.micro_batch import MicroBatch
from entkd.distill.objective import Objective
from entkd.entropy import Difficulty, token_entropy

LENGTHS, V = (7, 12, 5), 11
WIDTH, TEACHER_WIDTH, PROGRESS = 8, 6, 0.8


class Identity(nn.Module):
    """A student whose last hidden states are parameters and whose output projection is the identity.

    ``states_PND``: hidden states after its P layers, parameters too.
    """

    def __init__(self, logits_NV: np.ndarray, states_PND: np.ndarray | tuple[()] = ()) -> None:
        super().__init__()
        self.hidden = nn.Parameter(torch.tensor(logits_NV))
        self.states = nn.ParameterList(nn.Parameter(torch.tensor(states_ND)) for states_ND in states_PND)
        self.config = SimpleNamespace(num_hidden_layers=len(states_PND), hidden_size=WIDTH)
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


def step(
    model: Identity,
    teacher_NV: np.ndarray,
    method: Method,
    state: dict[str, float] | None = None,
    labels_N: np.ndarray | None = None,
    targets_PNE: np.ndarray | tuple[()] = (),
) -> tuple[dict[str, float], Objective]:
    """Terms of the loss of one step at `PROGRESS`, whose gradients are then in the model, and the objective.

    ``targets_PNE``: the teacher's hidden states of each layer pair.
    """
    objective = Objective(model, method, V, teacher_width=TEACHER_WIDTH, generator=torch.Generator().manual_seed(0))
    objective = objective.double()
    for name, value in (state or {}).items():
        objective.approach.values[name].fill_(value)
    n = sum(LENGTHS)
    position_ids_BL = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    index_N = torch.arange(n)
    labels_N = torch.zeros_like(index_N) if labels_N is None else torch.tensor(labels_N)
    batch = Batch(torch.zeros(1, n, dtype=torch.long), position_ids_BL, index_N, labels_N, index_N)
    teacher_NV = torch.tensor(teacher_NV)
    entropy_N = token_entropy(teacher_NV)
    plan = token_plan(Difficulty.fit(entropy_N)(entropy_N), PROGRESS, method)
    hard_H = None if plan.features_N is None else plan.features_N.nonzero()[:, 0]
    targets = tuple(torch.tensor(targets_NE)[hard_H] for targets_NE in targets_PNE)
    micro = MicroBatch(batch, teacher_NV, plan.weight_N, plan.temperature_N, hard_H, targets)
    captured = dict(enumerate(model.states))
    original = module.packed_states
    module.packed_states = lambda *_, **__: (model.hidden, captured)
    try:
        selected = 0 if method.approach is None else method.approach.selected(response_lengths([batch]))
        losses = objective(micro, n, plan.summary["hard"], selected=selected)
    finally:
        module.packed_states = original
    losses["loss"].backward()
    return {name: value.item() for name, value in losses.items()}, objective


def ours(
    student: np.ndarray,
    teacher: np.ndarray,
    approach: dict | str,
    state: dict[str, float] | None = None,
    divergence: str = "forward_kl",
) -> tuple[dict[str, float], np.ndarray, Objective]:
    """Terms of the loss of an approach, gradient by the student's logits, and the objective."""
    model = Identity(student)
    terms, objective = step(
        model, teacher, Method.model_validate({"divergence": divergence, "approach": approach}), state
    )
    return terms, model.hidden.grad.numpy(), objective


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
        "AdaKD 2510.11615 eq. 2-10, release",
        lambda s, t, f: ref.adakd_loss(s, t, 0.62, "reverse_kl", frozen=f),
        {"share": 0.62},
        "reverse_kl",
    ),
    "adakd_forward": Case(
        {"name": "adakd"},
        "AdaKD 2510.11615 eq. 2-10, release, on forward KL",
        lambda s, t, f: ref.adakd_loss(s, t, 0.62, "forward_kl", frozen=f),
        {"share": 0.62},
    ),
    "adakd_release": Case(
        {"name": "adakd", "detach": False},
        "AdaKD 2510.11615 eq. 2-10, release's gradient through the temperatures",
        lambda s, t, f: ref.adakd_loss(s, t, 0.62, "reverse_kl"),
        {"share": 0.62},
        "reverse_kl",
    ),
    "adakd_latf": Case(
        {"name": "adakd", "parts": "focusing"},
        "AdaKD 2510.11615 eq. 4-7, release",
        lambda s, t, f: ref.adakd_loss(s, t, 0.3, "reverse_kl", c=0.0, frozen=f),
        {"share": 0.3},
        "reverse_kl",
    ),
    "adakd_idts": Case(
        {"name": "adakd", "parts": "tempering"},
        "AdaKD 2510.11615 eq. 9-10",
        lambda s, t, f: ref.adakd_loss(s, t, 1.0, "reverse_kl", frozen=f),
        divergence="reverse_kl",
    ),
    "sekd": Case({"name": "sekd"}, "SE-KD 2602.01395 eq. 6, release's mean", _sekd("student", "positions")),
    "sekd_paper": Case({"name": "sekd", "variant": "paper"}, "SE-KD 2602.01395 eq. 4-6", _sekd("student", "sequences")),
    "sekd_teacher": Case(
        {"name": "sekd", "by": "teacher"}, "SE-KD 2602.01395 section 5", _sekd("teacher", "positions")
    ),
    "eakd": Case({"name": "eakd"}, "EA-KD 2311.13621, release", lambda s, t, f: ref.eakd_loss(s, t, frozen=f)),
    "eakd_mean": Case(
        {"name": "eakd", "normalise": "mean"},
        "EA-KD 2311.13621, weights of mean 1",
        lambda s, t, f: ref.eakd_loss(s, t, normalise=True, frozen=f),
    ),
    "bdkd": Case({"name": "bdkd"}, "BD-KD 2212.12965 as ported", lambda s, t, f: ref.bdkd_loss(s, t)),
    "bdkd_mean": Case(
        {"name": "bdkd", "scale": "mean"},
        "BD-KD 2212.12965 as ported, / 4",
        lambda s, t, f: ref.bdkd_loss(s, t, divide=True),
    ),
    "taid": Case(
        {"name": "taid"},
        "TAID 2501.16937, p_t and Alg. 1, release",
        lambda s, t, f: ref.taid_loss(s, t, 0.55, frozen=f),
        {"t": 0.55},
    ),
    "taid_paper": Case(
        {"name": "taid", "variant": "paper"},
        "TAID 2501.16937, p_t and Alg. 1",
        lambda s, t, f: ref.taid_loss(s, t, 0.55, frozen=f),
        {"t": 0.55},
    ),
    "ctkd": Case(
        {"name": "ctkd"},
        "CTKD 2211.16231, release",
        lambda s, t, f: ref.ctkd_loss(s, t, ref.ctkd_temperature(-1.2)),
        {"theta": -1.2},
    ),
}
"""Rows of the page of evidence, each on the base divergence of its arm in config/experiments/baselines.yaml."""

FURTHER_LOOKS = {
    "adakd_release_forward": replace(
        CASES["adakd_release"],
        loss=lambda s, t, f: ref.adakd_loss(s, t, 0.62, "forward_kl"),
        divergence="forward_kl",
    ),
    "adakd_latf_forward": replace(
        CASES["adakd_latf"],
        loss=lambda s, t, f: ref.adakd_loss(s, t, 0.3, "forward_kl", c=0.0, frozen=f),
        divergence="forward_kl",
    ),
    "adakd_idts_forward": replace(
        CASES["adakd_idts"],
        loss=lambda s, t, f: ref.adakd_loss(s, t, 1.0, "forward_kl", frozen=f),
        divergence="forward_kl",
    ),
    "ctkd_reverse": replace(
        CASES["ctkd"],
        loss=lambda s, t, f: ref.ctkd_loss(s, t, ref.ctkd_temperature(-3.0), name="reverse_kl"),
        state={"theta": -3.0},
        divergence="reverse_kl",
    ),
}
"""On the KL that the arm does not have, named ROW_forward or ROW_reverse: a row's errors are the largest of both."""


def errors(case: Case, seed: int = 0) -> tuple[float, float, float]:
    """Our loss, and the largest errors of loss and of gradient by the logits."""
    student, teacher = logits(seed)
    terms, gradient, _ = ours(student, teacher, case.approach, case.state, case.divergence)
    expected = case.loss(student, teacher, student)
    slope = ref.difference(lambda moved: case.loss(moved, teacher, student), student)
    return terms["loss"], abs(terms["loss"] - expected), float(np.abs(gradient - slope).max())

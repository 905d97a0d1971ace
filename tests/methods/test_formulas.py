"""Every approach against its independent reference, and the properties that its paper claims."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from references import methods as ref
from references import schedules

from entkd.config import Method
from entkd.data.packing import Batch
from entkd.distill.approach import ApproachState
from entkd.distill.micro_batch import MicroBatch
from entkd.methods import APPROACHES
from entkd.methods.adakd import AdaKD
from entkd.methods.base import Tokens
from entkd.methods.bdkd import BDKD
from entkd.methods.ctkd import CTKD
from entkd.methods.eakd import EAKD
from entkd.methods.sekd import SEKD
from entkd.methods.taid import TAID
from methods.cases import CASES, FURTHER_LOOKS, LENGTHS, Identity, V, by_document, errors, logits, ours
from methods.cases import step as one_step

ALL = CASES | FURTHER_LOOKS
GOLDEN: dict[tuple[str, int], float] = {
    ("adakd", 1): 0.6061627576732446,
    ("adakd_forward", 1): 0.4480741659493527,
    ("adakd_release", 1): 0.6061627576732446,
    ("adakd_release_forward", 1): 0.4480741659493527,
    ("adakd_latf", 1): 0.8642237746724569,
    ("adakd_latf_forward", 1): 0.6259427330887887,
    ("adakd_idts", 1): 0.4196546007189779,
    ("adakd_idts_forward", 1): 0.3053291482875298,
    ("sekd", 1): 0.35250177093618,
    ("sekd_paper", 1): 0.3759798839124347,
    ("sekd_teacher", 1): 0.3247790854970821,
    ("eakd", 1): 0.5805140488657089,
    ("eakd_mean", 1): 0.3348634121382181,
    ("bdkd", 1): 1.6558124381251258,
    ("bdkd_mean", 1): 0.41395310953128145,
    ("taid", 1): 0.12749845589406258,
    ("taid_paper", 1): 0.12749845589406258,
    ("ctkd", 1): 0.8756494243993473,
    ("ctkd_reverse", 1): 0.688711987791966,
}


def test_every_approach_has_a_reference() -> None:
    without = set(APPROACHES) - {case.approach["name"] for case in CASES.values()}
    assert not without, "write its loss into tests/references/methods.py and name it in tests/methods/cases.py"


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ALL)
def test_loss_and_gradient(name: str, seed: int, evidence) -> None:
    _, loss, gradient = errors(ALL[name], seed)
    assert loss < 1e-11
    assert gradient < 1e-8  # of central differences
    row = name if name in CASES else name.rpartition("_")[0]
    evidence(row, "loss", loss)
    evidence(row, "gradient", gradient)
    if row == name:
        evidence(row, "reference", CASES[name].origin)


@pytest.mark.parametrize("name", ALL)
def test_golden_values(name: str, evidence) -> None:
    """A change means another formula: raise ``version`` in the settings class and add a line."""
    case = ALL[name]
    version = APPROACHES[case.approach["name"]].model_fields["version"].default
    student, teacher = logits(0)
    line = f'("{name}", {version}): {case.loss(student, teacher, student)},'
    assert (name, version) in GOLDEN, f"GOLDEN has no value of this version; the reference says {line}"
    terms, _, _ = ours(student, teacher, case.approach, case.state, case.divergence)
    assert terms["loss"] == pytest.approx(GOLDEN[name, version], rel=1e-9)
    if name in CASES:
        evidence(name, "golden", f"{GOLDEN[name, version]:.12g}")


# ── AdaKD ───────────────────────────────────────────────────────────────────────────────────────────────────────


def tokens(statistics: dict[str, list[float]], lengths: tuple[int, ...], selected: int) -> Tokens:
    document_N = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    found = {name: torch.tensor(values, dtype=torch.float64) for name, values in statistics.items()}
    return Tokens(found, document_N, sum(lengths), selected, V)


def test_idts_lowers_the_temperature_of_distant_tokens() -> None:
    distances = np.random.default_rng(3).uniform(0, 1, 31)
    settings = AdaKD(parts="tempering")
    found = settings.factors(tokens({"hellinger": distances.tolist()}, (31,), 31), {}).temperature_N.numpy()
    order = distances.argsort()
    assert (np.diff(found[order]) < 0).all()
    assert found[order[15]] == 1.0  # the median
    assert found.min() >= math.exp(-0.5)
    assert found.max() <= math.exp(0.5)
    np.testing.assert_allclose(found, ref.adakd_temperatures(distances), rtol=1e-12)


def test_the_released_gradient_through_the_temperatures_is_another_one() -> None:
    """Of the same loss: otherwise the option would do nothing, and the references could not tell it apart."""
    student, teacher = logits(0)
    state = {"share": 0.62}
    (held, held_gradient, _), (moved, moved_gradient, _) = (
        ours(student, teacher, {"name": "adakd", "detach": detach}, state) for detach in (True, False)
    )
    assert moved == held
    assert np.abs(moved_gradient - held_gradient).max() > 0.01 * np.abs(held_gradient).max()


def test_idts_of_equal_models_is_one() -> None:
    found = AdaKD(parts="tempering").factors(tokens({"hellinger": [0.0, 0.0, 0.0, 0.5]}, (4,), 4), {}).temperature_N
    assert found.tolist() == pytest.approx([1.0, 1.0, 1.0, math.exp(-0.5)])


@pytest.mark.parametrize("floor", [0.1, 0.0])
def test_the_kept_share_follows_the_average_of_the_loss(floor: float) -> None:
    draw = np.random.default_rng(4)
    losses = (3 * np.exp(-np.arange(60) / 12) + 2 * (np.arange(60) > 40) + draw.uniform(0, 0.2, 60)).tolist()
    settings = AdaKD.model_validate({"focusing": {"decay": 0.5, "warmup": 0.1, "least": floor}})
    state = ApproachState(settings)
    shares = [state.values["share"].item()]
    for step, loss in enumerate(losses):
        state.end_step({"kd": torch.tensor(loss, dtype=torch.float64)}, step, len(losses))
        shares.append(state.values["share"].item())
    expected = schedules.adakd_shares(losses, 6, 0.5, 0.1, 0.1, floor)
    assert shares == pytest.approx(expected, rel=1e-12)
    assert shares[:7] == [1.0] * 7  # warm-up
    assert min(shares) < 0.5  # falls with the loss,
    assert shares[-1] > min(shares)  # and rises again with it


# ── SE-KD, EA-KD ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("share", [0.07, 0.2, 0.5, 1.0])
def test_exactly_the_share_of_every_document(share: float) -> None:
    lengths = (1, 4, 5, 15, 100)
    entropy = np.random.default_rng(5).integers(0, 9, sum(lengths)).astype(float)  # with many ties
    settings = SEKD(share=share)
    selected = settings.selected(lengths)
    weight_N = settings.factors(tokens({"entropy": entropy.tolist()}, lengths, selected), {}).weight_N.numpy()
    counts = [ref.sekd_count(length, share) for length in lengths]
    parts = np.split(weight_N, np.cumsum(lengths)[:-1])
    assert [int((part > 0).sum()) for part in parts] == counts
    assert weight_N.mean() == pytest.approx(1)
    for part, values in zip(parts, np.split(entropy, np.cumsum(lengths)[:-1]), strict=True):
        assert part.nonzero()[0].tolist() == ref.sekd_selected(values, share)


def test_eakd_rises_with_the_teachers_entropy() -> None:
    grid = np.linspace(0, math.log(V), 9)
    weights = EAKD().factors(tokens({"entropy": [0.7] * 9, "teacher_entropy": grid.tolist()}, (9,), 9), {}).weight_N
    assert weights[0] == 0
    assert (weights.diff() > 0).all()


# ── TAID, CTKD ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("trend", [-1, 1])
@pytest.mark.parametrize(
    ("given", "bound"),
    [
        ({"adaptive": False}, "line"),
        ({"alpha": 0.0}, "line"),
        ({"alpha": 0.1, "beta": 0.7}, "own"),
        ({"alpha": 0.3, "beta": 0.7, "end": 0.8}, "end"),
    ],
)
def test_t_rises_to_its_end(given: dict, bound: str, trend: int) -> None:
    """Along algorithm 1, step by step, while the loss falls or rises; each of its three bounds decides somewhere."""
    draw, steps, settings = np.random.default_rng(6), 40, TAID(**given)
    losses = (5 * np.exp(trend * np.arange(steps) / 15) + draw.uniform(0, 1, steps)).tolist()
    state, start, end, m, decided = ApproachState(settings), settings.start, settings.end, 0.0, set()
    found = [state.values["t"].item()]
    for n, loss in enumerate(losses):
        state.end_step({"target_cross_entropy": torch.tensor(loss, dtype=torch.float64)}, n, steps)
        t, line = state.values["t"].item(), start + (end - start) * n / steps
        own = 0.0
        if n and settings.adaptive:
            m = settings.beta * m + (1 - settings.beta) * (losses[n - 1] - loss) / losses[n - 1]
            own = found[-1] + settings.alpha / (1 + math.exp(-m)) * (1 - found[-1])
        bounds = {"line": line, "own": own}
        decided.add("end" if own > end else max(bounds, key=bounds.get))
        assert t == pytest.approx(min(end, max(line, own)), rel=1e-12)
        assert found[-1] <= t <= end
        assert t >= line - 1e-15
        found.append(t)
    assert found[0] == start
    assert bound in decided
    further = {name: getattr(settings, name) for name in ("alpha", "beta")}
    times = schedules.taid_times(losses, steps, settings.adaptive, start, end, **further)
    assert found == pytest.approx(times, rel=1e-12)


@pytest.mark.parametrize("variant", ["authors", "paper"])
def test_t_follows_the_loss_of_the_variant(variant: str) -> None:
    """The cross-entropy of the mixed teacher in the release, the divergence in the paper."""
    student, teacher = logits(3)
    settings = {"name": "taid", "variant": variant, "alpha": 0.5, "beta": 0.5}
    terms, _, objective = ours(student, teacher, settings, {"t": 0.55, "before": 3.0})
    objective.approach.end_step({name: torch.tensor(v, dtype=torch.float64) for name, v in terms.items()}, 1, 10**9)
    t, other = (
        schedules.taid_step(0.55, 0.0, 3.0, ref.taid_loss(student, teacher, 0.55, variant=each), 0.4, 1.0, 0.5, 0.5)[0]
        for each in (variant, {"authors": "paper", "paper": "authors"}[variant])
    )
    assert objective.approach.values["t"].item() == pytest.approx(t, rel=1e-12)
    assert abs(t - other) > 1e-3


def test_taid_reports_the_cross_entropy_of_its_target() -> None:
    student, teacher = logits(0)
    terms, _, _ = ours(student, teacher, "taid", {"t": 0.7})
    assert terms["target_cross_entropy"] == pytest.approx(
        ref.taid_loss(student, teacher, 0.7, variant="authors"), rel=1e-12
    )


def test_at_t_1_taid_is_plain_distillation() -> None:
    """The loss and the gradient of the arm `kd`, and not before t is 1."""
    student, teacher = logits(1)
    model = Identity(student)
    plain, _ = one_step(model, teacher, Method.model_validate({"divergence": "forward_kl"}))
    plain_gradient = model.hidden.grad.numpy()
    terms, gradient, _ = ours(student, teacher, "taid", {"t": 1.0})
    assert terms["loss"] == pytest.approx(plain["loss"], rel=1e-14)
    np.testing.assert_allclose(gradient, plain_gradient, rtol=0, atol=1e-14 * np.abs(plain_gradient).max())
    before, gradient_before, _ = ours(student, teacher, "taid", {"t": 0.99})
    assert before["loss"] < 0.999 * plain["loss"]
    assert np.abs(gradient_before - plain_gradient).max() > 1e-3 * np.abs(plain_gradient).max()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("t2", ["per_token", "linear", "off"])
def test_derivative_by_the_temperature(divergence: str, t2: str) -> None:
    from entkd.kernels import temperature_derivative

    student, teacher = logits(2)
    temperature = torch.full((len(student), 1), 2.3, dtype=torch.float64)
    found = temperature_derivative(torch.tensor(student), torch.tensor(teacher), temperature, divergence, t2)
    assert found.mean().item() == pytest.approx(ref.ctkd_slope(student, teacher, 2.3, divergence, t2), rel=1e-10)


def test_the_temperature_is_not_rounded_to_the_precision_of_the_student() -> None:
    _, _, objective = ours(*logits(0), "ctkd", {"theta": -1.2})
    hidden_ND = torch.zeros(3, V, dtype=torch.bfloat16)
    batch = Batch(*(torch.zeros(1, 3, dtype=torch.long) for _ in range(2)), *(torch.arange(3) for _ in range(3)))
    temperature_N = objective._factors(MicroBatch(batch), hidden_ND, hidden_ND, 3, 3).temperature_N
    assert temperature_N.tolist() == pytest.approx([ref.ctkd_temperature(-1.2)] * 3, rel=1e-6)


def test_the_temperature_ascends_its_gradient() -> None:
    student, teacher = logits(0)
    settings = CTKD(momentum=0, lr=0.1, ramp=0.5)
    terms, _, objective = ours(student, teacher, settings.model_dump(), {"theta": -1.2})
    objective.approach.end_step({name: torch.tensor(v, dtype=torch.float64) for name, v in terms.items()}, 3, 10)
    expected = -1.2 - 0.1 * ref.ctkd_gradient(student, teacher, -1.2, settings.reversal(3, 10))
    theta = objective.approach.values["theta"].item()
    assert theta == pytest.approx(expected, rel=1e-9)
    before, after = (ref.ctkd_loss(student, teacher, ref.ctkd_temperature(value)) for value in (-1.2, theta))
    assert after > before


def test_the_reversal_rises_along_half_a_cosine() -> None:
    settings = CTKD(ramp=10 / 240)
    found = [settings.reversal(step, 240) for step in range(240)]
    assert found == pytest.approx([schedules.ctkd_strength(epoch + 1, 10) for epoch in range(240)])


# ── what does not fit together ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"approach": "adakd", "temperature": {}}, "temperature: adakd's tempering sets each token's temperature"),
        (
            {"approach": {"name": "adakd", "detach": False}, "divergence": "jsd"},
            "divergence: adakd's detach: false needs the derivative by the temperature",
        ),
        ({"approach": "ctkd", "temperature": {}}, "temperature: ctkd learns one temperature"),
        ({"approach": "ctkd", "divergence": "jsd"}, "divergence: ctkd differentiates the two KLs"),
        ({"approach": "bdkd", "divergence": "jsd"}, "divergence: bdkd is a divergence of its own, not jsd"),
        ({"approach": "taid", "divergence": "reverse_kl"}, "divergence: taid trains KL"),
        ({"approach": "taid", "divergence": None, "ce": {}}, "approach taid shapes the divergence term"),
        ({"approach": {"name": "taid", "start": 0.9, "end": 0.5}}, "start 0.9 is above end 0.5"),
    ],
)
def test_what_does_not_fit_together_is_refused(method: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Method.model_validate({"divergence": "forward_kl"} | method)


def test_an_approach_whose_divergence_nothing_computes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything runs, and not by the training job."""
    monkeypatch.setattr(BDKD, "own_terms", None)
    with pytest.raises(
        ValueError, match=r"approach: bdkd trains `bdkd`, which is no divergence; give its class `own_t"
    ):
        Method.model_validate({"divergence": "forward_kl", "approach": "bdkd"})


def test_documents_are_cut_where_positions_restart() -> None:
    assert [len(part) for part in by_document(logits(0)[0])] == list(LENGTHS)

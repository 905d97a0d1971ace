"""Published approaches through the real loop: every one runs, resumes, and is not changed by how a step is cut."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from methods.cases import CASES
from safetensors.torch import load_file
from test_objective import PAD, build

from entkd.config import Method, Training
from entkd.data import Corpus
from entkd.data.packing import collate
from entkd.distill import distill
from entkd.distill.approach import ApproachState, factors_of_batches, response_lengths
from entkd.distill.distributed import World
from entkd.distill.scan import scans, with_factors
from entkd.methods import APPROACHES

TRAINING = Training(steps=6, block=64, blocks_per_step=4, micro_blocks=2, lr=3e-3, precision="fp32", eval_every=3)
FOCUSING = {"focusing": {"warmup": 0.2, "tolerance": 0.001, "decay": 0.2}}
MOVING = {"taid": {"alpha": 0.5}, "taid_paper": {"alpha": 0.5}}
MOVING |= dict.fromkeys(("adakd", "adakd_forward", "adakd_release", "adakd_latf"), FOCUSING)
"""So that states move within a few steps."""
VARIANTS = {name: {"name": name} for name in APPROACHES} | {
    name: CASES[name].approach | MOVING.get(name, {}) for name in CASES
}


def base_of(variant: str) -> str:
    """That of the arm, as the page of evidence says."""
    return CASES[variant].divergence if variant in CASES else "forward_kl"


def method_of(variant: str, **more: object) -> Method:
    return Method.model_validate({"divergence": base_of(variant), "approach": VARIANTS[variant]} | more)


def run(tiny, output: Path, method: Method, training: Training = TRAINING) -> dict:
    torch.set_num_threads(1)
    distill(method, training, 0, tiny.student, tiny.data, tiny.signals, output)
    return json.loads((output / "run.json").read_text(encoding="utf-8"))


def rows(output: Path) -> list[dict]:
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def assert_same_training(output: Path, alone: Path) -> None:
    """Losses, whatever else ``alone`` has logged, and weights, to 1e-6."""
    logged = list(zip(rows(output), rows(alone), strict=True))
    assert len(logged) > 1
    for found, expected in logged:
        for name in expected.keys() - {"seconds"}:
            assert found[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-6), name
    found = load_file(output / "model" / "model.safetensors")
    for name, weight in load_file(alone / "model" / "model.safetensors").items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-6)


def loss_and_gradient(tiny, method: Method, micros, state: dict[str, float] | None = None):
    """Loss and gradient of one step, cut into these micro-batches of blocks of documents."""
    objective, targets, corpus = build(tiny, method)
    for name, value in (state or {}).items():
        objective.approach.values[name].fill_(value)
    batches = [collate(corpus, [np.asarray(block) for block in micro], 256, PAD) for micro in micros]
    step = targets.step(batches, 0.7)
    micro_batches, selected = step.micro_batches, 0
    if method.approach is not None:
        selected = method.approach.selected(response_lengths(batches))
        if scans(method, len(micro_batches)):
            cpu = torch.device("cpu")
            micro_batches = with_factors(
                objective, micro_batches, World(), cpu, torch.float32, step.positions, selected
            )
    total, terms = 0.0, {}
    for micro in micro_batches:
        losses = objective(micro, step.positions, step.hard, selected=selected)
        losses["loss"].backward()
        total += losses["loss"].item()
        for name, value in losses.items():
            terms[name] = terms.get(name, 0.0) + value.item()
    return total, {name: p.grad.clone() for name, p in objective.named_parameters()}, terms


@pytest.fixture(scope="module", params=VARIANTS)
def whole(request: pytest.FixtureRequest, tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict]:
    output = tmp_path_factory.mktemp(request.param)
    return request.param, output, run(tiny, output, method_of(request.param))


def test_it_runs_and_is_not_plain_distillation(tiny, whole, tmp_path: Path) -> None:
    variant, output, record = whole
    plain = run(tiny, tmp_path, Method.model_validate({"divergence": base_of(variant)}))
    assert record["weights_sha256"] != plain["weights_sha256"]
    assert record["arm"]["method"]["approach"]["name"] == VARIANTS[variant]["name"]
    logged = rows(output)
    assert all(np.isfinite(row["loss"]) for row in logged)
    assert logged[-1]["step"] == 6
    names = {key for key in logged[0] if key.startswith(VARIANTS[variant]["name"])}
    assert names == {f"{VARIANTS[variant]['name']}_{name}" for name in method_of(variant).approach.state()}


def test_it_resumes_bit_for_bit(tiny, whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evidence) -> None:
    """Pitfall 26: the state of the approach is part of the resume state."""
    variant, output, record = whole
    calls = 0

    def clip(*arguments):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    from entkd.distill import loop

    original = loop.clip_gradients
    with monkeypatch.context() as patched:
        patched.setattr(loop, "clip_gradients", clip)
        with pytest.raises(KeyboardInterrupt):
            distill(method_of(variant), TRAINING, 0, tiny.student, tiny.data, tiny.signals, tmp_path, 1e-9)
    resumed = run(tiny, tmp_path, method_of(variant))
    assert resumed["resumed"] == 1
    assert resumed["weights_sha256"] == record["weights_sha256"]
    for before, after in zip(rows(output), rows(tmp_path), strict=True):
        assert {k: v for k, v in before.items() if k != "seconds"} == {k: v for k, v in after.items() if k != "seconds"}
    evidence(variant, "resumes", "yes")


@pytest.mark.parametrize("variant", VARIANTS)
def test_micro_batches_change_nothing(tiny, variant: str) -> None:
    """Limit 11: statistics are those of the global batch."""
    method = method_of(variant, ce={"weight": 0.3}, curriculum={})
    state = {"share": 0.37} if "focusing" in VARIANTS[variant] else {}
    one = loss_and_gradient(tiny, method, [[[5, 0], [17, 3], [9, 30]]], state)
    three = loss_and_gradient(tiny, method, [[[5, 0]], [[17, 3]], [[9, 30]]], state)
    assert one[0] == pytest.approx(three[0], rel=2e-5)
    assert one[2] == pytest.approx(three[2], rel=2e-4)
    for name, gradient in one[1].items():
        torch.testing.assert_close(three[1][name], gradient, rtol=2e-3, atol=2e-5)


def with_off(variant: str) -> Method:
    """With components that do nothing: κ = 0, c = 0, and features of no token."""
    off = {"curriculum": {"kappa": 0}, "features": {"threshold": 1.0}}
    approach = method_of(variant).approach
    if not (approach.tempers if approach.name == "adakd" else approach.name == "ctkd"):  # they refuse `temperature`
        off["temperature"] = {"c": 0}
    return method_of(variant, **off)


@pytest.mark.parametrize("variant", VARIANTS)
def test_components_that_do_nothing_change_no_gradient(tiny, variant: str) -> None:
    micros = [[[5, 0], [17, 3]]]
    state = {"share": 0.37} if "focusing" in VARIANTS[variant] else {}  # at 1, where it starts, LATF keeps all tokens
    alone = loss_and_gradient(tiny, method_of(variant), micros, state)
    found = loss_and_gradient(tiny, with_off(variant), micros, state)
    assert found[0] == pytest.approx(alone[0], abs=1e-6)
    for name, gradient in alone[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-6, atol=1e-6)
    if state:
        assert alone[0] != pytest.approx(loss_and_gradient(tiny, method_of(variant), micros)[0], rel=0.01)


def test_components_that_do_nothing_change_no_training(tiny, whole, tmp_path: Path) -> None:
    """Over steps in which the states move: LATF drops tokens, t rises."""
    variant, alone, _ = whole
    run(tiny, tmp_path, with_off(variant))
    assert_same_training(tmp_path, alone)
    approach = method_of(variant).approach
    for name, start in approach.state().items():
        assert any(row[f"{approach.name}_{name}"] != start for row in rows(alone)), name
    if variant in MOVING and approach.name == "adakd":
        assert any(row["adakd_share"] < 1 for row in rows(alone))


def test_the_second_look_at_the_student_is_counted(tiny, tmp_path: Path) -> None:
    plain = run(tiny, tmp_path / "kd", Method(divergence="forward_kl"))
    micro, batch, twice = (
        run(tiny, tmp_path / name, method_of(name)) for name in ("sekd", "adakd_idts", "adakd_release")
    )
    head = 2.0 * 2 * 32 * 300 * plain["positions"] / 1e12  # both output projections, width 32 each
    width = load_file(tiny.student / "model/model.safetensors")["model.embed_tokens.weight"].shape[1]
    assert width == 32
    assert micro["tflops"] - plain["tflops"] == pytest.approx(head, rel=1e-6)
    assert batch["tflops"] > micro["tflops"]
    assert twice["tflops"] - batch["tflops"] == pytest.approx(batch["tflops"] - plain["tflops"], rel=1e-6)


def test_lengths_of_documents(tiny) -> None:
    corpus = Corpus.open(tiny.data, "train")
    batch = collate(corpus, [np.asarray([5, 0]), np.asarray([17])], 256, PAD)
    assert response_lengths([batch]) == corpus.response_lengths[[5, 0, 17]].tolist()


@pytest.mark.parametrize("variant", ["adakd", "eakd_mean"])
def test_processes_share_out_the_look_at_the_global_batch(tiny, variant: str) -> None:
    """Each sees its own micro-batches, and after the sum all have the factors of one process."""
    objective, targets, corpus = build(tiny, method_of(variant))
    if variant == "adakd":
        objective.approach.values["share"].fill_(0.5)
    batches = [collate(corpus, [np.asarray(block)], 256, PAD) for block in ([5, 0], [17, 3])]
    step = targets.step(batches, 0.7)

    class OneOfTwo(World):
        said: list[dict[str, torch.Tensor]] = []

        def sum(self, terms):
            self.said.append({name: value.clone() for name, value in terms.items()})
            return {name: sum(each[name] for each in self.said) for name in terms}

    arguments = (torch.device("cpu"), torch.float32, step.positions, step.positions)
    alone = with_factors(objective, step.micro_batches, World(), *arguments)
    with_factors(objective, step.micro_batches, OneOfTwo(0, 2), *arguments)
    second = with_factors(objective, step.micro_batches, OneOfTwo(1, 2), *arguments)
    assert all((part["hellinger" if variant == "adakd" else "entropy"] == 0).any() for part in OneOfTwo.said)
    for one, two in zip(alone, second, strict=True):
        torch.testing.assert_close(two.factors.weight_N, one.factors.weight_N)


def test_documents_of_several_micro_batches_are_different_ones() -> None:
    state = ApproachState(method_of("sekd").approach)
    entropies = [torch.arange(10.0), 100 + torch.arange(10.0)]
    documents = [torch.ones(10, dtype=torch.long), torch.ones(10, dtype=torch.long)]
    both = factors_of_batches(state, [{"entropy": each} for each in entropies], documents, 20, 4, 300)
    for factors in both:  # two of ten tokens of each, and not four of twenty
        assert factors.weight_N.nonzero()[:, 0].tolist() == [8, 9]
        assert factors.weight_N.sum() == 10


def test_the_look_at_the_global_batch_drops_nothing_out(tiny) -> None:
    """Dropout would show the approach another student than the one that is trained, and shift the masks' stream."""
    objective, targets, corpus = build(tiny, method_of("adakd"))
    for layer in objective.student.model.layers:
        layer.self_attn.attention_dropout = 0.5
    objective.train()
    batches = [collate(corpus, [np.asarray(block)], 256, PAD) for block in ([5, 0], [17, 3])]
    step = targets.step(batches, 0.7)
    arguments = (World(), torch.device("cpu"), torch.float32, step.positions, step.positions)
    before = torch.get_rng_state()
    first, second = (with_factors(objective, step.micro_batches, *arguments) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert objective.student.training
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one.factors.temperature_N, two.factors.temperature_N)

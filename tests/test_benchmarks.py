"""Timings side by side: rounds, ratios, files, and that nothing is timed that computes something else."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import head, step
from benchmarks.agreement import assert_agreement
from benchmarks.heads import HEADS, Case, relative_error
from benchmarks.inputs import IGNORED, Steps, prepare_inputs
from benchmarks.memory import ROOT, PeakMemory, of_child
from benchmarks.report import draw_head, draw_step, head_table, step_table, write_report
from benchmarks.timing import Linear, Spread, interleave, product_seconds, ratios, write_csv
from benchmarks.trainers import TRAINERS, Plain
from entkd.data import Corpus
from entkd.data.packing import collate
from entkd.errors import UserError
from entkd.models import packed_states


def test_competitors_take_turns_and_the_warm_up_round_is_not_kept():
    now, calls = 0.0, []

    def taking(name: str, seconds: float):
        def run(number: int) -> None:
            nonlocal now
            now += seconds * (100 if number == 0 else number)
            calls.append((name, number))

        return run

    found = interleave({"a": taking("a", 1), "b": taking("b", 10)}, 3, clock=lambda: now)
    assert calls == [(name, number) for number in range(4) for name in "ab"]
    assert found == {"a": [1, 2, 3], "b": [10, 20, 30]}


def test_ratios_are_taken_within_a_round():
    # the second round was ten times as slow for both, so the quotient of medians would be another number
    assert ratios([2, 30, 4], [1, 10, 1]) == Spread(3, 2, 4)


def test_products_are_those_of_a_linear_layer():
    layer = Linear(rows=8, inputs=16, outputs=32, count=5)
    x, w = torch.randn(8, 16, requires_grad=True), torch.randn(32, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        (x @ w.T).sum().backward()
    assert layer.flops == 5 * counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        product_seconds([layer], torch.float32, repeats=2)
    assert 5 * counter.get_total_flops() == layer.flops * 3  # one call before the two that are timed
    assert Linear(8, 16, 32, backward=False).flops == layer.flops / 15


def test_csv_has_one_line_per_row(tmp_path):
    rows = [{"name": "a,b", "seconds": 0.5}, {"name": "c", "seconds": 2}]
    write_csv(tmp_path / "bench" / "x.csv", rows)
    with (tmp_path / "bench" / "x.csv").open(encoding="utf-8") as stream:
        assert list(csv.DictReader(stream)) == [{"name": "a,b", "seconds": "0.5"}, {"name": "c", "seconds": "2"}]


needs_clear_refs = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory needs Linux")


@needs_clear_refs
def test_peak_memory_forgets_what_was_before_and_sees_what_is_gone_again():
    code = (
        "from benchmarks.memory import PeakMemory\n"
        "before = bytearray(300 * 2**20); del before\n"
        "watch = PeakMemory()\n"
        "during = bytearray(100 * 2**20); del during\n"
        "watch.report()\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(printed.stdout)
    assert 95 < found["peak"] - found["loaded"] < 130


@needs_clear_refs
def test_a_child_that_fails_is_named_with_what_it_printed():
    with pytest.raises(UserError, match=r"-m benchmarks\.nowhere --only x failed:\n.*No module named"):
        of_child("benchmarks.nowhere", ["--only", "x"])
    assert PeakMemory().stop().added >= 0


# ── whole steps ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_padded_and_packed_rows_train_on_the_same_tokens(tiny_inputs):
    steps = Steps(tiny_inputs.data, 8)
    corpus = Corpus.open(tiny_inputs.data, "train")
    for number in (0, 3, 4):  # there are four steps of 8 in 36 documents, so the fifth is the first again
        padded = steps.padded(number)
        first = number % 4 * 8
        assert steps.response_tokens(number) == int((padded.labels_BL != IGNORED).sum())
        for row in range(8):
            ids, prompt_length = corpus.document(first + row)
            assert padded.input_ids_BL[row, : len(ids)].tolist() == ids.tolist()
            assert padded.attention_mask_BL[row].sum() == len(ids)
            expected = [IGNORED] * prompt_length + ids[prompt_length:].tolist()
            assert padded.labels_BL[row].tolist() == expected + [IGNORED] * (padded.labels_BL.shape[1] - len(ids))
        blocks, block = steps.packed(number)
        assert sorted(document for part in blocks for document in part) == list(range(first, first + 8))
        assert block == padded.labels_BL.shape[1]
    with pytest.raises(UserError, match="--batch: 37 rows a step"):
        Steps(tiny_inputs.data, 37)


def test_trainers_of_one_loss_agree(tiny_inputs, capsys):
    step.compare(tiny_inputs, Steps(tiny_inputs.data, 8), ["plain", "entkd_hidden", "entkd_logprobs"])
    assert capsys.readouterr().err.count("relative differences") == 3


def test_trl_agrees_with_the_plain_loop(tiny_inputs):
    pytest.importorskip("trl", reason="TRL is not installed: `make bench` installs it")
    steps = Steps(tiny_inputs.data, 8)
    found = {name: TRAINERS[name](tiny_inputs, steps, torch.float32).loss_and_norm(1) for name in ("trl_gkd", "plain")}
    assert found["trl_gkd"] == pytest.approx(found["plain"], rel=1e-5)


def test_trl_in_bf16_after_fp32_runs_under_autocast(tiny_inputs):
    pytest.importorskip("trl", reason="TRL is not installed: `make bench` installs it")
    steps = Steps(tiny_inputs.data, 8)
    exact = TRAINERS["trl_gkd"](tiny_inputs, steps, torch.float32)
    rounded = TRAINERS["trl_gkd"](tiny_inputs, steps, torch.bfloat16)
    assert rounded.trainer.accelerator.mixed_precision == "bf16"
    assert rounded.student.model.embed_tokens.weight.dtype == torch.float32
    assert rounded.loss_and_norm(0)[0] == pytest.approx(exact.loss_and_norm(0)[0], rel=0.05)
    assert rounded.loss_and_norm(0)[0] != exact.loss_and_norm(0)[0]


def test_a_step_moves_the_student_alike(tiny_inputs):
    steps = Steps(tiny_inputs.data, 8)
    plain, ours = (TRAINERS[name](tiny_inputs, steps, torch.float32) for name in ("plain", "entkd_logprobs"))
    before = plain.loss_and_norm(0)[0]
    for number in range(6):
        plain.step(number)
        ours.step(number)
    after = plain.loss_and_norm(0)[0], ours.loss_and_norm(0)[0]
    assert after[0] < before
    assert after[0] == pytest.approx(after[1], rel=1e-3)


def test_disagreement_is_refused_with_both_numbers():
    good = {"a": (2.0, 5.0), "b": (2.001, 5.0)}
    assert_agreement(good, "a")
    with pytest.raises(UserError, match=r"b: loss 2\.01, but that of a is 2"):
        assert_agreement(good | {"b": (2.01, 5.0)}, "a")
    with pytest.raises(UserError, match=r"b: gradient norm 4\.9, but that of a is 5"):
        assert_agreement(good | {"b": (2.0, 4.9)}, "a")
    with pytest.raises(UserError, match="b: loss nan"):
        assert_agreement(good | {"b": (float("nan"), 5.0)}, "a")


def test_a_trainer_of_another_loss_stops_the_benchmark(tiny_inputs, monkeypatch):
    class Doubled(Plain):
        def backward(self, number):
            return 2 * super().backward(number)

    monkeypatch.setitem(TRAINERS, "doubled", Doubled)
    with pytest.raises(UserError, match="doubled: loss"):
        step.compare(tiny_inputs, Steps(tiny_inputs.data, 8), ["plain", "doubled"])


def test_steps_are_measured_and_reported(tiny_inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "REFERENCE", "plain")
    steps = Steps(tiny_inputs.data, 8)
    names = ["plain", "entkd_hidden"]
    summary, every = step.measure(tiny_inputs, steps, "fp32", 3, names, {})
    rows = {row["competitor"]: row for row in summary}
    assert list(rows) == ["plain", "entkd_hidden", "entkd_hidden+pass"]
    seconds = {
        name: [row["seconds"] for row in every if row["competitor"] == name]
        for name in ("plain", "entkd_hidden", "pass_hidden")
    }
    both = [a + b for a, b in zip(seconds["entkd_hidden"], seconds["pass_hidden"], strict=True)]
    assert rows["entkd_hidden+pass"]["seconds"] == sorted(both)[1]
    assert rows["entkd_hidden+pass"]["ratio"] == sorted(a / b for a, b in zip(seconds["plain"], both, strict=True))[1]
    assert 0 < rows["entkd_hidden"]["efficiency"] < 1
    machine = {"rows per step": "8", "rows": "tiny", "processor": "x", "threads": "1", "torch": "2"}
    write_report(tmp_path, "step", step_table(summary, machine), draw_step(summary))
    assert (tmp_path / "step.md").read_text(encoding="utf-8").startswith("| fp32 | s per step |")
    assert (tmp_path / "step.png").stat().st_size > 1000


def test_flops_of_a_step_are_those_that_it_makes(tiny_inputs):
    steps = Steps(tiny_inputs.data, 8)
    products = step.Products(tiny_inputs, steps, torch.float32)
    blocks, block = steps.packed(0)
    with FlopCounterMode(display=False) as counter:
        hidden_ND, _ = packed_states(products.student, collate(steps.corpus, blocks, block, steps.pad_id))
        hidden_ND.sum().backward()
    trunk_layers, own, teacher = products.layers(0)
    linear = sum(layer.flops for layer in trunk_layers)
    filled = sum(layer.flops * 15 / layer.rows for layer in trunk_layers)  # tokens, up to a multiple of 16
    assert linear <= counter.get_flop_counts()["Global"][torch.ops.aten.mm] <= linear + filled
    needed = linear + own.flops + teacher.flops
    lengths = steps.corpus.lengths[steps.documents(0)].tolist()
    responses = steps.corpus.response_lengths[steps.documents(0)].tolist()
    attention = products.flops(0, "hidden") - needed
    assert products.flops(0, "logprobs") == pytest.approx(needed - teacher.flops + attention)
    # width 32: two of three layers for all queries, the last for those that predict a response token
    seen = sum(
        2 * sum(range(1, length + 1)) + sum(query + 1 for query in range(length - response - 1, length - 1))
        for length, response in zip(lengths, responses, strict=True)
    )
    assert attention == pytest.approx(3 * 4 * 32 * seen)


def test_rows_of_a_file_become_data_of_their_own(tmp_path, tiny_inputs):
    results, cache, rows = tmp_path / "results", tmp_path / "cache", tmp_path / "rows.jsonl"
    for name, folder in {"teachers/smollm2-135m-instruct": "teacher", "students/untrained/seed0": "student"}.items():
        (results / name).parent.mkdir(parents=True)
        (results / name).symlink_to(getattr(tiny_inputs, folder))
    turns = [[{"role": "user", "content": f"count to {n}"}, {"role": "assistant", "content": "no"}] for n in range(12)]
    rows.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns), encoding="utf-8")
    inputs = prepare_inputs(results, cache, rows, 8)
    assert inputs.student == results / "students/untrained/seed0"
    assert len(Corpus.open(inputs.data, "train")) == 8
    assert prepare_inputs(results, cache, rows, 8) == inputs
    rows.write_text(rows.read_text(encoding="utf-8").replace("no", "yes"), encoding="utf-8")
    assert prepare_inputs(results, cache, rows, 8).data != inputs.data


# ── the head alone ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def case() -> Case:
    return Case.draw(96, 700, 64, torch.bfloat16)


def installed(name: str) -> str:
    if name.startswith(("trl", "liger")):
        pytest.importorskip(name.partition("_")[0].replace("liger", "liger_kernel"), reason="see `make bench`")
    return name


def test_the_case_has_the_kl_that_was_asked_for_and_its_exact_gradients(case):
    loss, hidden_grad_ND, weight_grad_VD = case.exact(rows=40)
    assert 0.01 < loss < 0.04
    by_autograd = case.to(torch.float64).gradients(HEADS["dense"])  # which takes its softmax in fp32
    assert float(by_autograd[0]) == pytest.approx(loss, rel=1e-4)
    assert relative_error(by_autograd[1], hidden_grad_ND) < 1e-4
    assert relative_error(by_autograd[2], weight_grad_VD) < 1e-4


@pytest.mark.parametrize("name", [name for name in HEADS if not name.endswith("compiled")])
def test_heads_agree_in_fp32(case, name, capsys):
    head.compare(case, ["dense", installed(name)])
    assert f"fp32 {name}: KL" in capsys.readouterr().err


def test_a_head_of_another_divergence_is_refused(case, monkeypatch):
    monkeypatch.setitem(HEADS, "mean over tokens twice", lambda *tensors: HEADS["dense"](*tensors) / 96)
    with pytest.raises(UserError, match="mean over tokens twice: loss"):
        head.compare(case, ["dense", "mean over tokens twice"])


def test_heads_are_measured_and_reported(case, tmp_path):
    summary, every = head.measure(case, 2, ["dense", "entkd"], {})
    rows = {row["competitor"]: row for row in summary}
    assert list(rows) == ["dense", "entkd", "products"]
    assert len(every) == 6
    assert rows["entkd"]["dw_error"] < 0.01 < rows["dense"]["dw_error"]  # a softmax of bf16 logits
    assert rows["products"]["bound_share"] == 1
    machine = {"N": "96", "V": "700", "width": "64", "processor": "x", "threads": "1", "torch": "2"}
    write_report(tmp_path, "head", head_table(summary, machine), draw_head(summary))
    assert (tmp_path / "head.md").read_text(encoding="utf-8").count("\n") == 7
    assert (tmp_path / "head.svg").stat().st_size > 1000

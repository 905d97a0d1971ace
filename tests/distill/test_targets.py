"""What an arm asks of the signal store, and the refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch

from entkd.config import Method, Signals
from entkd.config.method import ForwardKL, ReverseKL, _Divergence
from entkd.data import Corpus
from entkd.data.packing import collate
from entkd.distill.distributed import World
from entkd.distill.targets import TeacherTargets, infinite_at_zero
from entkd.errors import UserError
from entkd.methods import Approach
from entkd.methods.eakd import EAKD
from entkd.signals.write import write_signals
from entkd.sparse import SparseTarget

FULL = Method.model_validate({"divergence": "forward_kl", "curriculum": {}, "temperature": {}, "features": {}})


def test_targets_follow_the_token_not_the_batch(tiny) -> None:
    """Pitfall 15: other order, other micro-batches, the same target for each token."""
    corpus = Corpus.open(tiny.data, "train")
    targets = TeacherTargets(FULL, tiny.signals, tiny.data, corpus, 0)

    def by_token(micros: list[list[list[int]]]) -> dict[int, tuple[float, float, bool, list[float]]]:
        step = targets.step([collate(corpus, [np.asarray(b) for b in micro], 256, 2) for micro in micros], 0.3)
        found = {}
        for micro in step.micro_batches:
            hard = torch.zeros(len(micro.batch.tokens_N), dtype=torch.bool)
            hard[micro.hard_H] = True
            rows = zip(
                micro.batch.tokens_N.tolist(),
                micro.weight_N.tolist(),
                micro.temperature_N.tolist(),
                hard.tolist(),
                micro.teacher_NE().float().tolist(),
                strict=True,
            )
            found |= {token: (round(w, 5), t, h, z) for token, w, t, h, z in rows}
        return found

    assert by_token([[[3, 8], [21]]]) == by_token([[[21]], [[8, 3]]])


def test_feature_states_are_those_of_the_hard_tokens(tiny) -> None:
    corpus = Corpus.open(tiny.data, "train")
    targets = TeacherTargets(FULL, tiny.signals, tiny.data, corpus, 0)
    batch = collate(corpus, [np.arange(4)], 256, 2)
    step = targets.step([batch], 0.5)
    micro = step.micro_batches[0]
    hard = targets.difficulty_R[batch.tokens_N] > 0.8
    assert step.hard == int(hard.sum()) > 0
    assert torch.equal(micro.hard_H, hard.nonzero().squeeze(1))
    for layer, states_HE in zip((0, 2, 3), micro.teacher_features, strict=True):
        assert torch.equal(states_HE, targets.split.features(batch.tokens_N[hard], layer))


def test_fewer_layer_pairs_than_stored_take_every_other_layer(tiny, tmp_path: Path, tiny_corpus: Path) -> None:
    needs = {"features": {"points": 4, "tokens": "all", "threshold": 0.8}, "splits": ["train"]}
    signals = tmp_path / "signals" / "manifest.json"
    write_signals(Signals(), needs, tiny.teacher, tiny_corpus, tmp_path / "cache", signals, "fp32")
    method = Method.model_validate({"divergence": "forward_kl", "features": {"points": 2}})
    targets = TeacherTargets(method, signals, tiny_corpus, Corpus.open(tiny_corpus, "train"), 0)
    assert targets.teacher_layers == (1, 3)
    three = Method.model_validate({"divergence": "forward_kl", "features": {"points": 3}})
    with pytest.raises(UserError, match=r"method\.features\.points: 3"):
        TeacherTargets(three, signals, tiny_corpus, Corpus.open(tiny_corpus, "train"), 0)


def test_method_without_signals_reads_none(tiny) -> None:
    corpus = Corpus.open(tiny.data, "train")
    step = TeacherTargets(Method.model_validate({"ce": {}}), None, tiny.data, corpus, 0).step(
        [collate(corpus, [np.arange(3)], 256, 2)], 0.5
    )
    assert step.positions == int(corpus.response_lengths[:3].sum())
    assert step.micro_batches[0].teacher_NE is None


def test_refusals_name_the_setting(tiny, tmp_path: Path) -> None:
    corpus = Corpus.open(tiny.data, "train")
    with pytest.raises(UserError, match="--signals"):
        TeacherTargets(FULL, None, tiny.data, corpus, 0)
    # Other token ids of the same length: rows would fit, and be those of other tokens (pitfall 15).
    other = tmp_path / "other"
    shutil.copytree(tiny.data, other)
    described = json.loads((other / "manifest.json").read_text(encoding="utf-8"))
    described["files"]["train.ids.npy"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(described), encoding="utf-8")
    with pytest.raises(UserError, match=r"train\.ids differ.*prepare the signals again"):
        TeacherTargets(FULL, tiny.signals, other, corpus, 0)

    # A teacher that gives some tokens probability zero: KL(q‖p) is infinite (limit 7).
    pointer = json.loads(tiny.signals.read_text(encoding="utf-8"))
    store = tmp_path / "store"
    shutil.copytree((tiny.signals.parent / pointer["store"]).resolve(), store)
    manifest = json.loads((store / "manifest.json").read_text(encoding="utf-8"))
    (store / "manifest.json").write_text(json.dumps(manifest | {"has_inf_logits": True}), encoding="utf-8")
    (tmp_path / "manifest.json").write_text(json.dumps(pointer | {"store": "store"}), encoding="utf-8")
    refused = (
        "reverse_kl",
        "todi",
        "adaptive_kl",
        {"name": "jsd", "beta": 1.0},
        {"name": "skew_reverse_kl", "alpha": 0},
    )
    bdkd = {"divergence": "forward_kl", "approach": "bdkd"}  # holds the reverse KL, whatever its base is called
    for settings in (*({"divergence": divergence} for divergence in refused), bdkd):
        method = Method.model_validate(settings)
        with pytest.raises(UserError, match=r"contains KL\(q‖p\)"):
            TeacherTargets(method, tmp_path / "manifest.json", tiny.data, corpus, 0)
    for divergence in ("jsd", "skew_reverse_kl", "tvd", "forward_kl"):
        method = Method.model_validate({"divergence": divergence})
        TeacherTargets(method, tmp_path / "manifest.json", tiny.data, corpus, 0)


def test_micro_batches_must_share_out_evenly() -> None:
    assert World(1, 2).share(["a", "b", "c", "d"]) == ["b", "d"]
    with pytest.raises(UserError, match="blocks_per_step"):
        World(0, 2).share(["a", "b", "c"])


def test_log_probabilities_are_read_where_they_are_stored(tiny, tmp_path) -> None:
    """They are those of the hidden states; total variation reads hidden states, each micro-batch its own rows."""
    settings = Signals(mode="logprobs", calibration_tokens=150, shard_tokens=120, batch_tokens=96)
    needs = {"features": None, "splits": ["train"]}
    write_signals(settings, needs, tiny.teacher, tiny.data, tmp_path / "cache", tmp_path / "manifest.json", "fp32")
    corpus = Corpus.open(tiny.data, "train")
    batches = [collate(corpus, [np.asarray(documents)], 256, 2) for documents in ([3, 8, 21], [5], [9])]
    hidden = TeacherTargets(
        Method.model_validate({"divergence": "tvd"}), tmp_path / "manifest.json", tiny.data, corpus, 0
    )
    stored = TeacherTargets(
        Method.model_validate({"divergence": "forward_kl"}), tmp_path / "manifest.json", tiny.data, corpus, 0
    )
    assert stored.head_UE is None
    for computed, read in zip(
        hidden.step(batches, 0.5).micro_batches, stored.step(batches, 0.5).micro_batches, strict=True
    ):
        logits = computed.teacher().float() @ hidden.head_UE.float().T
        torch.testing.assert_close(read.teacher().float(), logits.log_softmax(-1), atol=5e-2, rtol=5e-3)


def test_sparse_targets_are_read_where_they_are_stored(tiny, tmp_path) -> None:
    """Each micro-batch its own rows; what needs more of the teacher is refused with the setting to change."""
    settings = Signals(mode="sparse", sparse={"top_k": 8, "samples": 8}, calibration_tokens=150, shard_tokens=120)
    needs = {"features": {"points": 3, "tokens": "hard", "threshold": 0.8}, "splits": ["train"]}
    manifest = tmp_path / "manifest.json"
    write_signals(settings, needs, tiny.teacher, tiny.data, tmp_path / "cache", manifest, "fp32")
    corpus = Corpus.open(tiny.data, "train")
    batches = [collate(corpus, [np.asarray(documents)], 256, 2) for documents in ([3, 8, 21], [5], [9])]
    method = Method.model_validate(
        {"divergence": "forward_kl", "curriculum": {}, "features": {}, "temperature": {"base": 1.0, "c": 0.0}}
    )
    targets = TeacherTargets(method, manifest, tiny.data, corpus, 0)
    exact = TeacherTargets(method, tiny.signals, tiny.data, corpus, 0)
    assert targets.head_UE is None
    step = targets.step(batches, 0.5)
    assert step.hard > 0
    for micro, batch, other in zip(step.micro_batches, batches, exact.step(batches, 0.5).micro_batches, strict=True):
        target = micro.to(torch.device("cpu")).teacher()
        assert isinstance(target, SparseTarget)
        assert torch.equal(target.entropy_N, targets.split.entropy_R[batch.tokens_N])
        assert torch.equal(target.ids_NK, targets.split.sparse(batch.tokens_N).ids_NK)
        logits_NU = other.teacher().float() @ exact.head_UE.float().T
        top = logits_NU.softmax(-1).topk(8).values
        torch.testing.assert_close(target.mass_NK[:, :8], top, atol=5e-3, rtol=2e-2)
        assert torch.equal(micro.weight_N, other.weight_N)
        assert (micro.temperature_N == 1).all()
    for patch, key in (
        ({"divergence": "tvd"}, "divergence: tvd"),
        ({"divergence": "forward_kl", "temperature": {}}, "temperature: base 1 with c 0.5"),
    ):
        with pytest.raises(UserError, match=f"method.{key}.*set `signals.mode: hidden`"):
            TeacherTargets(Method.model_validate(patch), manifest, tiny.data, corpus, 0)


def test_a_divergence_and_an_approach_say_themselves_that_they_hold_the_reverse_kl() -> None:
    """Nothing else has to be told of a new one."""

    class Own(_Divergence):
        name: Literal["own"] = "own"

        @property
        def contains_reverse_kl(self) -> bool:
            return True

    class Mixed(Approach):
        citation: ClassVar[str] = "an example"
        name: Literal["mixed"] = "mixed"

        def contains_reverse_kl(self, of_divergence: bool) -> bool:
            return not of_divergence

    finite, reverse = ForwardKL(), ReverseKL()
    for divergence, approach, said in (
        (Own(), None, "divergence: own"),
        (Own(), EAKD(), "divergence: own"),
        (finite, Mixed(), "approach: mixed"),
        (reverse, Mixed(), None),
        (finite, EAKD(), None),
        (None, None, None),
    ):
        assert infinite_at_zero(Method.model_construct(divergence=divergence, approach=approach)) == said

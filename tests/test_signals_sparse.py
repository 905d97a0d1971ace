"""Mode sparse of the signal store: what is kept, what is refused, what interruption and verification say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from signal_cases import HARD, as_teacher, direct, tree
from tiny_models import tiny_llama
from transformers import PreTrainedTokenizerFast

import entkd.signals.write
from entkd.config import Signals, canonical_json
from entkd.data.corpus import Document, write_split
from entkd.errors import UserError
from entkd.files import file_sha256
from entkd.score.fidelity import fidelity
from entkd.signals import SignalStore
from entkd.signals.bias import BiasReport, perturbed
from entkd.signals.content import content_key, describe_content
from entkd.signals.kept import tail_uniforms
from entkd.signals.verify import verify
from entkd.signals.write import write_signals
from entkd.sparse import SparseTarget, densify, draw_target

PORTIONS = {"calibration_tokens": 150, "shard_tokens": 120, "batch_tokens": 96}
SPARSE = Signals(mode="sparse", sparse={"top_k": 6, "samples": 10}, **PORTIONS)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    tokens = len(PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer))
    return as_teacher(tiny_llama(tokens + 20), tiny_tokenizer, tmp_path_factory.mktemp("sparse-teacher"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, teacher: Path, tiny_corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("sparse-signals")
    write_signals(SPARSE, HARD, teacher, tiny_corpus, folder / "cache", folder / "results/manifest.json", "fp32")
    return folder / "results/manifest.json"


@pytest.fixture(scope="module")
def exact(teacher: Path, tiny_corpus: Path) -> torch.Tensor:
    """Log-probabilities of all training tokens, by the model's own hidden states in fp64."""
    hidden = torch.from_numpy(direct(teacher, tiny_corpus, "train")["hidden"])
    head = load_file(teacher / "model/model.safetensors")["model.embed_tokens.weight"][:300].double()
    return (hidden @ head.T).log_softmax(-1)


def test_the_head_is_exact_and_the_tail_is_drawn_from_the_rest(written, exact):
    train = SignalStore.open(written).split("train")
    target = train.sparse(torch.arange(len(train)))
    assert (target.ids_NK.dtype, target.mass_NK.dtype, target.entropy_N.dtype) == (
        torch.int32,
        torch.float32,
        torch.float32,
    )
    torch.testing.assert_close(target.mass_NK.sum(-1), torch.ones(len(train)), atol=1e-6, rtol=0)
    top = exact.exp().topk(6)
    torch.testing.assert_close(target.mass_NK[:, :6].double(), top.values, atol=3e-4, rtol=2**-10)
    entropy = torch.special.entr(exact.exp()).sum(-1)
    torch.testing.assert_close(target.entropy_N.double(), entropy, atol=2e-5, rtol=1e-5)
    used = target.mass_NK[:, 6:] > 0
    drawn = torch.zeros(exact.shape, dtype=torch.bool).scatter_(1, target.ids_NK[:, 6:].long(), used)
    assert not drawn.gather(1, target.ids_NK[:, :6].long())[:, 1:].any()
    # 10 equal parts of the rest, of which a token has at least one
    share = (1 - top.values.sum(-1, keepdim=True)) / 10
    parts = (target.mass_NK[:, 6:] / share)[used]
    torch.testing.assert_close(parts, parts.round(), atol=0.01, rtol=2e-3)


def test_masses_are_unbiased_over_the_whole_store(written, exact):
    """Σ (m − p)·f over all tokens is noise: within 4.5 of its standard errors for 40 random f."""
    train = SignalStore.open(written).split("train")
    target = train.sparse(torch.arange(len(train)))
    error_RU = densify(target, 300).double() - exact.exp()
    for seed in range(40):
        f_U = torch.randn(300, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        error_R = error_RU @ f_U
        assert abs(error_R.mean()) < 4.5 * error_R.std() / len(error_R) ** 0.5


def test_reads_come_in_any_order_with_repeats(written):
    train = SignalStore.open(written).split("train")
    everything = train.sparse(np.arange(len(train)))
    tokens = torch.randint(0, len(train), (3 * len(train),), generator=torch.Generator().manual_seed(0))
    found = train.sparse(tokens)
    for name in ("ids_NK", "mass_NK", "entropy_N"):
        assert torch.equal(getattr(found, name), getattr(everything, name)[tokens])
    assert train.sparse(np.empty(0, dtype=np.int64)).ids_NK.shape == (0, 16)
    with pytest.raises(IndexError, match="split train has"):
        train.sparse(torch.tensor([len(train)]))


def test_each_mode_refuses_what_it_does_not_keep(written, teacher, tiny_corpus, tmp_path):
    store = SignalStore.open(written)
    train, test = store.split("train"), store.split("test")
    one = torch.tensor([0])
    with pytest.raises(UserError, match=r"no hidden states in split train of mode sparse; set `signals.mode: hidden`"):
        train.hidden(one)
    with pytest.raises(UserError, match=r"no log-probabilities in split train.*set `signals.mode: logprobs`"):
        train.logprobs(one)
    with pytest.raises(UserError, match="no sparse targets of split test of mode sparse; only split train has them"):
        test.sparse(one)
    assert test.hidden(one).shape == (1, 32)
    assert "hidden" not in load_file(store.folder / "train-00000.safetensors")
    write_signals(Signals(**PORTIONS), HARD, teacher, tiny_corpus, tmp_path, tmp_path / "m.json", "fp32")
    hidden = SignalStore.open(tmp_path / "m.json").split("train")
    with pytest.raises(UserError, match=r"no sparse targets in split train of mode hidden; set `signals.mode: sparse`"):
        hidden.sparse(one)
    with pytest.raises(UserError, match=r"set `signals.mode: logprobs`"):
        hidden.logprobs(one)


def test_features_and_statistics_are_those_of_mode_hidden(written, teacher, tiny_corpus, tmp_path):
    write_signals(Signals(**PORTIONS), HARD, teacher, tiny_corpus, tmp_path, tmp_path / "m.json", "fp32")
    sparse, hidden = SignalStore.open(written), SignalStore.open(tmp_path / "m.json")
    for name in ("train-00000", "train-00003", "test-00000"):
        mine, other = (load_file(store.folder / f"{name}.safetensors") for store in (sparse, hidden))
        kept = {"sparse_ids", "sparse_mass"} if name.startswith("train") else {"hidden"}
        assert set(mine) - kept == set(other) - {"hidden"}
        assert all(torch.equal(mine[key], other[key]) for key in set(mine) & set(other))


def test_scores_compare_with_the_exact_distribution(written, teacher, tiny_corpus, tmp_path):
    """Fidelity reads the test split, which is the same in both modes."""
    write_signals(Signals(**PORTIONS), HARD, teacher, tiny_corpus, tmp_path, tmp_path / "m.json", "fp32")
    student = tiny_llama(304, seed=1, hidden_size=16, num_hidden_layers=2)
    sparse, hidden = (fidelity(student, tiny_corpus, path, 200) for path in (written, tmp_path / "m.json"))
    assert repr(sparse) == repr(hidden)  # as text, in which NaN equals NaN


def test_draws_depend_on_no_batch_or_shard(written, teacher, tiny_corpus, tmp_path):
    other = SPARSE.model_copy(update={"shard_tokens": 5000, "batch_tokens": 1000})
    write_signals(other, HARD, teacher, tiny_corpus, tmp_path, tmp_path / "m.json", "fp32")
    ours, theirs = SignalStore.open(written).split("train"), SignalStore.open(tmp_path / "m.json").split("train")
    everything = torch.arange(len(ours))
    first, second = ours.sparse(everything), theirs.sparse(everything)
    # another batch rounds logits otherwise, which may move a draw over the border between two tokens
    assert ((first.ids_NK != second.ids_NK).any(1)).float().mean() < 0.01
    same = (first.ids_NK == second.ids_NK).all(1)
    torch.testing.assert_close(first.mass_NK[same], second.mass_NK[same], atol=3e-4, rtol=2**-9)


class Killed(BaseException):
    """Stands for a signal that ends the process."""


@pytest.mark.parametrize("shards_before", [0, 4])
def test_an_interrupted_write_continues_to_the_identical_store(
    written, teacher, tiny_corpus, tmp_path, monkeypatch, shards_before
):
    plain, done = entkd.signals.write._write_shard, []

    def stop_after(folder, shard, result, key):
        if len(done) == shards_before:
            raise Killed
        plain(folder, shard, result, key)
        done.append(shard)

    arguments = (SPARSE, HARD, teacher, tiny_corpus, tmp_path / "cache", tmp_path / "manifest.json", "fp32")
    monkeypatch.setattr(entkd.signals.write, "_write_shard", stop_after)
    with pytest.raises(Killed):
        write_signals(*arguments)
    monkeypatch.setattr(entkd.signals.write, "_write_shard", plain)
    write_signals(*arguments)
    assert tree(SignalStore.open(tmp_path / "manifest.json").folder) == tree(SignalStore.open(written).folder)
    assert json.loads((tmp_path / "manifest.json").read_text())["summary"]["shards_found"] == shards_before


def test_bytes_per_token_are_those_of_the_slots(teacher, tiny_corpus, tmp_path):
    """6 bytes for a slot and 12 for three statistics; 2 for each number of a feature layer."""
    needs = {"features": None, "splits": ["train"]}
    settings = Signals(mode="sparse", sparse={"top_k": 60, "samples": 40}, shard_tokens=100_000)
    write_signals(settings, needs, teacher, tiny_corpus, tmp_path, tmp_path / "m.json", "fp32")
    summary = json.loads((tmp_path / "m.json").read_text())["summary"]
    overhead = 3000 / summary["response_tokens"]  # headers, documents and their lengths
    assert 100 * 6 + 12 < summary["bytes_per_token"] < 100 * 6 + 12 + overhead


def test_more_slots_than_tokens_are_refused_before_the_teacher_is_loaded(teacher, tiny_corpus, tmp_path):
    settings = Signals(mode="sparse", sparse={"top_k": 200, "samples": 101})
    with pytest.raises(UserError, match="top_k 200 and samples 101 are together more than the vocabulary of 300"):
        write_signals(settings, HARD, teacher, tiny_corpus, tmp_path / "cache", tmp_path / "m.json", "fp32")
    assert not (tmp_path / "cache").exists()


def test_the_keys_of_other_modes_are_what_they_were():
    """Settings as JSON before there was a mode sparse: a new key there would write every store anew."""
    features = '"features":{"points":3,"threshold":0.8,"tokens":"hard"}'
    before = '{"batch_tokens":4096,"calibration_tokens":16384,' + features + ',"mode":"%s","shard_tokens":65536}'
    for mode in ("hidden", "logprobs"):
        settings = Signals(mode=mode)
        assert canonical_json(settings) == before % mode
        assert content_key({"settings": settings.model_dump(mode="json")}) == content_key(
            {"settings": json.loads(before % mode)}
        )
    assert '"sparse":{"samples":32,"top_k":32}' in canonical_json(Signals(mode="sparse"))
    assert Signals.model_validate_json(canonical_json(SPARSE)) == SPARSE


def test_the_key_depends_on_the_slots(teacher, tiny_corpus):
    variants = [{}, {"samples": 11}, {"top_k": 7}]
    keys = set()
    for change in variants:
        settings = Signals(mode="sparse", sparse={"top_k": 6, "samples": 10} | change, **PORTIONS)
        keys.add(content_key(describe_content(settings, HARD, teacher, tiny_corpus, torch.float32)))
    assert len(keys) == 3


def test_token_ids_beyond_17_and_18_bits_in_a_store(tmp_path, tiny_tokenizer, tiny_corpus):
    """Pitfall 14: a teacher whose most probable tokens are 131,072, 151,935 and 262,143."""
    ids = [131072, 151935, 262143]
    model = tiny_llama(
        262144, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
    )
    document = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        hidden = model.model(document).last_hidden_state[0]
        for row, token in enumerate(ids):
            model.model.embed_tokens.weight[token] = 6 * hidden[row]
        log_p = model(document).logits[0, :3].double().log_softmax(-1)
    assert log_p.argmax(-1).tolist() == ids
    teacher = as_teacher(model, tiny_tokenizer, tmp_path / "teacher")
    data = tmp_path / "data"
    shutil.copytree(tiny_corpus, data)
    text = {"id": "a", "prompt": "", "response": "", "user": "", "cut": True}
    write_split(data, "train", [Document([5], [6, 7, 8], text)])
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps(manifest | {"vocab_size": 262144}))
    needs = {"features": None, "splits": ["train"]}
    write_signals(Signals(mode="sparse"), needs, teacher, data, tmp_path / "cache", tmp_path / "m.json", "fp32")
    target = SignalStore.open(tmp_path / "m.json").split("train").sparse(torch.arange(3))
    assert target.ids_NK[:, 0].tolist() == ids
    assert target.ids_NK.max() > 2**17
    torch.testing.assert_close(target.mass_NK[:, 0].double(), log_p.max(-1).values.exp(), atol=1e-4, rtol=1e-3)


def test_verify_reports_errors_and_bias(written, teacher, tiny_corpus, tmp_path, capsys):
    tokens = len(PreTrainedTokenizerFast.from_pretrained(teacher / "model"))
    tiny_llama(tokens, seed=5, hidden_size=16).save_pretrained(tmp_path / "student")
    assert verify(written, teacher, tiny_corpus, 12, tmp_path / "student") == 0
    lines = capsys.readouterr().out.splitlines()
    for start in (
        "train: error of the entropy: max ",
        "train: error of log p(target): max ",
        "test: KL(exact ‖ stored)",
    ):
        assert sum(line.startswith(start) for line in lines) == 1
    (variation,) = (line for line in lines if line.startswith("train: ½ Σ|p − stored p|"))
    assert float(variation.split("mean ")[1].split(" ")[0]) < 2e-4
    reports = [line for line in lines if "bias of the KL" in line]
    assert [line.split(", KL ")[0] for line in reports[::2]] == [
        "train: noisy teacher near 0.02",
        "train: noisy teacher near 1",
        "train: the student",
    ]
    assert all("sparse (6 + 10 draws)" in line for line in reports[::2])
    assert all("top 16 renormalised" in line for line in reports[1::2])


def test_verify_finds_sparse_rows_of_other_tokens(written, teacher, tiny_corpus, tmp_path, capsys):
    shutil.copytree(written.parents[1], tmp_path / "copy")
    folder = SignalStore.open(tmp_path / "copy/results/manifest.json").folder
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in (name for name in manifest["files"] if name.startswith("train")):
        tensors = {key: tensor.clone() for key, tensor in load_file(folder / name).items()}
        shifted = {key: tensors[key].roll(1, 0) for key in ("sparse_ids", "sparse_mass")}
        save_file(tensors | shifted, folder / name, {"entkd": "{}"})
        manifest["files"][name]["sha256"] = file_sha256(folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert verify(tmp_path / "copy/results/manifest.json", teacher, tiny_corpus, 12) == 1
    assert "this is not what this teacher says of these tokens" in capsys.readouterr().out


def test_the_report_tells_bias_from_noise():
    """Sparse targets: only noise, which shrinks as 1/√N. The same head renormalised: a bias, which does not."""
    generator = torch.Generator().manual_seed(0)
    head_UE = torch.randn(400, 8, generator=generator)
    report = BiasReport(8, 8)
    for document in range(40):
        hidden_NE = torch.randn(50, 8, generator=generator)
        logits_NU = hidden_NE @ head_UE.T
        log_p_NU = logits_NU.log_softmax(-1)
        uniform_NS = torch.rand(50, 8, generator=generator, dtype=torch.float64)
        entropy_N = torch.special.entr(log_p_NU.exp()).sum(-1)
        target = SparseTarget(*draw_target(logits_NU, 8, uniform_NS), entropy_N)
        report.add(log_p_NU, target, perturbed(hidden_NE, head_UE, log_p_NU, document))
    for student, kinds in report.numbers().items():
        sparse, renormalised = kinds["sparse (8 + 8 draws)"], kinds["top 16 renormalised"]
        assert sparse["tokens"] == 2000
        assert sparse["kl"] == pytest.approx(float(student.split("near ")[1]), rel=0.06)
        assert abs(sparse["bias"]) < 4 * sparse["stderr"]
        assert 0.8 < sparse["excess"] < 1.2
        assert abs(renormalised["bias"]) > 20 * renormalised["stderr"]
        assert renormalised["excess"] > 5
    assert len(list(report.lines())) == 4


def test_every_document_has_draws_of_its_own_whatever_stands_beside_it():
    lengths = np.asarray([3, 5, 4])
    together = tail_uniforms("train", np.asarray([0, 1, 2]), lengths, 6)
    assert together.shape == (12, 6)
    assert len(torch.unique(together)) == together.numel()
    alone = torch.cat([tail_uniforms("train", np.asarray([document]), lengths, 6) for document in (0, 1, 2)])
    assert torch.equal(together, alone)
    assert not torch.equal(together, tail_uniforms("dev", np.asarray([0, 1, 2]), lengths, 6))

"""Writing the signal store: one pass, interruptions, refusals, verification."""

from __future__ import annotations

import fcntl
import json
import re
import resource
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from signal_cases import ALL, HARD, SETTINGS, as_teacher, tree
from tiny_models import tiny_llama
from transformers import PreTrainedTokenizerFast

import entkd.models.by_document
import entkd.signals.write
from entkd.config import Signals
from entkd.data import Corpus
from entkd.data.packing import plan_batches
from entkd.errors import UserError
from entkd.files import WriteError, file_sha256, locked
from entkd.signals import SignalStore
from entkd.signals.content import content_key, describe_content
from entkd.signals.files import write_tensors
from entkd.signals.shards import plan_shards
from entkd.signals.verify import verify
from entkd.signals.write import write_signals


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """Random tiny Llama whose head has 20 rows of padding, which must change nothing."""
    tokens = len(PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer))
    return as_teacher(tiny_llama(tokens + 20), tiny_tokenizer, tmp_path_factory.mktemp("signals-teacher"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, teacher: Path, tiny_corpus: Path) -> Path:
    """Manifest of a store with features of hard tokens."""
    folder = tmp_path_factory.mktemp("signals")
    output = folder / "results" / "manifest.json"
    write_signals(SETTINGS, HARD, teacher, tiny_corpus, folder / "cache", output, "fp32")
    return output


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each forward pass of the teacher."""
    counted: list[int] = []
    plain = entkd.models.by_document.trunk_forward

    def counting(model, input_ids_BL, position_ids_BL, capture=()):
        assert not model.training
        assert torch.is_inference_mode_enabled()
        counted.append(input_ids_BL.numel())
        return plain(model, input_ids_BL, position_ids_BL, capture=capture)

    monkeypatch.setattr(entkd.models.by_document, "trunk_forward", counting)
    return counted


def test_a_second_call_runs_no_teacher(teacher, tiny_corpus, tmp_path, forwards):
    first, second = tmp_path / "a" / "manifest.json", tmp_path / "b" / "c" / "manifest.json"
    write_signals(SETTINGS, HARD, teacher, tiny_corpus, tmp_path / "cache", first, "fp32")
    assert forwards
    summary = json.loads(first.read_text())["summary"]
    real = sum(len(np.load(tiny_corpus / f"{split}.ids.npy")) for split in ("train", "test"))
    assert summary["teacher_tokens"] == real
    assert sum(forwards) < 1.35 * real  # each document once, and little padding even with these tiny batches
    forwards.clear()
    write_signals(SETTINGS, HARD, teacher, tiny_corpus, tmp_path / "cache", second, "fp32")
    assert forwards == []
    assert torch.equal(SignalStore.open(first).head_UE, SignalStore.open(second).head_UE)
    assert (tmp_path / "a" / "entropy.csv").read_bytes() == (tmp_path / "b" / "c" / "entropy.csv").read_bytes()


class Killed(BaseException):
    """Stands for a signal that ends the process."""


def test_results_may_be_a_link_to_another_disk(written, teacher, tiny_corpus, tmp_path):
    (tmp_path / "elsewhere/deep/er").mkdir(parents=True)
    (tmp_path / "results").symlink_to(tmp_path / "elsewhere/deep/er")
    output = tmp_path / "results/signals/manifest.json"
    write_signals(SETTINGS, HARD, teacher, tiny_corpus, tmp_path / "cache", output, "fp32")
    assert tree(SignalStore.open(output).folder) == tree(SignalStore.open(written).folder)


@pytest.mark.parametrize("shards_before", [0, 1, 4])
def test_an_interrupted_write_continues_at_the_last_whole_shard(
    written, teacher, tiny_corpus, tmp_path, forwards, monkeypatch, shards_before
):
    uninterrupted = SignalStore.open(written).folder
    plain, done = entkd.signals.write._write_shard, []

    def stop_after(folder, shard, result, key):
        if len(done) == shards_before:
            for leftover in (f".{shard.file}.tmp", ".train-00099.safetensors.tmp", ".tmpXq3f9a"):
                (folder / leftover).write_bytes(b"half")
            raise Killed
        plain(folder, shard, result, key)
        done.append(shard)

    monkeypatch.setattr(entkd.signals.write, "_write_shard", stop_after)
    arguments = (SETTINGS, HARD, teacher, tiny_corpus, tmp_path / "cache", tmp_path / "manifest.json", "fp32")
    with pytest.raises(Killed):
        write_signals(*arguments)
    assert not (tmp_path / "manifest.json").exists()
    monkeypatch.setattr(entkd.signals.write, "_write_shard", plain)
    forwards.clear()
    write_signals(*arguments)
    folder = SignalStore.open(tmp_path / "manifest.json").folder
    assert folder.name == uninterrupted.name
    assert tree(folder) == tree(uninterrupted)
    assert not [path.name for path in folder.iterdir() if ".tmp" in path.name]
    left = 0
    for shard in plan_shards(SETTINGS, HARD["splits"], tiny_corpus):
        if shard.file not in {finished.file for finished in done}:
            lengths = Corpus.open(tiny_corpus, shard.split).lengths
            passes = [blocks for blocks, _ in plan_batches(lengths, shard.documents, 96)]
            left += sum(-(-int(lengths[np.concatenate(blocks)].sum()) // 16) * 16 for blocks in passes)
    assert sum(forwards) == left
    assert json.loads((tmp_path / "manifest.json").read_text())["summary"]["shards_found"] == len(done)


@pytest.mark.parametrize("damage", ["cut", "removed"])
@pytest.mark.parametrize("damaged", [("train-00003", "train-00000"), ("calibration", "test-00000"), ("head",)])
def test_a_damaged_file_is_written_again(written, teacher, tiny_corpus, tmp_path, damage, damaged):
    cache = SignalStore.open(written).folder.parents[1]
    shutil.copytree(cache, tmp_path / "cache")
    folder = tmp_path / "cache" / "signals" / SignalStore.open(written).folder.name
    for name in (f"{stem}.safetensors" for stem in damaged):
        if damage == "cut":
            (folder / name).write_bytes((folder / name).read_bytes()[:-40])
        else:
            (folder / name).unlink()
    write_signals(SETTINGS, HARD, teacher, tiny_corpus, tmp_path / "cache", tmp_path / "manifest.json", "fp32")
    assert tree(folder) == tree(SignalStore.open(written).folder)


def test_verify_finds_agreement_and_damage(written, teacher, tiny_corpus, tmp_path, capsys):
    assert verify(written, teacher, tiny_corpus, 4) == 0
    lines = capsys.readouterr().out.splitlines()
    entropy, kl = (
        next(line for line in lines if line.startswith(f"train: {name}")) for name in ("error of the e", "KL")
    )
    assert float(entropy.split("max ")[1].split(",")[0]) < 2e-5
    assert 0 < float(kl.split("mean ")[1].split(" ")[0]) < 1e-3
    shutil.copytree(written.parents[1], tmp_path / "copy")
    copy = tmp_path / "copy" / "results" / "manifest.json"
    shard = SignalStore.open(copy).folder / "train-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert verify(copy, teacher, tiny_corpus, 4) == 1
    assert "train-00002.safetensors: checksum differs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tensor", "measure"),
    [
        ("hidden", "KL(exact ‖ stored)"),
        ("entropy", "error of the entropy"),
        ("target_logprob", "error of log p(target)"),
        ("feature_2", "relative error of feature layers"),
    ],
)
def test_verify_finds_rows_of_other_tokens(written, teacher, tiny_corpus, tmp_path, capsys, tensor, measure):
    """Checksums that agree with a wrong content are no proof."""
    split = "train" if tensor.startswith("feature") else "test"
    shutil.copytree(written.parents[1], tmp_path / "copy")
    manifest = tmp_path / "copy" / "results" / "manifest.json"
    put_rows_elsewhere(SignalStore.open(manifest).folder, split, tensor)
    assert verify(manifest, teacher, tiny_corpus, 12) == 1
    (problem,) = [line for line in capsys.readouterr().out.splitlines() if "this teacher says of these tokens" in line]
    assert problem.startswith(f"{split}: mean of {measure} above ")


def put_rows_elsewhere(folder, split, name):
    """Every row of a tensor is that of another token, with checksums that agree."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for file in (file for file in manifest["files"] if re.fullmatch(rf"{split}-\d+\.safetensors", file)):
        tensors = {key: tensor.clone() for key, tensor in load_file(folder / file).items()}
        # Not by one: neighbours may be alike.
        save_file(
            tensors | {name: tensors[name].roll(max(1, len(tensors[name]) // 2), 0)}, folder / file, {"entkd": "{}"}
        )
        manifest["files"][file]["sha256"] = file_sha256(folder / file)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_verify_looks_at_the_states_beside_log_probabilities(teacher, tiny_corpus, tmp_path, capsys):
    settings, manifest = SETTINGS.model_copy(update={"mode": "logprobs"}), tmp_path / "manifest.json"
    write_signals(settings, HARD, teacher, tiny_corpus, tmp_path / "cache", manifest, "fp32")
    assert verify(manifest, teacher, tiny_corpus, 12) == 0
    assert "test: KL(exact ‖ stored): max" in capsys.readouterr().out
    put_rows_elsewhere(SignalStore.open(manifest).folder, "test", "hidden")
    assert verify(manifest, teacher, tiny_corpus, 12) == 1
    assert "test: mean of KL(exact ‖ of stored states) above 0.01" in capsys.readouterr().out


def test_verify_refuses_another_teacher(written, tiny_corpus, tiny_tokenizer, tmp_path):
    other = as_teacher(tiny_llama(320, seed=1), tiny_tokenizer, tmp_path / "other")
    with pytest.raises(UserError, match=r"made from other inputs.*: teacher differ"):
        verify(written, other, tiny_corpus, 4)


def test_the_key_depends_on_all_that_the_numbers_depend_on(teacher, tiny_corpus, tiny_tokenizer, tmp_path):
    base = describe_content(SETTINGS, HARD, teacher, tiny_corpus, torch.float32)
    other_teacher = as_teacher(tiny_llama(320, seed=1), tiny_tokenizer, tmp_path / "other")
    other_data = tmp_path / "data"
    shutil.copytree(tiny_corpus, other_data)
    manifest = json.loads((other_data / "manifest.json").read_text())
    manifest["files"]["test.prompt_lengths.npy"] = "0" * 64
    (other_data / "manifest.json").write_text(json.dumps(manifest))
    variants = [
        describe_content(SETTINGS, HARD, other_teacher, tiny_corpus, torch.float32),
        describe_content(SETTINGS, HARD, teacher, other_data, torch.float32),
        describe_content(SETTINGS, ALL, teacher, tiny_corpus, torch.float32),
        describe_content(SETTINGS, HARD, teacher, tiny_corpus, torch.bfloat16),
        describe_content(
            Signals(calibration_tokens=151, shard_tokens=120, batch_tokens=96),
            HARD,
            teacher,
            tiny_corpus,
            torch.float32,
        ),
        base | {"vocab_size": base["vocab_size"] + 1},
        base | {"format": base["format"] + 1},
    ]
    keys = {content_key(content) for content in [base, *variants]}
    assert len(keys) == len(variants) + 1
    # what is not used changes nothing: the dev split
    manifest["files"] = json.loads((tiny_corpus / "manifest.json").read_text())["files"] | {"dev.ids.npy": "0" * 64}
    (other_data / "manifest.json").write_text(json.dumps(manifest))
    assert content_key(describe_content(SETTINGS, HARD, teacher, other_data, torch.float32)) == content_key(base)


def test_data_of_another_tokenizer_are_refused_before_anything_runs(teacher, tiny_corpus, tmp_path, forwards):
    data = tmp_path / "data"
    shutil.copytree(tiny_corpus, data)
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps(manifest | {"tokenizer": "f" * 64}))
    with pytest.raises(UserError, match=r"another tokenizer.*ffffffffffff"):
        write_signals(SETTINGS, HARD, teacher, data, tmp_path / "cache", tmp_path / "manifest.json", "fp32")
    assert not forwards
    assert not (tmp_path / "cache").exists()


def test_a_head_with_too_few_rows_is_refused_with_both_sizes(tiny_corpus, tiny_tokenizer, tmp_path, forwards):
    small = as_teacher(tiny_llama(299), tiny_tokenizer, tmp_path / "small")
    with pytest.raises(UserError, match=r"299 rows.*300"):
        write_signals(SETTINGS, HARD, small, tiny_corpus, tmp_path / "cache", tmp_path / "manifest.json", "fp32")
    assert not forwards


def test_nan_in_the_teachers_output_names_the_document(teacher, tiny_corpus, tmp_path, monkeypatch):
    """The hidden state of one token of train-7 is NaN."""
    corpus, plain = Corpus.open(tiny_corpus, "train"), entkd.signals.teacher_pass.packed_states
    last_token = int(corpus.response_offsets[8]) - 1

    def broken(model, batch, layers):
        hidden_NE, captured = plain(model, batch, layers)
        hidden_NE[batch.tokens_N == last_token] = float("nan")
        return hidden_NE, captured

    monkeypatch.setattr(entkd.signals.teacher_pass, "packed_states", broken)
    last = int(corpus.response_lengths[7]) - 1
    with pytest.raises(UserError, match=f"1 tokens, first at response token {last} of train document 'train-7'"):
        write_signals(SETTINGS, HARD, teacher, tiny_corpus, tmp_path / "cache", tmp_path / "manifest.json", "fp32")


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path):
    """The kernel refuses the write: files of this process may have 10,000 bytes here."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"train-00000\.safetensors: cannot be written.*needs 40,000 bytes") as caught:
            write_tensors(tmp_path / "train-00000.safetensors", {"entropy": torch.zeros(10_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert isinstance(caught.value, WriteError)
    assert isinstance(caught.value, UserError)
    assert list(tmp_path.iterdir()) == []


def test_two_jobs_do_not_write_one_store(tmp_path, capsys):
    entered = threading.Event()

    def other() -> None:
        with locked(tmp_path / "lock", "these teacher signals"):
            entered.set()

    with locked(tmp_path / "lock", "these teacher signals"):
        with (tmp_path / "lock").open("w") as stream, pytest.raises(BlockingIOError):
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        job = threading.Thread(target=other)
        job.start()
        assert not entered.wait(0.3)
    assert entered.wait(5)
    job.join()
    assert "another process works on these teacher signals" in capsys.readouterr().err


@given(st.lists(st.integers(2, 30), min_size=1, max_size=40), st.integers(8, 200))
def test_batches_hold_every_document_once_and_keep_to_the_size(lengths, batch_tokens):
    lengths = np.asarray(lengths)
    batches = list(plan_batches(lengths, np.arange(len(lengths)), batch_tokens))
    packed = np.concatenate([documents for blocks, _ in batches for documents in blocks])
    assert sorted(packed.tolist()) == list(range(len(lengths)))
    for blocks, block in batches:
        assert all(lengths[documents].sum() <= block for documents in blocks)
        assert len(blocks) * block <= max(batch_tokens, block)


def test_shards_hold_every_document_once_calibration_first(tiny_corpus):
    shards = plan_shards(SETTINGS, ["train", "test"], tiny_corpus)
    assert [shard.calibration for shard in shards] == sorted((shard.calibration for shard in shards), reverse=True)
    for split in ("train", "test"):
        own = [shard for shard in shards if shard.split == split]
        lengths = Corpus.open(tiny_corpus, split).response_lengths
        assert sorted(np.concatenate([shard.documents for shard in own]).tolist()) == list(range(len(lengths)))
        assert len({shard.file for shard in own}) == len(own)
        assert all(lengths[shard.documents[:-1]].sum() < 2 * SETTINGS.shard_tokens for shard in own)
    more = Signals(calibration_tokens=10**6, shard_tokens=120, batch_tokens=96)
    assert all(shard.calibration for shard in plan_shards(more, ["train"], tiny_corpus))

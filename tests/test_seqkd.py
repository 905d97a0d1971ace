from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import ending_early
from transformers import PreTrainedTokenizerFast

from entkd.config import JsonData, Method, Signals, Student, Training
from entkd.data import Corpus, prepare, read_texts, seqkd
from entkd.distill import distill
from entkd.errors import UserError
from entkd.models import init_student, load_model, load_tokenizer, save_model
from entkd.signals.write import write_signals

MAX_TOKENS = 24


@pytest.fixture(scope="module")
def folders(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Teacher, source data, SeqKD data. The teacher ends some greedy responses early."""
    root = tmp_path_factory.mktemp("seqkd")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer)
    rows = [{"prompt": f"{'word ' * (n % 4)}question {n}", "response": f"answer {n}"} for n in range(15)]
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    save_model(ending_early(prompts), tokenizer, root / "teacher")
    (root / "rows.json").write_text(json.dumps(rows))
    data = JsonData(files={"train": root / "rows.json"}, template="plain", dev=2, test=3, max_tokens=MAX_TOKENS)
    prepare(data, root / "teacher", root / "data")
    # bf16 rounds, and then chooses other tokens than the fp32 reference below
    settings = {"max_response_tokens": 20, "batch": 4, "precision": "fp32"}
    seqkd.prepare_seqkd(root / "teacher", root / "data", root / "seqkd", **settings)
    return root / "teacher", root / "data", root / "seqkd"


def test_responses_are_the_teachers_greedy_ones(folders: tuple[Path, Path, Path], evidence) -> None:
    teacher, data, output = folders
    model = load_model(teacher, dtype=torch.float32)
    source, corpus = Corpus.open(data, "train"), Corpus.open(output, "train")
    assert len(corpus) == len(source) == 10
    ended = 0
    for index, text in enumerate(read_texts(output, "train")):
        ids, prompt_length = corpus.document(index)
        before, before_length = source.document(index)
        assert ids[:prompt_length].tolist() == before[:before_length].tolist()
        prompt = torch.tensor([ids[:prompt_length].tolist()])
        greedy = model.generate(prompt, do_sample=False, max_new_tokens=20, use_cache=True)[0, prompt_length:].tolist()
        response = ids[prompt_length:].tolist()
        assert response == greedy[: MAX_TOKENS - prompt_length]
        assert text["cut"] == (response[-1] != 2)
        ended += not text["cut"]
    assert ended > 0
    evidence("seqkd", "reference", "as `sft`, on the data's prompts and the greedy text of Transformers' `generate`")


def test_texts_follow_the_tokens(folders: tuple[Path, Path, Path]) -> None:
    teacher, data, output = folders
    tokenizer, corpus = load_tokenizer(teacher), Corpus.open(output, "train")
    for index, (own, source) in enumerate(zip(read_texts(output, "train"), read_texts(data, "train"), strict=True)):
        ids, prompt_length = corpus.document(index)
        assert tokenizer.decode(ids[prompt_length:]) == own["response"] + ("" if own["cut"] else "<|im_end|>")
        assert (own["id"], own["user"], own["prompt"]) == (source["id"], source["user"], source["prompt"])


def test_dev_and_test_are_copied_and_the_origin_noted(folders: tuple[Path, Path, Path]) -> None:
    _, data, output = folders
    source, manifest = (json.loads((folder / "manifest.json").read_text()) for folder in (data, output))
    for split in ("dev", "test"):
        for suffix in ("ids.npy", "offsets.npy", "prompt_lengths.npy", "jsonl"):
            name = f"{split}.{suffix}"
            assert (data / name).read_bytes() == (output / name).read_bytes()
            assert manifest["files"][name] == source["files"][name]
        assert manifest["splits"][split] == source["splits"][split]
    assert manifest["settings"]["origin"]["pipeline"] == "seqkd"
    assert manifest["splits"]["train"]["response_tokens"] == Corpus.open(output, "train").response_tokens


def test_components_that_do_nothing_change_nothing(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Features of no token are all: SeqKD has no divergence that a curriculum or a temperature could shape."""
    for name in ("curriculum", "temperature"):
        with pytest.raises(ValueError, match=f"{name} shapes the divergence term, which is null here"):
            Method.model_validate({"ce": {}, name: {}})
    teacher, _, data = folders
    root = tmp_path / "teacher"
    root.mkdir()
    (root / "model").symlink_to(teacher)
    (root / "manifest.json").write_text(json.dumps({"sha256": "0" * 64}))
    init_student(Student(layers=(0, 1, 3)), root, tmp_path / "student", 0)
    signals = tmp_path / "signals" / "manifest.json"
    needs = {"features": {"points": 3, "tokens": "all", "threshold": 0.8}, "splits": ["train"]}
    write_signals(Signals(), needs, root, data, tmp_path / "cache", signals, "fp32")
    training = Training(steps=6, block=32, blocks_per_step=4, micro_blocks=2, lr=3e-3, precision="fp32", eval_every=3)
    found = {}
    for name, features in {"alone": None, "none": {"threshold": 1.0}, "some": {"threshold": 0.8}}.items():
        method = Method.model_validate({"ce": {}, "features": features})
        inputs = (method, training, 0, tmp_path / "student", data, signals if method.needs_signals else None)
        distill(*inputs, tmp_path / name)
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses = [row["loss"] for row in rows if "loss" in row]
        assert len(losses) == 6
        found[name] = losses, load_file(tmp_path / name / "model" / "model.safetensors")
    (losses, weights), (without, same), (_, others) = found.values()
    assert without == pytest.approx(losses, abs=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(same[name], weight, rtol=0, atol=1e-6)
    assert any((others[name] - weight).abs().max() > 1e-4 for name, weight in weights.items())


def test_data_of_another_tokenizer_is_refused(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    teacher, data, _ = folders
    tokenizer = load_tokenizer(teacher)
    tokenizer.add_tokens(["another"])
    save_model(load_model(teacher), tokenizer, tmp_path / "teacher")
    with pytest.raises(UserError, match="was tokenised with another tokenizer"):
        seqkd.prepare_seqkd(
            tmp_path / "teacher", data, tmp_path / "out", max_response_tokens=4, batch=4, precision="fp32"
        )

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import ending_early
from transformers import PreTrainedTokenizerFast

from entkd.config import JsonData
from entkd.data import Corpus, prepare, read_texts, seqkd
from entkd.errors import UserError
from entkd.models import load_model, load_tokenizer, save_model

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


def test_data_of_another_tokenizer_is_refused(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    teacher, data, _ = folders
    tokenizer = load_tokenizer(teacher)
    tokenizer.add_tokens(["another"])
    save_model(load_model(teacher), tokenizer, tmp_path / "teacher")
    with pytest.raises(UserError, match="was tokenised with another tokenizer"):
        seqkd.prepare_seqkd(
            tmp_path / "teacher", data, tmp_path / "out", max_response_tokens=4, batch=4, precision="fp32"
        )

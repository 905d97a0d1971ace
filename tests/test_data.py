from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_llama
from transformers import PreTrainedTokenizerFast

import entkd.data.synthetic as synthetic_module
from entkd.config import HubData, JsonData, SyntheticData
from entkd.data import Corpus, prepare, read_texts
from entkd.data.duplicates import NearDuplicates, word_trigrams
from entkd.data.templates import Formatter
from entkd.errors import UserError
from entkd.models import save_model

SPLITS = ("train", "dev", "test")


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(count: int, word: str = "question") -> list[dict]:
    return [{"prompt": f"{word} {index}?", "response": f"the answer {index}"} for index in range(count)]


def json_data(folder: Path, train: list[dict], **changes) -> JsonData:
    files = {"train": write_jsonl(folder / "train.jsonl", train)}
    for split in ("dev", "test"):
        if isinstance(changes.get(split), list):
            files[split] = write_jsonl(folder / f"{split}.jsonl", changes.pop(split))
    return JsonData(**{"files": files, "dev": 2, "test": 3} | changes)


# Templates and documents


def test_chat_document_is_the_template_and_ends_with_eos_though_it_is_the_pad_token(tokenizer) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    formatter = Formatter(tokenizer, "chat", 200)
    document = formatter.document("x", [{"role": "user", "content": "what is it"}], ["a cat"])
    assert document.text["prompt"] == "<|im_start|>user\nwhat is it<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(document.prompt_ids) == document.text["prompt"]
    assert tokenizer.decode(document.response_ids) == "a cat<|im_end|>"
    assert document.response_ids[-1] == 2
    assert document.text | {"prompt": ""} == {
        "id": "x", "prompt": "", "response": "a cat", "user": "what is it", "cut": False,
    }  # fmt: skip


def test_alpaca_and_plain_texts(tokenizer) -> None:
    messages = [{"role": "user", "content": "Name a cat."}]
    assert Formatter(tokenizer, "plain", 99).prompt_text(messages) == "Name a cat."
    assert Formatter(tokenizer, "alpaca", 99).prompt_text(messages) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName a cat.\n\n### Response:\n"
    )


@pytest.mark.parametrize("template", ["alpaca", "plain"])
def test_several_turns_need_the_chat_template(tokenizer, template: str) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    with pytest.raises(ValueError, match=r"takes one user turn, not \(system, user\); use `template: chat`"):
        Formatter(tokenizer, template, 99).prompt_text(messages)


def test_turns_that_the_chat_template_refuses_are_a_plain_error(tiny_tokenizer: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer)
    tokenizer.chat_template = "{{ raise_exception('system turns are not supported') }}"
    with pytest.raises(ValueError, match="refuses these turns: system turns are not supported"):
        Formatter(tokenizer, "chat", 99).prompt_text([{"role": "system", "content": "s"}])


def test_tokenizer_without_chat_template_is_refused_naming_the_others(tiny_tokenizer: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template; use `template: alpaca` or `template: plain`"):
        Formatter(tokenizer, "chat", 99)
    assert Formatter(tokenizer, "plain", 99).end_of_response == 2


def test_template_parts_by_hand(tokenizer) -> None:
    formatter = Formatter(tokenizer, "chat", 99)
    assert tokenizer.decode(formatter.before_request) == "<|im_start|>user\n"
    assert formatter.end_of_request == formatter.end_of_response == 2


def test_end_of_turn_may_differ_from_eos(tiny_tokenizer: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer, eos_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert tokenizer.eos_token_id == 0
    assert Formatter(tokenizer, "chat", 99).end_of_response == 2
    assert Formatter(tokenizer, "plain", 99).end_of_response == 0


@pytest.mark.parametrize(
    ("adds", "text", "expected"), [(True, "cat", 1), (True, "<|im_start|>cat", 1), (False, "cat", 0)]
)
def test_exactly_one_bos_where_the_tokenizer_adds_it(
    tiny_tokenizer: Path, adds: bool, text: str, expected: int
) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer, bos_token="<|im_start|>")
    if adds:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    document = Formatter(tokenizer, "plain", 99).document("x", [{"role": "user", "content": text}], ["dog"])
    assert [*document.prompt_ids, *document.response_ids].count(1) == expected
    assert (document.prompt_ids[0] == 1) == bool(expected)


def test_boundary_is_exact_though_the_characters_would_merge(tokenizer) -> None:
    joined = tokenizer(" the", add_special_tokens=False)["input_ids"]
    document = Formatter(tokenizer, "plain", 99).document("x", [{"role": "user", "content": " t"}], ["he"])
    assert len(joined) < len(document.prompt_ids) + len(document.response_ids) - 1
    assert tokenizer.decode(document.prompt_ids) == " t"
    assert tokenizer.decode(document.response_ids[:-1]) == "he"


def test_long_response_is_cut_without_eos_and_long_prompt_dropped(tokenizer) -> None:
    messages = [{"role": "user", "content": "cat"}]
    full = Formatter(tokenizer, "plain", 99).document("x", messages, ["jumps over the lazy dog"])
    prompt, response = len(full.prompt_ids), len(full.response_ids)
    exact = Formatter(tokenizer, "plain", prompt + response).document("x", messages, ["jumps over the lazy dog"])
    assert exact == full
    # One token less: the text is whole, but its EOS is not there to be learned.
    cut = Formatter(tokenizer, "plain", prompt + response - 1).document("x", messages, ["jumps over the lazy dog"])
    assert list(cut.response_ids) == list(full.response_ids[:-1])
    assert cut.text["cut"]
    shorter = Formatter(tokenizer, "plain", prompt + 2).document("x", messages, ["jumps over the lazy dog"])
    assert shorter.text["response"] == tokenizer.decode(full.response_ids[:2])
    assert Formatter(tokenizer, "plain", prompt).document("x", messages, ["jumps"]) is None


# Duplicates


def jaccard(a: frozenset, b: frozenset) -> float:
    return len(a & b) / len(a | b)


def test_near_duplicates_by_hand() -> None:
    seen = NearDuplicates(0.5)
    assert seen.add("Tell me a story about a cat")
    assert not seen.add("tell me, a story about a CAT!")  # the same words
    assert not seen.add("Tell me a story about a dog")  # 4 of 6 trigrams
    assert seen.add("Tell me about the cat")
    assert seen.add("cat")
    assert not seen.add("Cat?")
    assert seen.add("...")
    assert not seen.add("...")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=8).map(" ".join), max_size=25))
def test_near_duplicates_equal_the_comparison_of_all_pairs(texts: list[str]) -> None:
    seen, kept = NearDuplicates(0.4), []
    for text in texts:
        expected = all(jaccard(word_trigrams(text), word_trigrams(other)) < 0.4 for other in kept)
        assert seen.add(text) == expected
        if expected:
            kept.append(text)


# Local files


def test_manifest_and_arrays_describe_the_rows(tiny_teacher: Path, tmp_path: Path, tokenizer) -> None:
    train = [*rows_of(4), {"prompt": "long " * 60, "response": "x"}, {"prompt": "q", "response": "cat " * 60}]
    data = json_data(tmp_path, train, dev=rows_of(2, "dev"), test=rows_of(3, "test"), max_tokens=64)
    manifest = prepare(data, tiny_teacher, tmp_path / "out")
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["vocab_size"] == 300
    assert manifest["eos_token_id"] == 2
    assert manifest["tokenizer"] == hashlib.sha256((tiny_teacher / "tokenizer.json").read_bytes()).hexdigest()
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest
    assert len(manifest["files"]) == 12
    summary = manifest["splits"]["train"]
    assert summary["dropped"] == {"prompt_too_long": 1}
    assert summary["documents"] == 5
    assert summary["cut_share"] == 1 / 5
    corpus = Corpus.open(tmp_path / "out", "train")
    texts = read_texts(tmp_path / "out", "train")
    assert summary["tokens"] == len(corpus.ids) == corpus.lengths.sum()
    assert summary["response_tokens"] == corpus.response_tokens
    assert (corpus.ids.dtype, corpus.offsets.dtype, corpus.prompt_lengths.dtype) == (np.int32, np.int64, np.int32)
    for index, text in enumerate(texts):
        ids, prompt_length = corpus.document(index)
        end = "" if text["cut"] else "<|im_end|>"
        assert tokenizer.decode(ids[:prompt_length]) == text["prompt"]
        assert tokenizer.decode(ids[prompt_length:]) == text["response"] + end
    assert [text["user"] for text in texts] == [row["prompt"] for row in (*train[:4], train[5])]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_formats_give_the_same_data(tiny_teacher: Path, tmp_path: Path, suffix: str) -> None:
    rows = [{"q": f"question\u2028 {n}", "a": [f"one {n}", f"two {n}"]} for n in range(8)]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    data = JsonData(files={"train": path}, prompt="q", response="a", dev=1, test=1)
    prepare(data, tiny_teacher, tmp_path / "out")
    texts = [text for split in SPLITS for text in read_texts(tmp_path / "out", split)]
    assert sorted(text["user"] for text in texts) == [row["q"] for row in rows]
    for text in texts:  # the first reference is trained on, all are kept
        number = text["user"][-1]
        assert text["response"] == f"one {number}"
        assert text["references"] == [f"one {number}", f"two {number}"]


def test_messages_take_the_last_assistant_turn(tiny_teacher: Path, tmp_path: Path) -> None:
    def chat(number: int) -> list[dict]:
        contents = (("user", f"first {number}"), ("assistant", "early"), ("user", "second"), ("assistant", "late"))
        return [{"role": role, "content": content} for role, content in contents]

    data = json_data(tmp_path, [{"chat": chat(n)} for n in range(6)], messages="chat", dev=1, test=1)
    prepare(data, tiny_teacher, tmp_path / "out")
    text = read_texts(tmp_path / "out", "test")[0]
    assert text["response"] == "late"
    assert text["user"] == "second"
    assert text["prompt"].endswith(
        "<|im_start|>assistant\nearly<|im_end|>\n<|im_start|>user\nsecond<|im_end|>\n<|im_start|>assistant\n"
    )


def test_missing_splits_are_taken_from_train_at_random_but_seeded(tiny_teacher: Path, tmp_path: Path) -> None:
    users: list[dict[str, list[str]]] = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare(json_data(tmp_path, rows_of(20), seed=seed), tiny_teacher, tmp_path / name)
        users.append({split: [text["user"] for text in read_texts(tmp_path / name, split)] for split in SPLITS})
    assert {split: len(found) for split, found in users[0].items()} == {"train": 15, "dev": 2, "test": 3}
    assert sorted(user for found in users[0].values() for user in found) == sorted(row["prompt"] for row in rows_of(20))
    assert users[0] == users[1]
    assert users[0]["test"] != users[2]["test"]


def test_nothing_of_test_is_in_train_and_the_removed_are_counted(tiny_teacher: Path, tmp_path: Path) -> None:
    test, dev = rows_of(3), rows_of(5)  # dev repeats the three prompts of test
    train = [{"prompt": f" question {n}?\n", "response": "another"} for n in range(7)]
    manifest = prepare(json_data(tmp_path, train, dev=dev, test=test), tiny_teacher, tmp_path / "out")
    users = {split: {text["user"].strip() for text in read_texts(tmp_path / "out", split)} for split in SPLITS}
    assert users["train"] == {"question 5?", "question 6?"}
    assert users["dev"] == {"question 3?", "question 4?"}
    assert manifest["splits"]["train"]["dropped"] == {"prompt in dev or test": 5}
    assert manifest["splits"]["dev"]["dropped"] == {"prompt in test": 3}


def test_limit_holds_for_every_split(tiny_teacher: Path, tmp_path: Path) -> None:
    data = json_data(tmp_path, rows_of(9), dev=rows_of(6, "dev"), limit=4)
    manifest = prepare(data, tiny_teacher, tmp_path / "out")
    assert {split: entry["documents"] for split, entry in manifest["splits"].items()} == {
        "train": 4, "dev": 4, "test": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([], {}, r"train.jsonl: no rows; an empty dataset cannot be used"),
        ([{"prompt": "a", "response": "b"}, {"prompt": "a"}], {}, r"row 2: prompt without response: column `response`"),
        ([{"prompt": "a", "response": " "}], {}, r"row 1: prompt without response: column `response` is empty"),
        ([{"prompt": "a", "response": []}], {}, r"row 1: prompt without response"),
        ([{"prompt": None, "response": "b"}], {}, r"row 1: row without prompt: column `prompt` is empty"),
        ([{"prompt": "a", "response": 3}], {}, r"row 1: column `response` holds int, expected text"),
        (rows_of(3), {"response": "respons"}, r"data.response: unknown name `respons`; did you mean `response`\?"),
        (rows_of(3), {"messages": "chat"}, r"data.messages: unknown name `chat`.* Known: prompt, response"),
        (rows_of(5), {}, r"data.dev: 2 rows of dev cannot be taken from train, which has 2 left"),
        ([{"m": [{"role": "user", "content": "x"}]}], {"messages": "m"}, r"prompt without response: column `m`"),
        ([{"m": [{"role": "user"}]}], {"messages": "m"}, r"column `m` needs turns with text `role` and `content`"),
    ],
)
def test_bad_rows_are_refused(tiny_teacher: Path, tmp_path: Path, rows, changes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(json_data(tmp_path, rows, **changes), tiny_teacher, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_bad_files_are_refused(tiny_teacher: Path, tmp_path: Path) -> None:
    def refused(name: str, text: str | None, message: str) -> None:
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message):
            prepare(JsonData(files={"train": tmp_path / name}), tiny_teacher, tmp_path / "out")

    refused("absent.jsonl", None, r"absent.jsonl does not exist")
    refused("a.csv", "x", r"a.csv ends in `.csv`; known: .json, .jsonl, .parquet")
    refused("b.jsonl", '{"prompt": "a", "response": "b"}\n{"prompt"', r"b.jsonl: line 2: not JSON")
    refused("c.json", '{"prompt": "a"}', r"c.json: expected JSON objects")
    refused("d.parquet", "no", r"d.parquet: not a parquet file")


def test_reading_unfinished_data_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `entkd prepare-data` first"):
        Corpus.open(tmp_path, "train")


# Hub datasets, read from local folders


def test_hub_dataset_from_a_local_folder(tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "dataset"
    folder.mkdir()
    for name, rows in (("train", rows_of(9)), ("validation", rows_of(2, "dev"))):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{name}.parquet")
    splits = {"train": "train", "dev": "validation"}
    data = HubData(repo=str(folder), revision="main", splits=splits, test=3)
    manifest = prepare(data, tiny_teacher, tmp_path / "out")
    assert {split: entry["documents"] for split, entry in manifest["splits"].items()} == {
        "train": 6, "dev": 2, "test": 3,
    }  # fmt: skip
    assert [text["user"] for text in read_texts(tmp_path / "out", "dev")] == ["dev 0?", "dev 1?"]
    with pytest.raises(UserError, match=r"data.repo .*dataset .*nosuch"):
        prepare(data.model_copy(update={"splits": {"train": "nosuch"}}), tiny_teacher, tmp_path / "out")


# Synthetic data


SYNTHETIC = SyntheticData(
    train=6, dev=2, test=3, min_prompt_tokens=2, max_prompt_tokens=60, min_response_tokens=8, max_response_tokens=12,
    batch=24,
)  # fmt: skip


@pytest.fixture(scope="module")
def writer(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose next token is almost uniform, so EOS comes once in 300 tokens."""
    folder = tmp_path_factory.mktemp("writer")
    save_model(tiny_llama(initializer_range=0.02), PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer), folder)
    return folder


@pytest.fixture(scope="module")
def synthetic(writer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic")
    prepare(SYNTHETIC, writer, folder)
    return folder


def test_synthetic_documents_keep_the_limits(synthetic: Path, tokenizer) -> None:
    manifest = json.loads((synthetic / "manifest.json").read_text())
    assert {split: entry["documents"] for split, entry in manifest["splits"].items()} == {
        "train": 6, "dev": 2, "test": 3,
    }  # fmt: skip
    dropped = manifest["splits"]["train"]["dropped"]
    assert dropped["request_too_long"] > 0
    cut = 0
    for split in SPLITS:
        corpus = Corpus.open(synthetic, split)
        for index, text in enumerate(read_texts(synthetic, split)):
            ids, prompt_length = corpus.document(index)
            response = ids[prompt_length:].tolist()
            assert tokenizer.decode(ids[:prompt_length]) == text["prompt"]
            assert text["user"] == text["user"].strip() != ""
            assert f"<|im_start|>user\n{text['user']}<|im_end|>\n<|im_start|>assistant\n" == text["prompt"]
            assert 2 not in response[:-1]
            assert text["cut"] == (response[-1] != 2)
            # Cut exactly at the limit, or ended by EOS before it with at least the least number of tokens.
            assert len(response) == 12 if text["cut"] else 8 + 1 <= len(response) <= 12
            cut += text["cut"]
    assert cut > 0


def test_synthetic_requests_hold_no_near_duplicates_in_any_two_splits(synthetic: Path) -> None:
    grams = [word_trigrams(text["user"]) for split in SPLITS for text in read_texts(synthetic, split)]
    assert all(jaccard(a, b) < 0.7 for index, a in enumerate(grams) for b in grams[:index])


def test_a_dropped_response_is_replaced_without_another_round(
    writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[int] = []
    respond = synthetic_module._Writer.respond

    def losing_one(self, requests, first):
        rounds.append(len(requests))
        return respond(self, requests, first)[1:]

    monkeypatch.setattr(synthetic_module._Writer, "respond", losing_one)
    manifest = prepare(SYNTHETIC, writer, tmp_path)
    assert rounds == [12]  # one to spare for eleven
    assert sum(entry["documents"] for entry in manifest["splits"].values()) == 11


def test_synthetic_data_repeat_with_the_seed(synthetic: Path, writer: Path, tmp_path: Path) -> None:
    again = prepare(SYNTHETIC, writer, tmp_path / "again")
    assert again == json.loads((synthetic / "manifest.json").read_text())
    other = prepare(SYNTHETIC.model_copy(update={"seed": 1}), writer, tmp_path / "other")
    assert other["files"]["train.ids.npy"] != again["files"]["train.ids.npy"]


def test_teacher_that_writes_no_usable_request_is_refused(tiny_teacher: Path, tmp_path: Path) -> None:
    smaller = {"train": 1, "dev": 1, "test": 1, "batch": 8, "min_prompt_tokens": 6, "max_prompt_tokens": 5}
    never = SYNTHETIC.model_copy(update=smaller)
    with pytest.raises(UserError, match=r"of 68 sampled requests only 0 were usable \(dropped: request_too_long"):
        prepare(never, tiny_teacher, tmp_path)

"""Shared fixtures: a tiny tokenizer, teacher and corpus, all built here and offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from evidence import evidence, pytest_addoption, pytest_configure  # noqa: F401  # pytest takes them from here
from tiny_models import tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from entkd.config import Student
from entkd.data.corpus import Document, write_split
from entkd.data.manifest import summarise, write_manifest
from entkd.models import init_student

if TYPE_CHECKING:
    from benchmarks.inputs import Inputs

SENTENCES = [
    "the quick brown fox jumps over the lazy dog and runs away from the old house",
    "what is the capital of france and how many people live there today",
    "you are a helpful assistant that answers questions about the world",
    "please write a short story about a cat that wants to learn how to swim",
    "### Instruction: Response: Below is an instruction that describes a task.",
]

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of 300 tokens whose padding is its EOS (id 2), as in the bundled teacher."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<|endoftext|>"
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """A Transformers folder with a random tiny Llama and the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer)
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """A finished data folder: 36 train, 8 dev and 12 test documents of 8 to 60 random tokens; every fourth is cut."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer)
    generator = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("data")
    splits = {}
    for split, count in {"train": 36, "dev": 8, "test": 12}.items():
        documents = []
        for index in range(count):
            prompt = generator.integers(3, 300, generator.integers(3, 20)).tolist()
            response = generator.integers(3, 300, generator.integers(4, 40)).tolist()
            cut = index % 4 == 3
            user = tokenizer.decode(prompt)
            text = {"id": f"{split}-{index}", "prompt": user, "response": tokenizer.decode(response), "user": user}
            documents.append(Document(prompt, response if cut else [*response, 2], text | {"cut": cut}))
        write_split(folder, split, documents)
        splits[split] = documents
    summary = {split: summarise(documents, {}) for split, documents in splits.items()}
    write_manifest(
        folder,
        {"source": "test", "max_tokens": 64},
        tiny_tokenizer,
        vocab_size=len(tokenizer),
        eos_token_id=2,
        splits=summary,
    )
    return folder


@pytest.fixture(scope="session")
def tiny_inputs(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, tiny_corpus: Path) -> Inputs:
    """A tiny teacher, a student of three of its layers, 36 documents and their signals of both modes."""
    from benchmarks.inputs import Inputs, make_signals

    folder = tmp_path_factory.mktemp("bench")
    teacher = folder / "teacher"
    teacher.mkdir()
    (teacher / "model").symlink_to(tiny_teacher)
    (teacher / "manifest.json").write_text(json.dumps({"sha256": "0" * 64}), encoding="utf-8")
    init_student(Student(layers=(0, 1, 3)), teacher, folder / "student", 0)
    return Inputs(teacher, folder / "student", tiny_corpus, make_signals(teacher, tiny_corpus, folder / "cache"))

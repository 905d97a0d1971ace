"""What every competitor of a step gets: the same teacher, untrained student and token ids, made by entkd's own stages.

Shape suffixes: B rows of a step, L tokens of the longest of them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from entkd.config import JsonData, Signals, Student, SyntheticData, Teacher
from entkd.data import Corpus, prepare
from entkd.data.packing import Block, pack
from entkd.errors import UserError
from entkd.files import file_sha256
from entkd.models import init_student, prepare_teacher
from entkd.rows import read_file
from entkd.signals.write import write_signals

MODES = ("hidden", "logprobs")
"""Both kinds of signals."""
IGNORED = -100
"""Label of a position without a loss, as Transformers and TRL write it."""
TEACHER = "smollm2-135m-instruct"
"""Name of the bundled teacher in a results folder."""


@dataclass(frozen=True)
class Inputs:
    """Folders of the prepared models and data, and the manifest of each mode's signals."""

    teacher: Path
    student: Path
    data: Path
    signals: dict[str, Path]


def prepare_inputs(results: Path, cache: Path, rows: Path | None, count: int) -> Inputs:
    """Take models and the demo's data from ``results`` where they are; make what is missing in ``cache``.

    Parameters
    ----------
    rows
        A json, jsonl or parquet file with `prompt` and `response`, or `messages`; None for the demo's data.
    count
        Rows to prepare.

    Notes
    -----
    The signals are of the teacher in fp32 in every run: with them the losses are compared, and how fast a step is does
    not depend on the precision in which its teacher once ran. They are made apart from those of an experiment.
    """
    teacher = results / "teachers" / TEACHER
    if not (teacher / "manifest.json").is_file():
        teacher = cache / "teacher"
        if not (teacher / "manifest.json").is_file():
            prepare_teacher(Teacher(), teacher)
    student = results / "students" / "untrained" / "seed0"
    if not (student / "manifest.json").is_file() or teacher == cache / "teacher":
        student = cache / "student"
        if not (student / "manifest.json").is_file():
            init_student(Student(), teacher, student, 0)
    data = results / "data" / "synthetic"
    if rows is not None or not (data / "manifest.json").is_file():
        settings = _synthetic(count) if rows is None else _json(rows, count)
        version = "" if rows is None else file_sha256(rows)
        identity = hashlib.sha256((settings.model_dump_json() + version).encode()).hexdigest()
        data = cache / "data" / identity[:16]
        if not (data / "manifest.json").is_file():
            prepare(settings, teacher, data)
    return Inputs(teacher, student, data, make_signals(teacher, data, cache))


def make_signals(teacher: Path, data: Path, cache: Path) -> dict[str, Path]:
    """Mode → manifest of the training split's signals."""
    needs = {"features": None, "splits": ["train"]}
    identity = file_sha256(data / "manifest.json")[:16]
    manifests = {mode: cache / "manifests" / f"{identity}-{mode}" / "manifest.json" for mode in MODES}
    for mode, manifest in manifests.items():
        settings = Signals.model_validate({"mode": mode, "features": None})
        write_signals(settings, needs, teacher, data, cache, manifest, "fp32")
    return manifests


def _synthetic(count: int) -> SyntheticData:
    """The demo's data, with as many documents as are needed."""
    sizes = {"max_tokens": 312, "max_prompt_tokens": 48, "max_response_tokens": 256}
    return SyntheticData(train=count, dev=1, test=1, batch=count + 20, **sizes)


def _json(rows: Path, count: int) -> JsonData:
    first = next(iter(read_file(rows)), {})
    messages = "messages" if "messages" in first and "prompt" not in first else None
    return JsonData(files={"train": rows.resolve()}, messages=messages, limit=count, dev=1, test=1, max_tokens=512)


@dataclass(frozen=True)
class Padded:
    """The rows of one step as trainers get them: one document per row, padding behind it."""

    input_ids_BL: Tensor
    attention_mask_BL: Tensor
    labels_BL: Tensor
    """Response tokens at their own place, `IGNORED` elsewhere: prompts and padding."""


class Steps:
    """Which documents each step sees, the same for everybody: in the order of the data, round and round.

    Raises
    ------
    UserError
        If the data have not as many documents as a step.
    """

    def __init__(self, data: Path, batch: int) -> None:
        manifest = json.loads((data / "manifest.json").read_text(encoding="utf-8"))
        self.data, self.batch = data, batch
        self.corpus = Corpus.open(data, "train")
        self.vocab_size: int = manifest["vocab_size"]
        self.pad_id: int = manifest["eos_token_id"]
        self.distinct = len(self.corpus) // batch
        """Steps before the first comes again."""
        if not self.distinct:
            raise UserError(f"--batch: {batch} rows a step, but {data} has {len(self.corpus)} training documents")

    def documents(self, number: int) -> NDArray[np.int64]:
        """Indices of the documents of a step."""
        return np.arange(self.batch) + number % self.distinct * self.batch

    def response_tokens(self, number: int) -> int:
        """Tokens of the step that have a loss."""
        return int(self.corpus.response_lengths[self.documents(number)].sum())

    def tokens(self, number: int) -> int:
        """Tokens of the step, without padding."""
        return int(self.corpus.lengths[self.documents(number)].sum())

    def packed(self, number: int) -> tuple[list[Block], int]:
        """Blocks of the step, and their length: that of the longest document, which is also what others pad to.

        A training run packs thousands of documents into blocks of one length and leaves less padding.
        """
        documents = self.documents(number)
        order = documents[np.argsort(-self.corpus.lengths[documents], kind="stable")]
        block = int(self.corpus.lengths[order[0]])
        return pack(self.corpus.lengths, block, order, open_blocks=self.batch), block

    def padded(self, number: int) -> Padded:
        """The step as a batch of padded rows."""
        documents = self.documents(number)
        shape = (len(documents), int(self.corpus.lengths[documents].max()))
        ids_BL = torch.full(shape, self.pad_id)
        mask_BL, labels_BL = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
        for row, document in enumerate(documents.tolist()):
            ids, prompt_length = self.corpus.document(document)
            ids_BL[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
            mask_BL[row, : len(ids)] = 1
            labels_BL[row, prompt_length : len(ids)] = ids_BL[row, prompt_length : len(ids)]
        return Padded(ids_BL, mask_BL, labels_BL)

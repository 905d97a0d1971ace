"""The stage `entkd seqkd-data`: greedy teacher responses to the training prompts (Kim & Rush 2016)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from entkd.data.corpus import Corpus, Document, read_texts, write_split
from entkd.data.manifest import summarise, write_manifest
from entkd.errors import UserError
from entkd.files import file_sha256
from entkd.generate import generate
from entkd.models import load_model, load_tokenizer, model_folder, weights_sha256
from entkd.runtime import device_slot, resolve_dtype


def prepare_seqkd(
    teacher: str | Path, data: str | Path, output: str | Path, max_response_tokens: int, batch: int, precision: str
) -> dict[str, Any]:
    """Write a data folder with the teacher's greedy responses in train, and dev and test copied unchanged.

    ``precision`` (``auto``, ``bf16``, ``fp32``) is that of the teacher's forward passes.

    Raises
    ------
    UserError
        If ``data`` was tokenised with another tokenizer than the teacher's.
    """
    data, output = Path(data), Path(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "manifest.json").unlink(missing_ok=True)
    corpus = Corpus.open(data, "train")
    texts = read_texts(data, "train")
    manifest = json.loads((data / "manifest.json").read_text(encoding="utf-8"))
    if file_sha256(model_folder(teacher) / "tokenizer.json") != manifest["tokenizer"]:
        raise UserError(f"{data} was tokenised with another tokenizer than {teacher} has; prepare the data again")
    tokenizer, eos = load_tokenizer(teacher), manifest["eos_token_id"]
    prompts = []
    for index in range(len(corpus)):
        ids, prompt_length = corpus.document(index)
        prompts.append(ids[:prompt_length].tolist())
    with device_slot() as device:
        model = load_model(teacher, dtype=resolve_dtype(precision, device))
        model.to(device)  # type: ignore[arg-type]
        responses = generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=max_response_tokens,
            max_length=manifest["settings"]["max_tokens"],
            batch=batch,
            eos_token_id=eos,
            progress="responses",
        )
    documents = []
    for prompt, response, text in zip(prompts, responses, texts, strict=True):
        cut = response[-1] != eos
        shown = tokenizer.decode(response if cut else response[:-1])
        own = {key: text[key] for key in ("id", "prompt", "user")}
        documents.append(Document(prompt, response, own | {"response": shown, "cut": cut}))
    write_split(output, "train", documents)
    for split in ("dev", "test"):
        for path in sorted(data.glob(f"{split}.*")):
            shutil.copyfile(path, output / path.name)
    origin = {
        "pipeline": "seqkd",
        "data": file_sha256(data / "manifest.json"),
        "teacher": weights_sha256(teacher),
        "max_response_tokens": max_response_tokens,
        "precision": precision,
    }
    return write_manifest(
        output,
        {**manifest["settings"], "origin": origin},
        model_folder(teacher),
        vocab_size=manifest["vocab_size"],
        eos_token_id=eos,
        splits={**manifest["splits"], "train": summarise(documents, {})},
    )

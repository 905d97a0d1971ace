"""The teacher pass: writes the signal store that all arms and seeds of an experiment read.

Every document goes through the teacher once. The calibration documents come first: their entropies fix the
difficulty, which decides whose features are kept, in them and in all documents after them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from entkd.config import Signals
from entkd.data import Corpus
from entkd.entropy import Difficulty
from entkd.files import file_sha256, locked, write_json
from entkd.progress import Progress
from entkd.runtime import device_slot, resolve_dtype
from entkd.signals.content import FORMAT, content_key, describe_content
from entkd.signals.files import read_header, write_tensors
from entkd.signals.histogram import write_entropy_csv
from entkd.signals.shards import Shard, plan_shards
from entkd.signals.store import SignalStore
from entkd.signals.teacher_pass import PassResult, Select, TeacherPass

HEAD, CALIBRATION, MANIFEST = "head.safetensors", "calibration.safetensors", "manifest.json"


def write_signals(
    settings: Signals, needs: dict[str, Any], teacher: Path, data: Path, cache: Path, output: Path, precision: str
) -> None:
    """Make sure that the store is complete, and write a manifest that points to it and ``entropy.csv`` beside it.

    A complete store of the same content is used as it is, without loading the teacher. An interrupted one is
    continued after its last whole shard.

    Parameters
    ----------
    settings
        What is stored and in which portions.
    needs
        ``{"features": null | {"points", "tokens": "hard" | "all", "threshold"}, "splits": ["train", ...]}``.
    teacher, data
        Folders of the prepared teacher and of the prepared data.
    cache
        Folder of all stores; this one is ``cache/signals/<first 16 digits of its key>/``.
    output
        The manifest to write.
    precision
        ``auto``, ``bf16`` or ``fp32``: of the teacher's trunk. Logits are fp32 always.

    Raises
    ------
    UserError
        If data and teacher do not fit together, the teacher's output is NaN or infinite, or the disk is full.
    """
    dtype = resolve_dtype(precision, "cuda" if torch.cuda.is_available() else "cpu")
    content = describe_content(settings, needs, teacher, data, dtype)
    key = content_key(content)
    folder = cache / "signals" / key[:16]
    with locked(folder / "lock", "these teacher signals"):
        if _is_complete(folder):
            print(f"{folder}: teacher signals found complete", file=sys.stderr, flush=True)
        else:
            with device_slot() as device:
                _fill(folder, key, content, settings, teacher, data, dtype, device)
    output.parent.mkdir(parents=True, exist_ok=True)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    # Relative, so that a project folder can be moved with its cache; between real paths, as either may be a link.
    pointer = {"store": os.path.relpath(folder.resolve(), output.parent.resolve()), "key": key}
    shown = ("vocab_size", "width", "feature_layers", "has_inf_logits", "summary")
    store = SignalStore(folder, manifest)
    write_entropy_csv(output.parent / "entropy.csv", store.split("train").entropy_R, store.difficulty())
    write_json(output, pointer | {name: manifest[name] for name in shown})


def _is_complete(folder: Path) -> bool:
    """Whether the store has its manifest and every file of it in full length."""
    if not (folder / MANIFEST).is_file():
        return False
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    damaged = [
        name
        for name, entry in manifest["files"].items()
        if not (folder / name).is_file() or (folder / name).stat().st_size != entry["bytes"]
    ]
    for name in damaged:
        print(f"{folder / name}: missing or cut short; it is written again", file=sys.stderr, flush=True)
        (folder / name).unlink(missing_ok=True)
    return not damaged


def _fill(
    folder: Path,
    key: str,
    content: dict[str, Any],
    settings: Signals,
    teacher: Path,
    data: Path,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Write what is missing of the store, its manifest last."""
    began = time.monotonic()
    (folder / MANIFEST).unlink(missing_ok=True)
    for leftover in folder.glob(".*tmp*"):  # ours, and the .tmp?????? that safetensors itself writes to
        leftover.unlink()
    needs = content["needs"]
    shards = plan_shards(settings, needs["splits"], data)
    keep_logprobs = settings.mode == "logprobs"
    whole = {shard.file for shard in shards if shard.is_whole(folder, key, keep_logprobs)}
    calibrated = (read_header(folder / CALIBRATION) or {}).get("key") == key
    if not calibrated:  # its shards, if any, were filtered by another difficulty
        whole -= {shard.file for shard in shards if shard.calibration}
    lengths = {split: Corpus.open(data, split).lengths for split in needs["splits"]}
    missing = [shard for shard in shards if shard.file not in whole]
    total = sum(int(lengths[shard.split][shard.documents].sum()) for shard in missing)
    with Progress("teacher signals", total, "token") as progress:
        run = TeacherPass(
            teacher,
            content["vocab_size"],
            needs,
            dtype,
            device,
            settings,
            progress.advance,
        )

        def result_of(shard: Shard, select: Select | None) -> PassResult:
            result = run.run(data, shard.split, shard.documents, select)
            if result.logprobs_RU is not None:  # written at once: all else of a shard may wait in memory
                write_tensors(folder / shard.logprobs_file, {"logprobs": result.logprobs_RU}, shard.header(key))
                result.logprobs_RU = None
            return result

        write_tensors(folder / HEAD, {"weight": run.head_UE}, {"key": key})
        fresh = [] if calibrated else [shard for shard in shards if shard.calibration]
        # Their features wait in memory, unfiltered, until the difficulty that filters them is fitted.
        held = [result_of(shard, None) for shard in fresh]
        if not calibrated:
            entropy_N = torch.cat([result.statistics["entropy"] for result in held])
            write_tensors(folder / CALIBRATION, Difficulty.fit(entropy_N).state(), {"key": key})
        select = _selection(needs["features"], Difficulty.from_state(load_file(folder / CALIBRATION)))
        for shard, result in zip(fresh, held, strict=True):
            if select is not None:
                result.keep_features(select)
            _write_shard(folder, shard, result, key)
        for shard in missing[len(fresh) :]:
            _write_shard(folder, shard, result_of(shard, select), key)
    manifest = _describe_store(folder, key, content, shards)
    manifest["feature_layers"] = list(run.layers)
    manifest["summary"] |= {
        "teacher_tokens": sum(int(per_document.sum()) for per_document in lengths.values()),
        "seconds": round(time.monotonic() - began, 1),
        "shards_found": len(whole),
        "head_rows_cut": run.head_rows - content["vocab_size"],
    }
    write_json(folder / MANIFEST, manifest)


def _write_shard(folder: Path, shard: Shard, result: PassResult, key: str) -> None:
    header = shard.header(key) | {"has_inf_logits": result.has_inf_logits}
    write_tensors(folder / shard.file, result.tensors(), header)


def _selection(features: dict[str, Any] | None, difficulty: Difficulty) -> Select | None:
    """Whose features are kept: hard tokens, or None for all."""
    if features is None or features["tokens"] == "all":
        return None
    threshold = features["threshold"]

    def is_hard(entropy_N: Tensor) -> Tensor:
        return torch.gt(difficulty(entropy_N), threshold)

    return is_hard


def _describe_store(folder: Path, key: str, content: dict[str, Any], shards: list[Shard]) -> dict[str, Any]:
    """The manifest, from the finished files."""
    splits: dict[str, Any] = {}
    tokens = feature_tokens = 0
    has_inf_logits = False
    for shard in shards:
        tensors = load_file(folder / shard.file)
        header = read_header(folder / shard.file) or {}
        has_inf_logits |= header["has_inf_logits"]
        tokens += len(tensors["entropy"])
        feature_tokens += len(tensors["feature_rows"])
        entry = splits.setdefault(shard.split, {"documents": 0, "response_tokens": 0, "shards": []})
        entry["documents"] += len(shard.documents)
        entry["response_tokens"] += len(tensors["entropy"])
        entry["shards"].append(shard.file)
    names = [HEAD, CALIBRATION, *(shard.file for shard in shards)]
    if content["settings"]["mode"] == "logprobs":
        names += [shard.logprobs_file for shard in shards]
    files: dict[str, Any] = {
        name: {"sha256": file_sha256(folder / name), "bytes": (folder / name).stat().st_size} for name in names
    }
    shard_bytes = sum(entry["bytes"] for name, entry in files.items() if name not in (HEAD, CALIBRATION))
    return {
        "format": FORMAT,
        "key": key,
        "content": content,
        "vocab_size": content["vocab_size"],
        "width": load_file(folder / HEAD)["weight"].shape[1],
        "has_inf_logits": has_inf_logits,
        "splits": splits,
        "files": files,
        "summary": {
            "response_tokens": tokens,
            "feature_tokens": feature_tokens,
            "bytes": sum(entry["bytes"] for entry in files.values()),
            "bytes_per_token": round(shard_bytes / tokens, 1),
        },
    }

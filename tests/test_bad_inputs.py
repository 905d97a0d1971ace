"""Bad inputs through the whole workflow: what is printed, the exit code, and that no job had started where it could be
known before. Run with ``-s`` to read the messages."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_experiment import copy_experiment, start
from tiny_models import tiny_llama

Spoil = Callable[[Path, dict[str, Any]], None]


def rows(folder: Path, text: str) -> None:
    (folder / "train.jsonl").write_text(text, encoding="utf-8")


def other_tokenizer(folder: Path, experiment: dict[str, Any]) -> None:
    shutil.copytree(folder / "teacher", folder / "student")
    tokenizer = json.loads((folder / "student/tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "student/tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    experiment["student"] = {"init": "local", "path": "student"}


def too_few_rows(folder: Path, experiment: dict[str, Any]) -> None:
    tiny_llama(250).save_pretrained(folder / "teacher")


def nan_in_weights(folder: Path, experiment: dict[str, Any]) -> None:
    weights = folder / "teacher/model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, weights, {"format": "pt"})


BEFORE_ANY_JOB: dict[str, tuple[Spoil, str]] = {
    "misspelt key": (
        lambda folder, experiment: experiment["training"].update(stepz=3),
        "training: unknown key `stepz`; did you mean `steps`?",
    ),
    "missing file": (
        lambda folder, experiment: experiment["data"]["files"].update(train="nowhere.jsonl"),
        "data.files.train: no file `nowhere.jsonl`",
    ),
    "empty data set": (lambda folder, experiment: rows(folder, ""), "data.files.train: "),
    "prompt without response": (
        lambda folder, experiment: rows(folder, '{"prompt": "a", "response": "b"}\n{"prompt": "c"}\n'),
        "data.files.train: ",
    ),
    "unknown arm": (
        lambda folder, experiment: experiment.update(analysis={"reference": "kdd"}),
        "analysis.reference: unknown name `kdd`; did you mean `kd`?",
    ),
    "negative temperature": (
        lambda folder, experiment: experiment["arms"]["temperature"].update(temperature={"base": -1}),
        "arms.temperature.temperature.base: -1",
    ),
    "other tokenizer": (other_tokenizer, "student.path: "),
    "vocabulary mismatch": (too_few_rows, "teacher.path: `teacher` has 250 rows in its vocabulary"),
}


def run(folder: Path, *targets: str) -> tuple[int, str]:
    code = start(folder, "--show-failed-logs", *targets).wait()
    return code, (folder / "snakemake.log").read_text(encoding="utf-8")


def spoiled(folder: Path, teacher: Path, spoil: Spoil) -> None:
    copy_experiment(folder, teacher)
    file = folder / "config/config.yaml"
    experiment = yaml.safe_load(file.read_text(encoding="utf-8"))
    spoil(folder, experiment)
    file.write_text(yaml.safe_dump(experiment, sort_keys=False), encoding="utf-8")


def show(name: str, code: int, printed: str) -> None:
    told = [line for line in printed.splitlines() if re.search(r"rror|^(local)?rule|^config/", line)]
    print(f"\n── {name}: exit code {code}\n" + "\n".join(told))


@pytest.mark.parametrize("name", BEFORE_ANY_JOB)
def test_known_before_any_job(name: str, tiny_teacher: Path, tmp_path: Path) -> None:
    spoil, message = BEFORE_ANY_JOB[name]
    spoiled(tmp_path, tiny_teacher, spoil)
    code, printed = run(tmp_path)
    show(name, code, printed)
    assert code == 1
    assert message in printed
    assert not re.search(r"^(local)?rule ", printed, re.MULTILINE)
    assert not (tmp_path / "results").exists()
    assert "Traceback" not in printed


def test_nan_in_the_teachers_weights_stops_its_preparation(tiny_teacher: Path, tmp_path: Path) -> None:
    """Weights are read by the first job, which names the tensor; nothing comes after it."""
    spoiled(tmp_path, tiny_teacher, nan_in_weights)
    code, printed = run(tmp_path)
    show("NaN in teacher weights", code, printed)
    assert code == 1
    assert "tensor `model.layers.1.mlp.up_proj.weight` has 1 NaN or infinite values" in printed
    assert re.findall(r"^(?:local)?rule (\w+)", printed, re.MULTILINE) == ["prepare_teacher"]
    assert not list((tmp_path / "results").rglob("*.safetensors"))
    assert "Traceback" not in printed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_full_disk_names_the_file_and_the_next_run_goes_on(tiny_teacher: Path, small_disk: Path) -> None:
    copy_experiment(small_disk, tiny_teacher)
    target = "results/tiny/teachers/tiny/manifest.json"
    left = 200 * 1024  # for Snakemake's own files and the log; not for a copy of the teacher
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - left))
    code, printed = run(small_disk, target)
    show("full disk", code, printed)
    assert code == 1
    assert re.search(
        r"error: .*No space left on device.*Free some space and run again: finished parts are kept", printed
    )
    assert "Traceback" not in printed
    assert not list((small_disk / "results").rglob("*.safetensors"))
    (small_disk / "filler").unlink()
    assert run(small_disk, target)[0] == 0

"""Whole or not at all, and a full disk in words."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from entkd.errors import UserError
from entkd.files import replacing, write_json


@pytest.fixture
def small_disk() -> Iterator[None]:
    """The kernel refuses files over 10,000 bytes to this process, as it refuses writes to a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _torch(path: Path) -> None:
    with path.open("wb") as stream:
        torch.save(torch.zeros(10_000), stream)


def _numpy(path: Path) -> None:
    with path.open("wb") as stream:
        np.save(stream, np.zeros(10_000))


WRITERS: dict[str, Callable[[Path], object]] = {
    "safetensors": lambda path: save_file({"x": torch.zeros(10_000)}, path),
    "torch": _torch,
    "numpy": _numpy,
    "text": lambda path: path.write_text("x" * 20_000),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_names_the_file_and_keeps_the_old_one(tmp_path: Path, small_disk: None, name: str) -> None:
    path = tmp_path / "state"
    path.write_text("old")
    with pytest.raises(UserError, match=r"state: cannot be written .* MiB are free"), replacing(path) as temporary:
        WRITERS[name](temporary)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "old").mkdir(parents=True)
    with replacing(folder) as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("x")
        assert (folder / "old").exists()  # until the new one is whole
    assert [path.name for path in folder.iterdir()] == ["new"]


def test_an_interruption_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"b": 1, "a": 2})

    def interrupted() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == '{\n "a": 2,\n "b": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_that_json_has_not_got_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "run.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []

"""Files of the signal store: what they say of themselves."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from entkd.config import canonical_json
from entkd.files import WriteError, replacing


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write a safetensors file under a temporary name, flush it to disk and rename it.

    Parameters
    ----------
    path
        The final name.
    tensors
        CPU tensors.
    header
        What the file says of itself. It is stored as one string: safetensors does not keep the order of several,
        and equal content must give equal bytes.

    Raises
    ------
    WriteError
        If the write fails; names the file, the bytes it needs and the bytes free. Nothing half-written is left.
    """
    try:
        with replacing(path) as temporary:
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()},
                temporary,
                {"entkd": canonical_json(header)},
            )
    except WriteError as error:
        needed = sum(tensor.nbytes for tensor in tensors.values())
        raise WriteError(
            f"{error}. It needs {needed:,} bytes; runtime.cache can be moved to another disk"
        ) from error.__cause__


def read_header(path: Path) -> dict[str, Any] | None:
    """What a file of the store says of itself; None if it is absent, cut short or not one of ours."""
    try:
        with safe_open(path, "pt") as file:
            header: dict[str, Any] = json.loads((file.metadata() or {})["entkd"])
            return header
    except (FileNotFoundError, SafetensorError, KeyError, json.JSONDecodeError):
        return None


class RowReader:
    """Rows of one matrix of a safetensors file, read into memory of the caller.

    Mapped rows of a hundred kilobytes cost a page fault for every few of their pages, several times the copy itself,
    and count as memory of the process.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  # open for as long as the reader lives
        with safe_open(path, "pt") as file:
            self.shape: tuple[int, ...] = tuple(file.get_slice(name).get_shape())
        # A file is 8 bytes with the length of the header, the header (JSON), and the data that it points into.
        (length,) = struct.unpack("<Q", self._file.read(8))
        begin, end = json.loads(self._file.read(length))[name]["data_offsets"]
        self._start, self._row_bytes = 8 + length + begin, (end - begin) // self.shape[0] if self.shape[0] else 0

    def read(self, first: int, out: Tensor) -> None:
        """Fill ``out``, (N, columns) contiguous and of the file's own type, with the rows from ``first`` on.

        Raises ValueError where the file has not these rows or other ones, EOFError where it is cut short.
        """
        target = out.view(torch.uint8).numpy().reshape(-1).data
        if len(target) != len(out) * self._row_bytes or first + len(out) > self.shape[0]:
            raise ValueError(f"rows {first} to {first + len(out)} of {self.shape} do not fit {tuple(out.shape)}")
        self._file.seek(self._start + first * self._row_bytes)
        while len(target):
            count = self._file.readinto(target) or 0
            if count == 0:
                raise EOFError(f"{self._file.name} ends before its data do; run `entkd signals-verify`")
            target = target[count:]

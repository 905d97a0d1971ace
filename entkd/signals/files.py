"""Files of the signal store: what they say of themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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

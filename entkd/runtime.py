"""Where and how a job computes: device slot, precision, named random streams."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch


def resolve_dtype(precision: str, device: torch.device | str) -> torch.dtype:
    """Compute dtype of a precision setting: `auto` is bfloat16 where the device has bf16 arithmetic.

    A CPU without bf16 instructions emulates them several times slower than fp32, hence the check.
    """
    if precision == "fp32":
        return torch.float32
    if precision == "bf16":
        return torch.bfloat16
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def stream_seed(seed: int, name: str) -> int:
    """Seed of one named random stream.

    Streams are seeded by (seed, name) and by nothing else, so that switching a component off, which stops the
    draws of one stream, shifts no other: arms stay paired by seed.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") % 2**63


def torch_stream(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator for one named stream."""
    return torch.Generator(device=device).manual_seed(stream_seed(seed, name))


def numpy_stream(seed: int, name: str) -> np.random.Generator:
    """A numpy generator for one named stream."""
    return np.random.default_rng(stream_seed(seed, name))


@contextlib.contextmanager
def device_slot(poll_seconds: float = 1.0) -> Iterator[torch.device]:
    """The device of this job, held until the block ends.

    Snakemake counts GPUs but does not hand them out, so each job takes the first free one by a file lock, which
    the kernel releases when the process dies, however it dies. Under a launcher (LOCAL_RANK) the launcher has
    assigned the device already.
    """
    if not torch.cuda.is_available():
        yield torch.device("cpu")
        return
    if "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        yield device
        return
    folder = Path(tempfile.gettempdir()) / f"entkd-gpus-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    announced = False
    while True:
        for index in range(torch.cuda.device_count()):
            # Slots are named by the physical device: two jobs may see different subsets of the GPUs.
            with (folder / f"{torch.cuda.get_device_properties(index).uuid}.lock").open("w") as slot:
                try:
                    fcntl.flock(slot, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                device = torch.device("cuda", index)
                torch.cuda.set_device(device)
                yield device
                return
        if not announced:
            print("every GPU is taken by another job; waiting for one", file=sys.stderr, flush=True)
            announced = True
        time.sleep(poll_seconds)


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The tensor on a device, without waiting for it.

    ``non_blocking`` alone does not do: out of ordinary memory an accelerator copies while the host waits. Out of
    pinned memory it copies by itself, and PyTorch keeps that memory until the copy is done.
    """
    if tensor.device.type == "cpu" and torch.device(device).type not in ("cpu", "meta"):
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def synchronize(device: torch.device) -> None:
    """Wait for queued work, so that a clock read now means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

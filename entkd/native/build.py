"""The C++ of this folder, compiled at the first use and kept in the user's cache folder by a key of its ingredients.

``ENTKD_NATIVE=0`` switches it off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from entkd.files import WriteError, locked, replacing

FOLDER = Path(__file__).parent
SOURCES = ("adamw.cpp", "attention.cpp", "layers.cpp", "products.cpp", "rows.cpp")

_INSTRUCTIONS = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16", "fma", "f16c")
_FLAGS = ("-O3", "-std=c++20", "-fPIC", *(f"-m{name}" for name in _INSTRUCTIONS))

_POINTER, _NUMBER, _CODE, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
_ARGUMENTS = {
    "entkd_adamw": [*[_POINTER] * 5, *[_REAL] * 8, _NUMBER],
    "entkd_rms_norm": [*[_POINTER] * 4, _REAL, *[_NUMBER] * 2],
    "entkd_rms_norm_gradient": [*[_POINTER] * 6, *[_NUMBER] * 2],
    "entkd_swiglu": [*[_POINTER] * 3, _NUMBER],
    "entkd_swiglu_gradient": [*[_POINTER] * 5, _NUMBER],
    "entkd_rotate": [*[_POINTER] * 4, _CODE, *[_NUMBER] * 3],
    "entkd_attention_gradient": [*[_POINTER] * 9, *[_POINTER, _CODE] * 3, _REAL, *[_NUMBER] * 5],
    "entkd_logits": [_POINTER, _POINTER, _CODE, _POINTER, *[_NUMBER] * 3],
    "entkd_hidden_gradient": [*[_POINTER] * 3, *[_NUMBER] * 3],
    "entkd_weight_gradient": [*[_POINTER] * 3, _CODE, *[_NUMBER] * 3],
    "entkd_kl": [_CODE, *[_POINTER, _CODE] * 2, *[_POINTER] * 4, _CODE, *[_NUMBER] * 2],
    "entkd_cross_entropy": [_POINTER, _CODE, *[_POINTER] * 4, _CODE, *[_NUMBER] * 2],
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library; None where it is of no use or cannot be had."""
    # Every CPU with bf16 instructions has all the others.
    if os.environ.get("ENTKD_NATIVE") == "0" or not torch.cpu._is_avx512_bf16_supported():
        return None
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return None
    try:
        found = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, WriteError, subprocess.SubprocessError) as error:
        detail = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        print(f"{FOLDER.name}: could not be compiled, so losses take longer: {detail}", file=sys.stderr, flush=True)
        return None
    for name, arguments in _ARGUMENTS.items():
        getattr(found, name).argtypes = arguments
        getattr(found, name).restype = None
    if not found.entkd_runs():
        print(f"{FOLDER.name}: oneDNN's bf16 kernels do not run, so losses take longer", file=sys.stderr, flush=True)
        return None
    return found


def _compiled(compiler: str) -> Path:
    """Path of the library, compiled now if it is not there."""
    parts = [
        *((FOLDER / name).read_text(encoding="utf-8") for name in (*SOURCES, "simd.h")),
        torch.__version__,
        torch.__file__,
        compiler,
        platform.machine(),
        *_FLAGS,
    ]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "entkd" / "native"
    path = cache / f"entkd-{key}.so"
    if not path.is_file():
        with locked(cache / "lock", "compiling kernels for this CPU"):
            if not path.is_file():
                with replacing(path) as temporary, tempfile.TemporaryDirectory() as folder:
                    _compile(compiler, Path(folder), temporary)
    return path


def _compile(compiler: str, folder: Path, path: Path) -> None:
    torch_folder = Path(torch.__file__).parent
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    include = f"-I{torch_folder / 'include'}"
    objects = [str(folder / f"{name}.o") for name in SOURCES]
    with ThreadPoolExecutor() as pool:
        for ended in [
            pool.submit(_call, compiler, *_FLAGS, "-fopenmp", abi, include, "-c", str(FOLDER / name), "-o", compiled)
            for name, compiled in zip(SOURCES, objects, strict=True)
        ]:
            ended.result()
    # Linked without -fopenmp: PyTorch has its OpenMP loaded, and a second one would be a second pool of threads.
    _call(compiler, "-shared", *objects, f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10", "-o", str(path))


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)

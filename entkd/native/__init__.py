"""Matrix products on a CPU that PyTorch has on GPUs only, in C++ that is compiled at the first use.

Without a compiler, or on a CPU without bf16 instructions, nothing is lost but time: callers have another way to the
same numbers. ``ENTKD_NATIVE=0`` switches it off. The library is kept in the user's cache folder, by a key of all that
it was made from.
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
from pathlib import Path

import torch
from torch import Tensor

from entkd.files import WriteError, locked, replacing

SOURCE = Path(__file__).with_name("product.cpp")

_FLAGS = ("-O3", "-std=c++20", "-fPIC")


def bf16_product(hidden_RD: Tensor, weight_VD: Tensor, out_RV: Tensor) -> bool:
    """hidden · weightᵀ of bf16 operands with fp32 sums, into ``out_RV``; False, and nothing done, where it cannot be.

    Parameters
    ----------
    hidden_RD
        (R, D) bf16.
    weight_VD
        (V, D) bf16, or fp32, which is rounded to bf16.
    out_RV
        (R, V) fp32.
    """
    tensors = (hidden_RD, weight_VD, out_RV)
    library = _library() if all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors) else None
    if library is None or hidden_RD.shape[1] % 2:
        return False
    types = hidden_RD.dtype, weight_VD.dtype, out_RV.dtype
    functions = {torch.bfloat16: "entkd_product_bf16", torch.float32: "entkd_product_fp32"}
    if types[0] != torch.bfloat16 or types[1] not in functions or types[2] != torch.float32:
        return False
    (R, D), V = hidden_RD.shape, len(weight_VD)
    if weight_VD.shape != (V, D) or out_RV.shape != (R, V):
        raise ValueError(f"shapes {tuple(hidden_RD.shape)}, {tuple(weight_VD.shape)} and {tuple(out_RV.shape)} differ")
    if R and V:
        getattr(library, functions[types[1]])(*(tensor.data_ptr() for tensor in tensors), R, V, D)
    return True


def available() -> bool:
    """Whether the compiled product is there; compiles it if it is not yet."""
    return _library() is not None


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled library; None where it is of no use or cannot be had."""
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if os.environ.get("ENTKD_NATIVE") == "0" or not has_bf16:
        return None
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return None
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, WriteError, subprocess.SubprocessError) as error:
        detail = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        print(f"{SOURCE.name} could not be compiled, so bf16 logits take longer: {detail}", file=sys.stderr, flush=True)
        return None
    for name in ("entkd_product_bf16", "entkd_product_fp32"):
        getattr(library, name).argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 3
        getattr(library, name).restype = None
    return library


def _compiled(compiler: str) -> Path:
    """Path of the library, compiled now if it is not there."""
    parts = [
        SOURCE.read_text(encoding="utf-8"),
        torch.__version__,
        torch.__file__,
        compiler,
        platform.machine(),
        *_FLAGS,
    ]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "entkd" / "native"
    path = cache / f"product-{key}.so"
    if not path.is_file():
        torch_folder = Path(torch.__file__).parent
        with locked(cache / "lock", "compiling a matrix product"):
            if not path.is_file():
                with replacing(path) as temporary, tempfile.TemporaryDirectory() as folder:
                    compiled = str(Path(folder) / "product.o")
                    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
                    include = f"-I{torch_folder / 'include'}"
                    _call(compiler, *_FLAGS, "-fopenmp", abi, include, "-c", str(SOURCE), "-o", compiled)
                    # Linked without -fopenmp: PyTorch has its OpenMP loaded, and a second one would be a second pool
                    # of threads.
                    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
                    _call(compiler, "-shared", compiled, *libraries, "-o", str(temporary))
    return path


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)

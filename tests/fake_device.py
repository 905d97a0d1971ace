"""A pretended accelerator, on which any wait for the host and any mix of devices is an error.

Tensors are `FakeTensor`s: shapes, dtypes and devices without data, so nothing is computed. They live on a device that
stands for a GPU: PyTorch's slot for backends of third parties, since a build without CUDA has no streams for autograd.
What only a test of the real thing shows (kernels that wait inside) stays unseen.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.masking_utils
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import entkd

GPU = "fakegpu"
DEVICE = torch.device("privateuseone", 0)
"""The first `GPU`, under the name that it has until `on_gpu` gives it its own."""
PACKAGE = str(Path(entkd.__file__).parent)
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
SCATTERS = (aten.index_put.default, aten.index_put_.default)
CAST_BY_AUTOCAST = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention")


_reports: list[Any] = []


def _report(error: type[Exception] | None, answer: Any) -> None:
    """Tell the parent process. The first report counts: an error inside the backward pass ends this process, since
    streams of a backend in Python are not put back while an error is on its way."""
    _reports[-1].send((error, answer))


class HostSyncError(RuntimeError):
    """The host waits for the device, or tensors of both meet."""


class Watch(TorchDispatchMode):
    """Looks at every operation of a block: the first sync raises, or all are noted and answered by zeros."""

    def __init__(self, raises: bool = True) -> None:
        super().__init__()
        self.raises = raises
        self.syncs: list[str] = []
        self.pinned: set[int] = set()
        self._alive: list[Tensor] = []  # so that no other tensor gets the id of a pinned one

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # most calls are this question
            return func(*args)
        if func is aten._pin_memory.default:
            copy = aten.clone.default(args[0])
            self._alive.append(copy)
            self.pinned.add(id(copy))
            return copy
        if func is aten.is_pinned.default:
            return id(args[0]) in self.pinned
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        if func is aten._local_scalar_dense.default and devices == {GPU}:
            self._note(func, "its value goes to the host")
            return 0
        if func in COPIES:
            self._copy(func, args, kwargs)
        elif func in SCATTERS and any(index is not None and index.dtype == torch.bool for index in args[1]):
            self._note(func, "a mask becomes indices")
        elif devices == {GPU, "cpu"}:
            self._note(func, "a CPU tensor meets one of the device")
        try:
            return func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            self.syncs.append(self._describe(func, "the result depends on values on the device"))
            _report(HostSyncError, self.syncs[-1])
            raise HostSyncError(self.syncs[-1]) from error

    def _copy(self, func: Any, args: Any, kwargs: Any) -> None:
        if func is aten.copy_.default:
            target, source = args[0].device.type, args[1]
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        else:
            source, non_blocking = args[0], kwargs.get("non_blocking", False)
            target = (kwargs.get("device") or source.device).type
        if (source.device.type, target) == (GPU, "cpu"):
            self._note(func, "copies to the host")
        if (source.device.type, target) == ("cpu", GPU) and not (non_blocking and id(source) in self.pinned):
            self._note(func, "copies to the device from memory that is not pinned, or waits for the copy")

    def _note(self, func: Any, why: str) -> None:
        self.syncs.append(self._describe(func, why))
        if self.raises:
            _report(HostSyncError, self.syncs[-1])
            raise HostSyncError(self.syncs[-1])

    @staticmethod
    def _describe(func: Any, why: str) -> str:
        own = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
        where = f"{own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else "outside of entkd"
        return f"{func}: {why}; {where}"


def on_gpu(body: Callable[[], Any]) -> Any:
    """What ``body`` returns, run with the pretended device in a child process: PyTorch cannot forget a backend.

    Raises
    ------
    HostSyncError
        If the body did.
    RuntimeError
        Any other error of the body, with its traceback.
    """
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def child() -> None:
        _reports.append(send)
        faulthandler.disable()  # the end of the process in a backward pass is expected
        gc.disable()  # it would copy all memory that the two processes share
        try:
            with _device(), FakeTensorMode(allow_non_fake_inputs=False):
                _report(None, body())
        except BaseException:
            _report(RuntimeError, traceback.format_exc())

    process = context.Process(target=child)
    process.start()
    send.close()
    try:
        error, answer = receive.recv()
    except EOFError:
        error, answer = RuntimeError, "the child process died"
    process.join()
    if error is not None:
        raise error(answer)
    return answer


@contextmanager
def _device() -> Iterator[None]:
    backend_registration._setup_privateuseone_for_python_backend(GPU, _Module())
    # Transformers takes a fake tensor for one that is traced, and would spare it what it does to a real one.
    transformers.masking_utils.is_tracing = lambda *_: False
    key = "AutocastPrivateUse1"
    fallback = torch.library.Library("_", "IMPL", key)
    fallback.fallback(torch.library.fallthrough_kernel)
    casts = torch.library.Library("aten", "IMPL", key)
    for name in CAST_BY_AUTOCAST:
        casts.impl(name, _cast(getattr(aten, name).default))
    # The engine's thread of a device starts with the process, when there was no such device.
    with torch.autograd.set_multithreading_enabled(False):
        yield


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def _cast(operation: Any) -> Callable[..., Any]:
    """An operation as autocast has it: fp32 tensors become bf16."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def low(value: Any) -> Any:
        is_fp32 = isinstance(value, Tensor) and value.dtype == torch.float32
        return value.to(torch.get_autocast_dtype(GPU)) if is_fp32 else value

    def cast(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operation(*map(low, args), **{name: low(value) for name, value in kwargs.items()})

    return cast


def put_on_gpu(module: nn.Module) -> nn.Module:
    """The module with parameters and buffers on the device, ties kept; `Module.to` cannot exchange fake tensors."""
    moved: dict[int, Tensor] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in moved:
                    there = torch.empty_like(tensor, device=DEVICE)
                    moved[id(tensor)] = nn.Parameter(there) if isinstance(tensor, nn.Parameter) else there
                if tensor is not None:
                    tensors[name] = moved[id(tensor)]
    return module


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the pretended device lives in a forked process")

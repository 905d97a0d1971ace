"""Buffers: the same memory again, of any shape and type, usable in and out of inference mode."""

from __future__ import annotations

import threading

import torch

from entkd.workspace import buffer, recycled

CPU = torch.device("cpu")


def test_a_name_gives_the_same_memory_until_more_is_asked_for() -> None:
    first = buffer("test memory", (4, 6), torch.float32, CPU)
    first.fill_(7)
    smaller = buffer("test memory", (2, 3), torch.float32, CPU)
    assert smaller.data_ptr() == first.data_ptr()
    assert (smaller == 7).all()
    assert buffer("test memory", (4, 6), torch.bfloat16, CPU).data_ptr() == first.data_ptr()
    assert buffer("another", (4, 6), torch.float32, CPU).data_ptr() != first.data_ptr()
    larger = buffer("test memory", (40, 6), torch.float64, CPU)
    assert larger.shape == (40, 6)
    assert larger.dtype == torch.float64


def test_a_buffer_made_in_inference_mode_is_written_outside_it() -> None:
    with torch.inference_mode():
        buffer("test inference", (3,), torch.float32, CPU).fill_(1)
    again = buffer("test inference", (3,), torch.float32, CPU)
    again.fill_(2)
    assert not again.is_inference()


def test_threads_have_their_own() -> None:
    pointers = [buffer("test thread", (8,), torch.float32, CPU).data_ptr()]
    thread = threading.Thread(
        target=lambda: pointers.append(buffer("test thread", (8,), torch.float32, CPU).data_ptr())
    )
    thread.start()
    thread.join()
    assert len(set(pointers)) == 2


def test_memory_is_recycled_only_once_no_tensor_uses_it() -> None:
    first = recycled((3, 5), torch.float32, CPU)
    row, pointer = first[1], first.data_ptr()
    row.fill_(7)
    del first
    second = recycled((3, 5), torch.float32, CPU)  # the row is still there
    assert second.data_ptr() != pointer
    second.fill_(8)
    assert (row == 7).all()
    del row
    assert recycled((5, 3), torch.float32, CPU).data_ptr() == pointer
    parameter = torch.zeros(3, 5, requires_grad=True)
    parameter.grad = second
    del second
    pointers = {recycled((3, 5), torch.float32, CPU).data_ptr() for _ in range(3)}
    assert parameter.grad.data_ptr() not in pointers

"""Named random streams, precision, device slot."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from entkd import runtime


def test_streams_differ_by_name_and_seed_and_repeat() -> None:
    first = torch.rand(4, generator=runtime.torch_stream(0, "data order"))
    assert torch.equal(first, torch.rand(4, generator=runtime.torch_stream(0, "data order")))
    assert not torch.equal(first, torch.rand(4, generator=runtime.torch_stream(0, "dropout")))
    assert not torch.equal(first, torch.rand(4, generator=runtime.torch_stream(1, "data order")))
    assert np.array_equal(runtime.numpy_stream(3, "a").random(3), runtime.numpy_stream(3, "a").random(3))


def test_stream_seed_is_not_the_plain_concatenation() -> None:
    # (1, "1/x") and (11, "/x")-like collisions would pair streams that must be independent.
    assert runtime.stream_seed(1, "1x") != runtime.stream_seed(11, "x")


@pytest.mark.parametrize(("precision", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_named_precision_is_taken_at_its_word(precision: str, expected: torch.dtype) -> None:
    assert runtime.resolve_dtype(precision, "cpu") is expected


def test_auto_follows_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for avx, amx, expected in [
        (False, False, torch.float32),
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
    ]:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert runtime.resolve_dtype("auto", "cpu") is expected


def test_without_a_gpu_the_slot_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with runtime.device_slot() as device:
        assert device == torch.device("cpu")


def test_two_jobs_take_different_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    class Properties:
        def __init__(self, index: int) -> None:
            self.uuid = f"gpu-{index}"

    monkeypatch.setattr(runtime.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", Properties)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with runtime.device_slot() as first, runtime.device_slot() as second:
        assert (first.index, second.index) == (0, 1)
    with runtime.device_slot() as third:
        assert third.index == 0

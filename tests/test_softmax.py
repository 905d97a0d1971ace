"""The most probable token, its logit and the logsumexp, against plain PyTorch in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from entkd import native
from entkd.softmax import argmax, largest_and_logsumexp

WIDTHS = [1, 7, 255, 256, 257, 512, 1000]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
def test_argmax_is_the_first_of_the_largest(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    logits_RV = torch.randint(-4, 4, (300, width), generator=generator).to(dtype)  # ties in every row
    expected_R = [row.index(max(row)) for row in logits_RV.tolist()]
    assert argmax(logits_RV).tolist() == expected_R


@pytest.mark.parametrize("place", [0, 255, 256, 511, 512, 599])
def test_argmax_finds_every_place(place: int) -> None:
    logits_RV = torch.full((2, 600), -math.inf)
    logits_RV[1, place] = -1e30
    assert argmax(logits_RV).tolist() == [0, place]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", WIDTHS)
def test_largest_and_logsumexp(width: int, dtype: torch.dtype, compiled: bool, monkeypatch) -> None:
    if not compiled:
        monkeypatch.setattr(native, "cross_entropy", lambda *_: None)
    generator = torch.Generator().manual_seed(width)
    logits_RV = 20 * torch.randn(50, width, generator=generator, dtype=torch.float64).to(dtype)
    logits_RV[0, 0] = -math.inf if width > 1 else 0.0
    before_RV = logits_RV.clone()
    largest_R, logsumexp_R = largest_and_logsumexp(logits_RV)
    assert torch.equal(logits_RV, before_RV)
    assert torch.equal(largest_R, logits_RV.max(-1).values)
    expected_R = logits_RV.double().logsumexp(-1)
    torch.testing.assert_close(
        logsumexp_R.double(), expected_R, rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=1e-6
    )


@pytest.mark.parametrize("place", [0, 300, 599])
def test_nan_is_not_hidden(place: int) -> None:
    logits_RV = torch.zeros(2, 600)
    logits_RV[1, place] = math.nan
    _, logsumexp_R = largest_and_logsumexp(logits_RV)
    assert logsumexp_R.isnan().tolist() == [False, True]

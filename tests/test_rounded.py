"""bf16 copies of weights: never older than the weight, whoever wrote to it."""

from __future__ import annotations

import gc

import torch
from torch import nn

from entkd import rounded as module
from entkd.rounded import copy_of, rounded, written


def test_a_copy_follows_every_write_and_is_made_only_then() -> None:
    weight = nn.Parameter(torch.randn(5, 3))
    first = rounded(weight)
    assert torch.equal(first, weight.detach().bfloat16())
    first.zero_()  # to see whether it is made again
    assert not rounded(weight).any()
    with torch.no_grad():
        weight.mul_(2)
    assert rounded(weight) is first
    assert torch.equal(first, weight.detach().bfloat16())
    weight.data = torch.ones(5, 3)
    assert torch.equal(rounded(weight), torch.ones(5, 3, dtype=torch.bfloat16))


def test_one_that_was_written_with_the_weight_is_not_made_again() -> None:
    weight = nn.Parameter(torch.zeros(4))
    assert copy_of(weight) is None
    written(weight)  # nobody has a copy: nothing to say
    copy = rounded(weight)
    assert copy_of(weight) is copy
    with torch.no_grad():
        weight.fill_(1)
        copy.fill_(3)
    written(weight)
    assert (rounded(weight) == 3).all()


def test_a_copy_of_inference_mode_can_be_trained_with() -> None:
    weight = nn.Parameter(torch.randn(3, 2))
    with torch.inference_mode():
        copy = rounded(weight)
    hidden = torch.randn(4, 2, dtype=torch.bfloat16, requires_grad=True)
    nn.functional.linear(hidden, copy).sum().backward()
    assert hidden.grad is not None


def test_a_copy_goes_with_its_weight() -> None:
    weight = nn.Parameter(torch.randn(3, 2))
    rounded(weight)
    gc.collect()  # of other tests
    before = len(module._copies)
    del weight
    gc.collect()
    assert len(module._copies) == before - 1

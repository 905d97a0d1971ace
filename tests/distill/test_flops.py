"""Analytic FLOPs against PyTorch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from entkd.distill.flops import training_tflops
from entkd.models import load_model, output_weight, trunk_forward


def test_training_flops_equal_the_counted_ones(tiny) -> None:
    student = load_model(tiny.student)
    student.set_attn_implementation("eager")  # the counter sees products, not the fused attention kernel of a CPU
    blocks, block, positions = 2, 64, 50
    ids_BL = torch.randint(0, 300, (blocks, block), generator=torch.Generator().manual_seed(0))
    positions_BL = torch.arange(block).repeat(blocks, 1)
    with FlopCounterMode(display=False) as counter:
        hidden_BLD, _ = trunk_forward(student, ids_BL, positions_BL)
        (hidden_BLD.flatten(0, 1)[:positions] @ output_weight(student).T).sum().backward()
    counted = counter.get_total_flops()
    analytic = 1e12 * training_tflops(student, blocks * block, positions, block, 300, teacher_width=None)
    # not counted by the analytic figure: rotary tables; not counted by autograd: the gradient of the first input
    assert analytic == pytest.approx(counted, rel=0.02)


def test_the_teachers_projection_adds_one_product(tiny) -> None:
    student = load_model(tiny.student)
    without = training_tflops(student, 100, 40, 64, 300, None)
    assert training_tflops(student, 100, 40, 64, 300, 32) - without == pytest.approx(2 * 40 * 32 * 300 / 1e12)

"""Optimizer, learning-rate schedule and gradient clipping of a training run."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from entkd.config import Training


def learning_rates(settings: Training, steps: int) -> list[float]:
    """The learning rate of every step: linear warm-up to `lr`, then constant or cosine to zero.

    Warm-up step k of W has rate lr·(k+1)/W, so the first step moves. The cosine is taken at a step's midpoint:
    its mean over the run is exactly half the peak, and the last step is not wasted at zero.
    """
    warmup = math.ceil(settings.warmup * steps)
    rates = []
    for step in range(steps):
        if step < warmup:
            factor = (step + 1) / warmup
        elif settings.schedule == "constant":
            factor = 1.0
        else:
            factor = 0.5 * (1 + math.cos(math.pi * (step - warmup + 0.5) / (steps - warmup)))
        rates.append(settings.lr * factor)
    return rates


def build_optimizer(
    student: nn.Module, projectors: nn.Module | None, settings: Training, projector_lr: float | None
) -> torch.optim.AdamW:
    """AdamW over the student (weight decay on matrices only) and the projectors, which have a rate of their own."""
    parameters = [p for p in student.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in parameters if p.ndim >= 2],
            "weight_decay": settings.weight_decay,
            "peak_lr": settings.lr,
        },
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0, "peak_lr": settings.lr},
    ]
    if projectors is not None and projector_lr is not None:
        groups.append({"params": list(projectors.parameters()), "weight_decay": 0.0, "peak_lr": projector_lr})
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float, settings: Training) -> None:
    """Set every group's rate to its own peak times the schedule's factor rate / lr."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * (rate / settings.lr)


def clip_gradients(student: nn.Module, projectors: nn.Module | None, clip: float | None) -> Tensor:
    """Clip the student's gradient norm and return it as it was, without a host sync.

    The projectors are clipped apart: in one norm, switching features on would shrink the student's own steps.
    """
    limit = math.inf if clip is None else clip
    if projectors is not None:
        parameters = list(projectors.parameters())
        if parameters:
            nn.utils.clip_grad_norm_(parameters, limit)
    return nn.utils.clip_grad_norm_(student.parameters(), limit)

"""Optimizer, learning-rate schedule and gradient clipping of a training run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from entkd import native
from entkd.config import Training
from entkd.rounded import copy_of, written


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


class AdamW(torch.optim.AdamW):
    """PyTorch's, but that with the compiled kernels clipping, step and bf16 copies of the weights are one pass."""

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        super().__init__(groups, fused=True, **settings)
        self._factor: dict[Tensor, float] = {}

    @property
    def in_one_pass(self) -> bool:
        """Whether the kernels do the next step."""
        tensors = [p for group in self.param_groups for p in group["params"]]
        fit = all(p.device.type == "cpu" and p.dtype == torch.float32 and p.is_contiguous() for p in tensors)
        return fit and native.available()

    def scale_gradients(self, parameters: Iterable[Tensor], factor: float) -> None:
        """Multiply these gradients in the next step."""
        self._factor |= dict.fromkeys(parameters, factor)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step; raises RuntimeError where gradients were to be scaled, and cannot be."""
        factor, self._factor = self._factor, {}
        if closure is not None or not self.in_one_pass:
            if factor:
                raise RuntimeError("parameters were moved between clipping and the step")
            return super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(parameter) for _ in range(2))
                state["step"] += 1
                done = native.adamw(
                    parameter,
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    parameter.grad.contiguous(),
                    copy_of(parameter),
                    factor=factor.get(parameter, 1.0),
                    rate=group["lr"],
                    betas=group["betas"],
                    epsilon=group["eps"],
                    decay=group["weight_decay"],
                    step=int(state["step"]),
                )
                if not done:
                    raise RuntimeError("the kernels refuse a moment or gradient that is not fp32 and contiguous")
                written(parameter)
        return None


def build_optimizer(
    student: nn.Module, projectors: nn.Module | None, settings: Training, projector_lr: float | None
) -> AdamW:
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
    return AdamW(groups, lr=settings.lr, betas=settings.betas)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float, settings: Training) -> None:
    """Set every group's rate to its own peak times the schedule's factor rate / lr."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * (rate / settings.lr)


def clip_gradients(
    student: nn.Module, projectors: nn.Module | None, clip: float | None, optimizer: AdamW | None = None
) -> Tensor:
    """Clip the student's gradient norm and return it as it was, without a host sync on a GPU.

    The projectors are clipped apart: in one norm, switching features on would shrink the student's own steps. An
    ``optimizer`` that can do it in its step is only told the factors; gradients then stay as they are.
    """
    limit = math.inf if clip is None else clip
    norm = torch.zeros(())
    for module in (projectors, student):
        parameters = [] if module is None else [p for p in module.parameters() if p.grad is not None]
        if optimizer is None or not optimizer.in_one_pass:
            norm = nn.utils.clip_grad_norm_(parameters, limit)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            optimizer.scale_gradients(parameters, float((limit / (norm + 1e-6)).clamp(max=1.0)))
    return norm

"""Distillation: the stages (`stage.py`), the training loop (`loop.py`) and what it is made of."""

from entkd.distill.stage import distill, finetune_teacher

__all__ = ["distill", "finetune_teacher"]

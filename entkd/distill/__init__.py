"""Distillation: the stages (`stage.py`), the training loop (`loop.py`) and what it is made of."""

from entkd.distill.calibration import calibrate
from entkd.distill.stage import distill, finetune_teacher

__all__ = ["calibrate", "distill", "finetune_teacher"]

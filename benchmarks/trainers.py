"""The trainers whose steps are timed. All minimise the mean KL(teacher ‖ student) over the response tokens of a step.

Each has a student of its own with fp32 weights, the same AdamW and the same clipping. In bf16 all students run under
autocast, and the teachers of those that run one have bf16 weights, which is the faster choice for them.

Shape suffixes: B rows, L tokens of a row, N response tokens, V vocabulary.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.inputs import IGNORED, MODES, Inputs, Steps
from entkd.config import Method, Signals, Training
from entkd.data.packing import collate
from entkd.distill.objective import Objective
from entkd.distill.optim import build_optimizer, clip_gradients
from entkd.distill.targets import TeacherTargets
from entkd.models import load_model, load_tokenizer, prepare_for_cpu
from entkd.signals.files import write_tensors
from entkd.signals.teacher_pass import TeacherPass

TRAINING = Training(steps=1, lr=1e-4, clip=1.0)
"""Optimizer and clipping of everybody."""


class Trainer(ABC):
    """A student in training. ``step`` is what is timed."""

    def __init__(self, inputs: Inputs, steps: Steps, dtype: torch.dtype) -> None:
        self.inputs, self.steps, self.dtype = inputs, steps, dtype
        self.student = load_model(inputs.student).train()
        self.optimizer = build_optimizer(self.student, None, TRAINING, None)

    @abstractmethod
    def backward(self, number: int) -> Tensor:
        """Loss of a step's rows; their gradients are added to the student's."""

    def step(self, number: int) -> None:
        """Forward, backward, clipping, optimizer."""
        self.optimizer.zero_grad(set_to_none=True)
        self.backward(number)
        clip_gradients(self.student, None, TRAINING.clip, self.optimizer)
        self.optimizer.step()

    def loss_and_norm(self, number: int) -> tuple[float, float]:
        """Loss and gradient norm of a step, without taking it."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.backward(number)
        norm = clip_gradients(self.student, None, None)
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss), float(norm)

    def autocast(self) -> torch.autocast:
        """bf16 where the run is in bf16."""
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)


class Entkd(Trainer):
    """This package: what `entkd.distill.loop` does in a step, with signals of one mode that are ready."""

    def __init__(self, inputs: Inputs, steps: Steps, dtype: torch.dtype, mode: str) -> None:
        super().__init__(inputs, steps, dtype)
        method = Method.model_validate({"divergence": "forward_kl"})
        self.targets = TeacherTargets(method, inputs.signals[mode], steps.data, steps.corpus, 0)
        prepare_for_cpu(self.student, dtype)
        self.objective = Objective(self.student, method, steps.vocab_size, self.targets.head_UE)

    def backward(self, number: int) -> Tensor:
        blocks, block = self.steps.packed(number)
        batch = collate(self.steps.corpus, blocks, block, self.steps.pad_id)
        targets = self.targets.step([batch], 0.5)
        with self.autocast():
            losses = self.objective(targets.micro_batches[0].to("cpu"), targets.positions, targets.hard)
        losses["loss"].backward()
        return losses["loss"].detach()


class Plain(Trainer):
    """The loop that everybody writes: padded rows, logits of both models everywhere, KL where there is a response."""

    def __init__(self, inputs: Inputs, steps: Steps, dtype: torch.dtype) -> None:
        super().__init__(inputs, steps, dtype)
        self.teacher = load_model(inputs.teacher, dtype)

    def backward(self, number: int) -> Tensor:
        batch = self.steps.padded(number)
        tokens = {"input_ids": batch.input_ids_BL, "attention_mask": batch.attention_mask_BL}
        with self.autocast():
            with torch.no_grad():
                teacher_BLV = self.teacher(**tokens).logits
            student_BLV = self.student(**tokens).logits
        predicts_BL = batch.labels_BL[:, 1:] != IGNORED
        log_p_NV = F.log_softmax(teacher_BLV[:, :-1][predicts_BL].float(), dim=-1)
        log_q_NV = F.log_softmax(student_BLV[:, :-1][predicts_BL].float(), dim=-1)
        loss = F.kl_div(log_q_NV, log_p_NV, reduction="sum", log_target=True) / predicts_BL.sum()
        loss.backward()
        return loss.detach()


class TrlGKD(Trainer):
    """TRL's `GKDTrainer`, off-policy: its own `training_step` on a padded batch.

    ``lmbda=0`` trains on the data's responses, ``beta=0`` is KL(teacher ‖ student), and its `compute_loss` passes no
    temperature on, so that it is 1. Two defaults are set by hand: gradient checkpointing is off, since no other trainer
    recomputes activations, and bf16 follows the run. Its loss is divided by the labels of the batch that are not
    ignored, which is the number of response tokens as no document begins with one: nothing to rescale.
    """

    def __init__(self, inputs: Inputs, steps: Steps, dtype: torch.dtype) -> None:
        from accelerate.state import AcceleratorState
        from datasets import Dataset
        from transformers.utils import logging
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        super().__init__(inputs, steps, dtype)
        AcceleratorState._reset_state(reset_partial_state=True)  # it would keep the first trainer's precision
        logging.set_verbosity_error()
        with tempfile.TemporaryDirectory() as folder:
            arguments = GKDConfig(
                output_dir=folder,
                lmbda=0.0,
                beta=0.0,
                gradient_checkpointing=False,
                bf16=dtype == torch.bfloat16,
                use_cpu=True,
                per_device_train_batch_size=steps.batch,
                max_grad_norm=TRAINING.clip,
                report_to=[],
                disable_tqdm=True,
            )
            self.trainer = GKDTrainer(
                model=self.student,
                teacher_model=load_model(inputs.teacher, dtype),
                args=arguments,
                train_dataset=Dataset.from_dict({"messages": [[{"role": "user", "content": ""}]]}),  # never read
                processing_class=load_tokenizer(inputs.teacher),
                optimizers=(self.optimizer, None),
            )
        # What `train()` does before its first step.
        self.model = self.trainer.accelerator.prepare(self.student)
        self.trainer.current_gradient_accumulation_steps = 1

    def backward(self, number: int) -> Tensor:
        batch = self.steps.padded(number)
        inputs = {
            "input_ids": batch.input_ids_BL,
            "attention_mask": batch.attention_mask_BL,
            "labels": batch.labels_BL,
        }
        batches, count = self.trainer.get_batch_samples(iter([inputs]), 1, torch.device("cpu"))
        loss: Tensor = self.trainer.training_step(self.model, batches[0], count)
        return loss


Make = Callable[[Inputs, Steps, torch.dtype], Trainer]
TRAINERS: dict[str, Make] = {
    "trl_gkd": TrlGKD,
    "plain": Plain,
    **{
        f"entkd_{mode}": lambda inputs, steps, dtype, mode=mode: Entkd(inputs, steps, dtype, mode)  # type: ignore[misc]
        for mode in MODES
    },
}
"""Who is timed. One line for another."""
REFERENCE = "trl_gkd"
"""Whose seconds ratios are to."""


class OneTeacherPass:
    """The teacher over the rows of a step, as `entkd signals` runs it, writing of the shard included."""

    def __init__(self, inputs: Inputs, steps: Steps, dtype: torch.dtype, mode: str, folder: Path) -> None:
        self.steps, self.folder = steps, folder
        needs = {"features": None, "splits": ["train"]}
        settings = Signals.model_validate({"mode": mode, "features": None})
        self.teacher = TeacherPass(
            inputs.teacher, steps.vocab_size, needs, dtype, torch.device("cpu"), settings, lambda tokens: None
        )

    def run(self, number: int) -> None:
        """One pass."""
        result = self.teacher.run(self.steps.data, "train", self.steps.documents(number), None)
        if result.logprobs_RU is not None:
            write_tensors(self.folder / "logprobs.safetensors", {"logprobs": result.logprobs_RU}, {})
        write_tensors(self.folder / "shard.safetensors", result.tensors(), {})

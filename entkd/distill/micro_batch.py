"""What one forward pass of training reads: tokens, and what the teacher and the components say of them.

Shapes: N response tokens, H hard tokens, E teacher width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from entkd.data.packing import Batch
from entkd.methods.base import Factors
from entkd.runtime import to_device
from entkd.sparse import SparseTarget

Teacher = Tensor | SparseTarget
"""The teacher's distributions, in one of the forms that a store keeps them in."""


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass: tokens, and what the teacher and the components say of them."""

    batch: Batch
    teacher_NE: Teacher | Callable[[], Teacher] | None = None
    """Last hidden state of the teacher, or its log-probabilities, or sparse targets, or what reads them; None where no
    divergence is trained."""
    weight_N: Tensor | None = None
    """Curriculum weights, normalised over the global batch; None is 1."""
    temperature_N: Tensor | None = None
    """Temperatures; None is 1."""
    hard_H: Tensor | None = None
    """Indices into N of the tokens with a feature loss; None where there is none."""
    teacher_features: tuple[Tensor, ...] = ()
    """(H, E) hidden states of the teacher, one for each layer pair."""
    factors: Factors | None = None
    """What an approach that looks at the global batch says of these tokens; None where it looks at them alone."""

    def teacher(self) -> Teacher | None:
        """What ``teacher_NE`` is or reads."""
        return self.teacher_NE() if callable(self.teacher_NE) else self.teacher_NE

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device, with the teacher's signals read. On a CPU they may be in a buffer that the next
        micro-batch reads into."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else to_device(tensor, device)

        return MicroBatch(
            self.batch.to(device),
            teacher.to(device) if isinstance(teacher := self.teacher(), SparseTarget) else moved(teacher),
            moved(self.weight_N),
            moved(self.temperature_N),
            moved(self.hard_H),
            tuple(to_device(tensor, device) for tensor in self.teacher_features),
            self.factors,  # made on the device
        )

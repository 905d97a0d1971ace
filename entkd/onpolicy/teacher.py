"""What the teacher says of text that the student wrote: the targets that a signal store would hold of it.

Shape suffixes: N response tokens of a micro-batch, E teacher width, U tokens of the vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entkd.config import Method, Signals
from entkd.data.packing import Batch
from entkd.distill.flops import trunk_flops_per_token
from entkd.distill.micro_batch import Teacher
from entkd.distill.scan import looks
from entkd.distill.targets import TeacherTargets, infinite_at_zero
from entkd.errors import UserError
from entkd.signals import SignalStore
from entkd.signals.teacher_pass import TILE_ELEMENTS, TeacherPass


@dataclass(frozen=True)
class Taught:
    """The teacher's view of the response tokens of one micro-batch."""

    entropy_N: Tensor
    """fp32, nats, on the CPU."""
    hidden_NE: Tensor
    """Last hidden states, on the teacher's device."""
    features: tuple[Tensor, ...]
    """(N, E) bf16 states of the layers that the feature loss reads, on the teacher's device."""


class OnlineTeacher:
    """The teacher of a signal store, run as the store's own pass ran it; loaded when it is first asked.

    Raises
    ------
    UserError
        If the folder holds another teacher than the store's.
    """

    def __init__(self, method: Method, targets: TeacherTargets, folder: Path, device: torch.device) -> None:
        assert targets.store is not None
        self._method, self._targets, self._folder, self._device = method, targets, folder, device
        self._store: SignalStore = targets.store
        self._loaded: TeacherPass | None = None
        manifest = folder / "manifest.json"
        if not manifest.is_file():
            raise UserError(f"--teacher: {manifest} is missing; run `entkd prepare-teacher` first")
        found, expected = json.loads(manifest.read_text(encoding="utf-8"))["sha256"], self._content["teacher"]
        if found != expected:
            raise UserError(
                f"--teacher: {folder} has sha256 {found[:12]}, the signals are of a teacher with {expected[:12]}; "
                "prepare the signals again, or name their teacher"
            )

    @property
    def _content(self) -> dict[str, Any]:
        content: dict[str, Any] = self._store.manifest["content"]
        return content

    @property
    def _pass(self) -> TeacherPass:
        if self._loaded is None:
            self._loaded = TeacherPass(
                self._folder,
                self._store.vocab_size,
                {"features": None},
                getattr(torch, self._content["precision"]),
                self._device,
                Signals.model_validate(self._content["settings"]),
                advance=lambda _: None,
            )
        return self._loaded

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Taught:
        """One forward pass of the teacher's trunk, and the statistics of its distributions.

        Raises
        ------
        UserError
            If the output is NaN or infinite, or a logit −inf and the divergence infinite there.
        """
        layers, width = self._targets.teacher_layers, self._store.width
        if not len(batch.tokens_N):  # padding alone
            empty_NE = torch.empty(0, width, dtype=torch.bfloat16, device=self._device)
            return Taught(torch.empty(0), empty_NE, (empty_NE,) * len(layers))
        hidden_NE, captured, found, has_inf_logits = self._pass.forward(batch.to(self._device), layers)
        if not all(bool(torch.isfinite(output).all()) for output in (found["logsumexp"], *captured.values())):
            raise UserError(
                "teacher: NaN or infinite output on text that the student wrote; run with teacher.precision: fp32"
            )
        infinite = infinite_at_zero(self._method)
        if has_inf_logits and infinite:
            raise UserError(
                f"method.{infinite} contains KL(q‖p), which is infinite for this teacher: it gives "
                "tokens of the student's text a logit of -inf; use forward_kl, jsd, skew_kl, alpha_beta or tvd"
            )
        features = tuple(captured[layer].to(torch.bfloat16) for layer in layers)
        return Taught(found["entropy"].cpu(), hidden_NE, features)

    def distribution(self, taught: Taught) -> Teacher | partial[Tensor]:
        """The teacher's side of the divergence in the form in which the store's micro-batches give it."""
        if self._targets.head_UE is not None:
            return taught.hidden_NE.to(torch.bfloat16)
        # Where the store has log-probabilities: formed when their turn comes, as those of a step may be too large.
        return partial(self._logprobs, taught.hidden_NE)

    def flops(self, tokens: int, positions: int, block: int) -> float:
        """Of so many tokens through the trunk and so many response tokens' projections; none where none were asked."""
        if not tokens:
            return 0.0
        trunk = trunk_flops_per_token(self._pass.model, block) * tokens
        # Projected once for the statistics; where the loss reads log-probabilities, again whenever it does. Where it
        # projects the hidden states itself, that is part of the step.
        times = 1 if self._targets.head_UE is not None else 2 + looks(self._method)
        return trunk + times * 2.0 * self._store.width * self._store.vocab_size * positions

    @torch.no_grad()
    def _logprobs(self, hidden_NE: Tensor) -> Tensor:
        head_UE = self._pass.head_device_UE
        logprobs_NU = torch.empty(len(hidden_NE), len(head_UE), dtype=torch.float16, device=self._device)
        tile = max(1, TILE_ELEMENTS // len(head_UE))
        for start in range(0, len(hidden_NE), tile):
            logits_NU = hidden_NE[start : start + tile].float() @ head_UE.T
            logprobs_NU[start : start + tile] = logits_NU - logits_NU.logsumexp(dim=1, keepdim=True)
        return logprobs_NU

"""Steps on the student's text between steps on the data (GKD, arXiv 2306.13649; DistiLLM, arXiv 2402.03898).

A step on the student's text keeps the prompts that the data would have had, so that arms stay paired by seed. Its
responses are packed anew, the teacher reads them, and from there on everything is as with stored signals: difficulty by
the store's calibration, weights and temperatures over the global batch, one objective. What is drawn depends on seed
and step alone; what has to be remembered between steps is the state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from entkd import runtime
from entkd.components import token_plan
from entkd.data import Corpus
from entkd.data.packing import Batch, Block
from entkd.distill.distributed import World
from entkd.distill.micro_batch import MicroBatch
from entkd.distill.run import Run
from entkd.distill.source import Source
from entkd.distill.targets import Step, TeacherTargets
from entkd.errors import UserError
from entkd.methods.distillm import DistiLLM
from entkd.methods.distillm import Source as Kind
from entkd.onpolicy.buffer import ReplayBuffer, as_corpus
from entkd.onpolicy.generation import Writer, micro_batches
from entkd.onpolicy.teacher import OnlineTeacher


@dataclass
class Ledger:
    """What the student's text has cost so far."""

    generated_tokens: int = 0
    """Tokens that the student wrote, EOS included."""
    teacher_tokens_online: int = 0
    """Tokens that the teacher read of the student's text, prompts included, padding not."""
    on_policy_steps: int = 0
    """Steps on the student's text."""
    replayed_steps: int = 0
    """Those of them whose text came out of the buffer."""
    prompt_tokens: int = 0
    """Tokens of the prompts that the student read in order to write."""
    positions: int = 0
    """Response tokens of the student's text."""


class OnPolicy(Source):
    """The source of methods with `on_policy`; see `step_source` for the parameters."""

    def __init__(
        self,
        run: Run,
        steps: Sequence[Sequence[Block]],
        targets: TeacherTargets,
        corpus: Corpus,
        writer: Writer,
        world: World,
        device: torch.device,
        evaluate: Callable[[], float],
    ) -> None:
        super().__init__(targets)
        method, settings = run.method, run.method.on_policy
        assert settings is not None
        assert targets.store is not None
        if run.teacher is None:
            raise UserError(
                f"method.on_policy: {settings.name} has the teacher read what the student writes; give --teacher"
            )
        self.method, self.training, self.seed, self.settings = method, run.training, run.seed, settings
        self.corpus, self.writer, self.world, self.evaluate = corpus, writer, world, evaluate
        self.teacher = OnlineTeacher(method, targets, run.teacher, device)
        self.difficulty = targets.store.difficulty(method.difficulty.scale)
        self.ledger = Ledger()
        self.steps = len(steps)
        self.share = self.settings.share
        """φ of DistiLLM."""
        self.reference: float | None = None
        """Dev loss that the next one is compared with; None before the first step."""
        self.buffer = ReplayBuffer(self.settings.capacity if isinstance(self.settings, DistiLLM) else 1)
        if isinstance(self.settings, DistiLLM):
            _check_capacity(self.settings, [sum(len(block) for block in blocks) for blocks in steps])

    def step(self, step: int, blocks: Sequence[Block], batches: Sequence[Batch], progress: float) -> Step:
        """A step of the data, or of text that the student has written to its prompts, or of the buffer."""
        documents = np.concatenate(blocks)
        kind = self.world.broadcast(self._kind(step, len(documents)))  # processes may differ in a last bit of a loss
        own = {"on_policy": float(kind != "data")}
        if isinstance(self.settings, DistiLLM):
            own |= {"generated": float(kind == "written"), "share": self.share}
        if kind == "data":
            made = self.targets.step(batches, progress)
            return dataclasses.replace(made, summary=made.summary | own)
        if kind == "written":
            prompts = [ids[:length].tolist() for ids, length in map(self.corpus.document, documents.tolist())]
            # One process writes: on an accelerator another one could sample another text from the same weights.
            written = self.world.broadcast(self.writer(prompts, step) if self.world.leads else None)
            self.ledger.generated_tokens += sum(len(response) for _, response in written)
            self.ledger.prompt_tokens += sum(map(len, prompts))
            if isinstance(self.settings, DistiLLM):
                self.buffer.add(written)
        if kind == "replayed" or (isinstance(self.settings, DistiLLM) and self.settings.variant == "paper"):
            written = self.buffer.draw(len(documents), runtime.numpy_stream(self.seed, f"replay {step}"))
            self.ledger.replayed_steps += 1
        self.ledger.on_policy_steps += 1
        return self.taught(as_corpus(written), step, progress, own)

    def _kind(self, step: int, documents: int) -> Kind:
        draw = float(runtime.numpy_stream(self.seed, f"on-policy {step}").random())
        if not isinstance(self.settings, DistiLLM):
            return "written" if self.settings.writes(draw) else "data"
        if self.reference is None:
            self.reference = self.evaluate()
        return self.settings.source(draw, self.share, step / self.steps, len(self.buffer), documents)

    def taught(self, written: Corpus, step: int, progress: float, summary: dict[str, float]) -> Step:
        """Documents as micro-batches with what the teacher says of them.

        Parameters
        ----------
        written
            The documents.
        step
            Number of the step, from 1.
        progress
            u in [0, 1].
        summary
            Further numbers for the log.
        """
        batches = micro_batches(written, self.training, self.writer.eos_token_id, self.world.size)
        own = self.world.share(list(range(len(batches))))
        taught = {index: self.teacher(batches[index]) for index in own}
        entropy: dict[int, torch.Tensor] = {}
        for part in self.world.gather({index: views.entropy_N for index, views in taught.items()}):
            entropy |= part
        tokens_N = torch.cat([batch.tokens_N for batch in batches])
        document_N = torch.from_numpy(np.searchsorted(written.response_offsets, tokens_N.numpy(), side="right"))
        difficulty_N = self.difficulty(torch.cat([entropy[index] for index in range(len(batches))]), document_N)
        # Tokens of no data: indices that neither the data nor another step have.
        plan = token_plan(difficulty_N, progress, self.method, tokens_N + (step << 32), self.seed)
        micros, start = [], 0
        for index, batch in enumerate(batches):
            cut = slice(start, start := start + len(batch.tokens_N))
            hard_H = None if plan.features_N is None else plan.features_N[cut].nonzero().squeeze(1)
            views = taught.get(index)
            if views is None:  # another process trains it
                micros.append(MicroBatch(batch))
                continue
            micros.append(
                MicroBatch(
                    batch,
                    teacher_NE=self.teacher.distribution(views),
                    weight_N=None if plan.weight_N is None else plan.weight_N[cut],
                    temperature_N=None if plan.temperature_N is None else plan.temperature_N[cut],
                    hard_H=hard_H,
                    teacher_features=()
                    if hard_H is None
                    else tuple(states_NE[hard_H.to(states_NE.device)] for states_NE in views.features),
                )
            )
        tokens = sum(batch.input_ids_BL.numel() for batch in batches)
        self.ledger.teacher_tokens_online += int(written.lengths.sum())
        self.ledger.positions += len(tokens_N)
        return Step(micros, len(tokens_N), int(plan.summary["hard"]), tokens, plan.summary | summary)

    def evaluated(self, nll: float) -> None:
        """DistiLLM's φ follows the dev loss."""
        if isinstance(self.settings, DistiLLM) and self.reference is not None:
            self.share, self.reference = self.settings.evaluated(nll, self.share, self.reference)

    def state(self) -> dict[str, Any]:
        """φ, its reference, the buffer and the ledger."""
        return {
            "share": self.share,
            "reference": self.reference,
            "buffer": self.buffer.state(),
            "ledger": dataclasses.asdict(self.ledger),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.share, self.reference = state["share"], state["reference"]
        self.buffer.load_state(state["buffer"])
        self.ledger = Ledger(**state["ledger"])

    def record(self) -> dict[str, Any]:
        """The ledger under the names of the base."""
        return {name: getattr(self.ledger, name) for name in super().record()}

    def tflops(self) -> float:
        """Generation and the teacher's passes; attention counts as over a whole block."""
        ledger = self.ledger
        student = self.writer.flops(ledger.prompt_tokens + ledger.generated_tokens, ledger.generated_tokens)
        return (
            student + self.teacher.flops(ledger.teacher_tokens_online, ledger.positions, self.training.block)
        ) / 1e12


def _check_capacity(settings: DistiLLM, documents: Sequence[int]) -> None:
    """Refuse a buffer that is smaller than a step, or that no run of these steps could ever draw from."""
    where = f"method.on_policy.capacity: {settings.capacity} documents"
    if settings.capacity < max(documents):
        raise UserError(f"{where}, and a step has up to {max(documents)}; raise it, or lower training.blocks_per_step")
    if settings.variant == "authors" and settings.capacity > sum(documents):
        raise UserError(
            f"{where}, and the steps of this run have {sum(documents)} in all: a buffer that is drawn from when it is "
            "full would never be; lower it, or train longer"
        )

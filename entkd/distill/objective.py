"""Student and loss in one module, so that the hooks of DDP and FSDP, which sit on its forward, see every parameter.

L = a_kd (1/N) Σ_i w_i s(T_i) D_i + a_ce (1/N) Σ_i CE_i + λ L_feat, each term present or absent, with N and |H|
counted over the global batch of an optimizer step: all devices, all micro-batches (docs/method.md, section 5).

Shapes: B blocks, L tokens in a block, N response tokens, H hard tokens, D student width, E teacher width,
V student rows of the output projection, U teacher rows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from entkd.closeness import linear_statistics
from entkd.config import Features, Method
from entkd.config.folders import layer_pairs_problem
from entkd.distill.approach import ApproachState, combine, distance_slopes, document_of_tokens, factors_of_batches
from entkd.distill.micro_batch import MicroBatch, Teacher
from entkd.errors import UserError
from entkd.features import Projectors, feature_loss
from entkd.fused import linear_cross_entropy, linear_distillation
from entkd.methods.base import Factors
from entkd.models import layer_points, output_weight, packed_states
from entkd.products import cast, compute_dtype
from entkd.sparse import SparseTarget


def student_layers(settings: Features, n_layers: int) -> tuple[int, ...]:
    """0-based student layer of each layer pair; raises UserError where the student has no such layer."""
    if settings.layers is None:
        return layer_points(n_layers, settings.points)
    problem = layer_pairs_problem(settings.layers, n_layers, None)
    if problem:
        raise UserError(f"method.features.layers: {problem}")
    return tuple(ours for ours, _ in settings.layers)


class Objective(nn.Module):
    """The student, the projectors and the total loss of one method.

    Parameters
    ----------
    student
        A causal language model; trained.
    method
        What to train.
    vocab_size
        Rows of both output projections that are tokens; padded rows beyond are ignored.
    teacher_head_UE
        The teacher's output projection; None where its log-probabilities or sparse targets are given, or no divergence
        is trained.
    teacher_width
        E, read by the projectors alone.
    """

    teacher_head_UE: Tensor | None

    def __init__(
        self,
        student: PreTrainedModel,
        method: Method,
        vocab_size: int,
        teacher_head_UE: Tensor | None = None,
        teacher_width: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.method = method
        self.vocab_size = vocab_size
        self.register_buffer("teacher_head_UE", teacher_head_UE, persistent=False)
        self.student_layers: tuple[int, ...] = ()
        self.projectors: Projectors | None = None
        self.approach = ApproachState(method.approach) if method.approach is not None else None
        if method.features is not None:
            config = student.config
            self.student_layers = student_layers(method.features, config.num_hidden_layers)
            self.projectors = Projectors(
                config.hidden_size, teacher_width, len(self.student_layers), method.features.projector, generator
            )

    def forward(self, micro: MicroBatch, positions: int, hard: int, selected: int = 0) -> dict[str, Tensor]:
        """Loss of one micro-batch and its terms.

        Parameters
        ----------
        micro
            The micro-batch.
        positions, hard
            N and |H| of the global batch; zero counts as one.
        selected
            What the approach says of the global batch's documents (`Approach.selected`).

        Returns
        -------
        dict
            ``loss``, to be summed over micro-batches and devices, and detached ``kd``, ``ce``, ``features``: the
            unweighted terms, each already divided by its global denominator; and the terms that an approach asks for.
        """
        method, batch = self.method, micro.batch
        # Only response positions meet the output projection: prompts and padding are never projected.
        hidden_ND, captured = packed_states(self.student, batch, self.student_layers)
        weight_VD = output_weight(self.student)
        terms: dict[str, Tensor] = {}
        loss = hidden_ND.new_zeros((), dtype=torch.float32)
        if method.divergence is not None and method.trained_divergence is not None:
            teacher = micro.teacher()
            assert teacher is not None
            # Sparse targets are at T = 1, and `TeacherTargets` has refused methods of other temperatures.
            sparse = teacher if isinstance(teacher, SparseTarget) else None
            factors = self._factors(micro, hidden_ND, teacher, positions, selected)
            name, settings = method.trained_divergence
            asked = method.approach.terms if method.approach is not None else ()
            # One projection of the student serves both terms.
            head = linear_distillation(
                hidden_ND,
                weight_VD,
                None if isinstance(teacher, SparseTarget) else teacher,
                self.teacher_head_UE,
                target=sparse,
                labels_N=batch.labels_N if method.ce is not None else None,
                divergence=name,
                settings=settings,
                divergence_weight=method.divergence.weight / max(1, positions),
                cross_entropy_weight=(method.ce.weight if method.ce is not None else 1.0) / max(1, positions),
                temperature_N=factors.temperature_N if sparse is None else None,
                weight_N=factors.weight_N,
                distance_slope_N=factors.distance_slope_N,
                teacher_share=None if self.approach is None else self.approach.teacher_share(),
                temperature_gradient="temperature_gradient" in asked,
                t2=method.temperature.t2 if method.temperature is not None else "per_token",
                vocab_size=self.vocab_size,
            )
            loss = loss + head.total
            terms["kd"] = head.divergence / max(1, positions)
            if head.cross_entropy is not None:
                terms["ce"] = head.cross_entropy / max(1, positions)
            terms |= {term: getattr(head, term) / max(1, positions) for term in asked}
        elif method.ce is not None:
            share_N = hidden_ND.new_full((len(hidden_ND),), 1 / max(1, positions), dtype=compute_dtype(hidden_ND))
            terms["ce"] = linear_cross_entropy(
                hidden_ND, weight_VD, batch.labels_N, weight_N=share_N, vocab_size=self.vocab_size
            )
            loss = loss + method.ce.weight * terms["ce"]
        if method.features is not None:
            terms["features"] = self._features(captured, micro, hard)
            loss = loss + method.features.weight * terms["features"]
        return {"loss": loss} | {name: term.detach() for name, term in terms.items()}

    def _factors(
        self, micro: MicroBatch, hidden_ND: Tensor, teacher: Teacher, positions: int, selected: int
    ) -> Factors:
        """Weights and temperatures of the components, and of the approach on top of them."""
        if self.approach is None:
            return Factors(micro.weight_N, micro.temperature_N)
        factors = micro.factors
        if factors is None and self.approach.settings.statistics:
            found, documents = self.statistics_of(hidden_ND, teacher), document_of_tokens(micro.batch)
            looked_at = self.approach, [found], [documents], positions, selected, self.vocab_size
            (factors,) = factors_of_batches(*looked_at)
            if self.approach.settings.moves_temperature:
                slope_N = self._temperature_slope(hidden_ND, teacher, micro.weight_N, factors)
                factors = replace(factors, distance_slope_N=distance_slopes(*looked_at, [slope_N])[0])
        factors = factors or Factors()
        temperature_N = micro.temperature_N
        common = self.approach.temperature()
        if common is not None:
            temperature_N = common.to(compute_dtype(hidden_ND)).expand(len(hidden_ND))
        if temperature_N is None:
            temperature_N = factors.temperature_N
        return Factors(combine(micro.weight_N, factors.weight_N), temperature_N, factors.distance_slope_N)

    def _temperature_slope(
        self, hidden_ND: Tensor, teacher: Teacher, weight_N: Tensor | None, factors: Factors
    ) -> Tensor:
        """w_i d[T_i² D_i]/dT_i of these tokens, with w the product of both weights."""
        found = self.statistics_of(hidden_ND, teacher, ("temperature_slope",), factors.temperature_N)
        slope_N = found["temperature_slope"]
        weight_N = combine(weight_N, factors.weight_N)
        return slope_N if weight_N is None else (slope_N * weight_N).masked_fill(weight_N == 0, 0)

    @torch.no_grad()
    def statistics_of(
        self,
        hidden_ND: Tensor,
        teacher: Teacher,
        wants: tuple[str, ...] | None = None,
        temperature_N: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What the approach reads of these tokens' outputs, or what ``wants`` names, (N,) each, without gradient."""
        assert self.approach is not None
        assert self.method.divergence is not None
        settings, device = self.approach.settings, hidden_ND.device.type
        weight_VD = output_weight(self.student).detach()
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16:
            hidden_ND, weight_VD = hidden_ND.bfloat16(), cast(weight_VD, torch.bfloat16, "weight of products")
        dense = None if isinstance(teacher, SparseTarget) else teacher
        with torch.autocast(device, enabled=False):
            return linear_statistics(
                hidden_ND.detach(),
                weight_VD,
                dense,
                None if dense is None else self.teacher_head_UE,
                wants=wants or settings.statistics,
                divergence=self.method.divergence.name,
                temperature_N=temperature_N,
                entropy_temperature=settings.entropy_temperature,
                vocab_size=self.vocab_size,
            )

    @torch.no_grad()
    def scan(self, micro: MicroBatch, factors: Factors | None = None) -> dict[str, Tensor]:
        """`statistics_of` a micro-batch, by a forward pass of its own; or, with its factors, the ``temperature_slope``
        of the weighted loss."""
        teacher = micro.teacher()
        assert teacher is not None
        hidden_ND, _ = packed_states(self.student, micro.batch)
        if factors is not None:
            return {"temperature_slope": self._temperature_slope(hidden_ND, teacher, micro.weight_N, factors)}
        return self.statistics_of(hidden_ND, teacher)

    def _features(self, captured: dict[int, Tensor], micro: MicroBatch, hard: int) -> Tensor:
        """L_feat (docs/method.md, section 4): mean over |H| global hard tokens and |M| layer pairs."""
        assert self.method.features is not None
        assert self.projectors is not None
        pairs = zip(self.student_layers, micro.teacher_features, self.projectors, strict=True)
        losses = [
            feature_loss(captured[layer][micro.hard_H], teacher_HE, projector, self.method.features.loss)
            for layer, teacher_HE, projector in pairs
        ]
        return torch.stack(losses).sum() / (max(1, hard) * len(losses))

"""Losses fused with the output projections, in tiles of tokens: there is never an (N, V) tensor over all tokens.

The machinery and its precision are in ``entkd.tiles``, the divergences in ``entkd.kernels``. Losses are sums; the
caller divides by the global number of tokens.

Shapes: N tokens, R tokens of a tile, D student width, E teacher width, V student rows, U teacher rows of the output
projection, both cut to ``vocab_size``. "1" is a dimension of length 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from entkd.closeness import linear_statistics
from entkd.divergences import DIVERGENCES
from entkd.heads import common_rows, teacher_logits, used_rows
from entkd.kernels import TERMS
from entkd.products import RowsOf, compute_dtype
from entkd.softmax import cross_entropy, in_full
from entkd.sparse import SparseTarget
from entkd.temperature import loss_scale
from entkd.tiles import tiled_loss
from entkd.token_loss import TokenLoss, TokenWeight
from entkd.workspace import buffer

__all__ = ["HeadLoss", "linear_cross_entropy", "linear_distillation", "linear_divergence", "linear_statistics"]


@dataclass(frozen=True)
class HeadLoss:
    """What `linear_distillation` returns."""

    total: Tensor
    """a_kd · divergence + a_ce · cross-entropy, with gradients."""
    divergence: Tensor
    """Σ_i w_i s(T_i) D_i; without gradient, as all that follow."""
    cross_entropy: Tensor | None = None
    """Σ_i CE_i; None without labels."""
    target_cross_entropy: Tensor | None = None
    """Σ_i -Σ_v p_iv log q_iv with p of the mixed teacher, over all tokens alike; None without ``teacher_share``."""
    temperature_gradient: Tensor | None = None
    """Σ_i w_i d[s(T_i) D_i]/dT_i; None where it was not asked for."""


def linear_divergence(
    student_hidden_ND: Tensor,
    student_weight_VD: Tensor,
    teacher_hidden_NE: Tensor | None = None,
    teacher_weight_UE: Tensor | None = None,
    *,
    target: SparseTarget | None = None,
    divergence: str = "forward_kl",
    temperature_N: Tensor | None = None,
    weight_N: Tensor | None = None,
    token_weight: TokenWeight | None = None,
    t2: Literal["per_token", "linear", "off"] = "per_token",
    vocab_size: int | None = None,
    settings: Mapping[str, Any] | None = None,
    rounded_logits: bool = False,
) -> Tensor:
    """Σ_i w_i s(T_i) D(p_i(T_i) ‖ q_i(T_i)) in nats, with gradients to the student's hidden states and weight.

    Parameters
    ----------
    student_hidden_ND, teacher_hidden_NE
        (N, D) and (N, E) last hidden states of the same tokens. N = 0 gives 0 and zero gradients.
    student_weight_VD, teacher_weight_UE
        Output projections, rows in the order of one tokenizer. Without the teacher's, ``teacher_hidden_NE`` holds
        (N, U) logits, or log-probabilities at T = 1, which differ by a constant.
    target
        In place of the teacher's two tensors: its distributions on a few tokens each. Only for the forward KL at T = 1,
        whose estimate from them is unbiased.
    divergence
        A name in ``entkd.divergences.DIVERGENCES``.
    temperature_N, weight_N
        (N,) temperatures and weights, 1 where absent; never differentiated. On a CPU tokens of weight 0 are left out,
        so that nothing in their rows, NaN included, matters; elsewhere they have gradient 0, but must be finite.
    token_weight
        A further factor of the weights, formed inside the tile from the student's entropy at T = 1 and the divergence.
    t2
        s(T): ``per_token`` T², ``linear`` T, ``off`` 1.
    vocab_size
        Rows of both projections that are tokens. Rows beyond are not read, and get gradient 0. Needed where V ≠ U.
    settings
        Further keyword arguments of the divergence, e.g. ``{"beta": 0.2}``.
    rounded_logits
        Round the logits of bf16 operands to bf16, as trainers do that project in bf16: less traffic, and where student
        and teacher are close (KL ≈ 0.02) about a tenth of the gradient is noise. No experiment uses it; it is there to
        be compared.

    Raises
    ------
    ValueError
        Unknown divergence, numbers of tokens that differ, vocabularies that do not fit, or a sparse target for what it
        cannot give.
    """
    return linear_distillation(
        student_hidden_ND,
        student_weight_VD,
        teacher_hidden_NE,
        teacher_weight_UE,
        target=target,
        divergence=divergence,
        temperature_N=temperature_N,
        weight_N=weight_N,
        token_weight=token_weight,
        t2=t2,
        vocab_size=vocab_size,
        settings=settings,
        rounded_logits=rounded_logits,
    ).total


def linear_distillation(
    student_hidden_ND: Tensor,
    student_weight_VD: Tensor,
    teacher_hidden_NE: Tensor | None = None,
    teacher_weight_UE: Tensor | None = None,
    *,
    target: SparseTarget | None = None,
    labels_N: Tensor | None = None,
    divergence: str = "forward_kl",
    divergence_weight: float = 1.0,
    cross_entropy_weight: float = 1.0,
    temperature_N: Tensor | None = None,
    weight_N: Tensor | None = None,
    token_weight: TokenWeight | None = None,
    teacher_share: Tensor | None = None,
    temperature_gradient: bool = False,
    distance_slope_N: Tensor | None = None,
    t2: Literal["per_token", "linear", "off"] = "per_token",
    vocab_size: int | None = None,
    settings: Mapping[str, Any] | None = None,
    rounded_logits: bool = False,
) -> HeadLoss:
    """`linear_divergence` and, with ``labels_N``, `linear_cross_entropy`, over one projection of the student.

    ``divergence_weight`` and ``cross_entropy_weight`` are a_kd and a_ce. All else is as in `linear_divergence`, whose
    weights and temperatures do not touch the cross-entropy: all tokens have one.

    Two further things that published methods do inside the tile: with ``teacher_share``, a scalar t in (0, 1], the
    teacher's logits are (1-t) z_q + t z_p, z_q without gradient (TAID, arXiv 2501.16937); with
    ``temperature_gradient`` the derivative of the divergence term by a common temperature is found (CTKD, arXiv
    2211.16231), of the two KLs alone. ``distance_slope_N``, (N,), adds to the gradient, not to the value, that of
    a_kd Σ_i c_i s_i, with s the Hellinger distance at T = 1 (AdaKD's released code, arXiv 2510.11615).
    """
    if divergence not in DIVERGENCES and divergence not in TERMS:
        raise ValueError(f"divergence {divergence!r}: allowed are {', '.join({**DIVERGENCES, **TERMS})}")
    if temperature_gradient and temperature_N is None:
        raise ValueError("temperature_gradient: give temperature_N, the temperatures to differentiate by")
    given = target.ids_NK if target is not None else teacher_hidden_NE
    if given is None or (target is not None and teacher_hidden_NE is not None):
        raise ValueError("give the teacher's hidden states or logits, or a sparse target, and not both")
    if target is not None and (divergence != "forward_kl" or temperature_N is not None):
        raise ValueError(
            f"a sparse target gives the forward KL at T = 1 only, not {divergence}"
            f"{' at other temperatures' if temperature_N is not None else ''}; use hidden states"
        )
    if target is not None and teacher_share is not None:
        raise ValueError("a sparse target cannot be mixed with the student's logits; use hidden states")
    vocab_size = common_rows(student_hidden_ND, student_weight_VD, teacher_hidden_NE, teacher_weight_UE, vocab_size)
    if len(given) != len(student_hidden_ND):
        raise ValueError(f"{len(student_hidden_ND)} student tokens but {len(given)} teacher tokens")
    # Tokens of weight 0 are left out and not multiplied by 0: what is in their rows, NaN included, must not matter.
    # They stay where something else reads them, and on a GPU, where counting them would make the host wait.
    kept_K = None
    alone = labels_N is None and distance_slope_N is None and teacher_share is None
    if weight_N is not None and alone and weight_N.device.type == "cpu":
        kept_K = weight_N.detach().nonzero().squeeze(-1)
    if kept_K is not None and len(kept_K) == len(given):
        kept_K = None  # stored log-probabilities are as large as logits: they are not copied for nothing
    if kept_K is not None and weight_N is not None:
        student_hidden_ND, weight_N = student_hidden_ND[kept_K], weight_N.detach()[kept_K]
        temperature_N = None if temperature_N is None else temperature_N[kept_K]
        teacher_hidden_NE = None if teacher_hidden_NE is None else teacher_hidden_NE[kept_K]
        target = None if target is None else target[kept_K]
    settings, dtype = dict(settings or {}), compute_dtype(student_hidden_ND)
    token_loss = TokenLoss(
        divergence,
        settings,
        target,
        weight_N,
        temperature_N,
        None if temperature_N is None else loss_scale(temperature_N, t2),
        token_weight,
        kept_K,
        teacher_share,
        temperature_gradient,
        t2,
        distance_slope_N,
    )
    names = [*token_loss.terms, *(["cross_entropy"] if labels_N is not None else [])]

    def loss(student_RV: Tensor, teacher_RV: Tensor, rows: slice, gradient_RV: Tensor | None) -> tuple[Tensor, Tensor]:
        if labels_N is None:
            value_T = token_loss(student_RV, teacher_RV, rows, gradient_RV, divergence_weight)
            return divergence_weight * value_T[0], value_T
        # Both gradients in full precision: rounded to the gradient's type is their sum.
        student_RV, ce_gradient_RV = in_full(student_RV, "piece of logits"), None
        if gradient_RV is not None:
            ce_gradient_RV = buffer("gradient of cross-entropy", student_RV.shape, student_RV.dtype, student_RV.device)
        ce = cross_entropy(student_RV, labels_N[rows], gradient_RV=ce_gradient_RV).sum()
        own_gradient_RV = None if gradient_RV is None else student_RV
        value_T = token_loss(student_RV, teacher_RV, rows, own_gradient_RV, divergence_weight)
        if gradient_RV is not None and ce_gradient_RV is not None:
            gradient_RV.copy_(student_RV.add_(ce_gradient_RV, alpha=cross_entropy_weight))
        total = divergence_weight * value_T[0] + cross_entropy_weight * ce
        return total, torch.cat([value_T, ce.unsqueeze(0)])

    if target is not None:
        teacher: RowsOf = target.ids_NK.__getitem__  # something of the tile's length: the loss looks up the rest itself
    else:
        assert teacher_hidden_NE is not None
        teacher = teacher_logits(teacher_hidden_NE, teacher_weight_UE, vocab_size, dtype, rounded_logits)
    total, parts = tiled_loss(
        student_hidden_ND, student_weight_VD, teacher, loss, vocab_size, len(names), rounded_logits
    )
    return HeadLoss(total, **dict(zip(names, parts.unbind(), strict=True)))


def linear_cross_entropy(
    student_hidden_ND: Tensor,
    student_weight_VD: Tensor,
    labels_N: Tensor,
    *,
    weight_N: Tensor | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Σ_i w_i (-log q_i(label_i)) in nats, with gradients to the hidden states and the weight.

    Parameters
    ----------
    student_hidden_ND, student_weight_VD
        (N, D) last hidden states and (V, D) output projection.
    labels_N
        (N,) token ids below ``vocab_size``.
    weight_N
        (N,) weights, 1 where absent; never differentiated.
    vocab_size
        Rows of the projection that are tokens.
    """
    vocab_size = used_rows(student_weight_VD, vocab_size, "student")

    def loss(student_RV: Tensor, labels_R: Tensor, rows: slice, gradient_RV: Tensor | None) -> tuple[Tensor, Tensor]:
        weight_R1 = None if weight_N is None else weight_N.detach()[rows].to(student_RV.dtype).unsqueeze(-1)
        value_R1 = cross_entropy(student_RV, labels_R, weight_R1, gradient_RV)
        value = (value_R1 if weight_R1 is None else value_R1 * weight_R1).sum()
        return value, value

    return tiled_loss(student_hidden_ND, student_weight_VD, lambda rows: labels_N[rows], loss, vocab_size)[0]

"""Losses fused with the output projections, in tiles of tokens: there is never an (N, V) tensor over all tokens.

The machinery and its precision are in ``entkd.tiles``. Losses are sums; the caller divides by the global number of
tokens.

Shapes: N tokens, R tokens of a tile, D student width, E teacher width, V student rows, U teacher rows of the output
projection, both cut to ``vocab_size``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from entkd.divergences import DIVERGENCES
from entkd.temperature import loss_scale
from entkd.tiles import TileLoss, by_autograd, compute_dtype, piece_rows, projection, slices, tile_rows, tiled_loss
from entkd.workspace import buffer


def linear_divergence(
    student_hidden_ND: Tensor,
    student_weight_VD: Tensor,
    teacher_hidden_NE: Tensor,
    teacher_weight_UE: Tensor | None,
    *,
    divergence: str,
    temperature_N: Tensor | None = None,
    weight_N: Tensor | None = None,
    t2: Literal["per_token", "linear", "off"] = "per_token",
    vocab_size: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Tensor:
    """Σ_i w_i s(T_i) D(p_i(T_i) ‖ q_i(T_i)) in nats, with gradients to the student's hidden states and weight.

    Parameters
    ----------
    student_hidden_ND, teacher_hidden_NE
        (N, D) and (N, E) last hidden states of the same tokens. N = 0 gives 0 and zero gradients.
    student_weight_VD, teacher_weight_UE
        Output projections, rows in the order of one tokenizer. Without the teacher's, ``teacher_hidden_NE`` holds
        (N, U) logits, or log-probabilities at T = 1, which differ by a constant.
    divergence
        A name in ``entkd.divergences.DIVERGENCES``.
    temperature_N, weight_N
        (N,) temperatures and weights, 1 where absent; never differentiated. Tokens of weight 0 are left out, so that
        nothing in their rows, NaN included, matters.
    t2
        s(T): ``per_token`` T², ``linear`` T, ``off`` 1.
    vocab_size
        Rows of both projections that are tokens. Rows beyond are not read, and get gradient 0. Needed where V ≠ U.
    settings
        Further keyword arguments of the divergence, e.g. ``{"beta": 0.2}``.

    Raises
    ------
    ValueError
        Unknown divergence, numbers of tokens that differ, or vocabularies that do not fit.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence {divergence!r}: allowed are {', '.join(DIVERGENCES)}")
    dense, settings = DIVERGENCES[divergence], dict(settings or {})
    vocab_size = _vocabulary(student_hidden_ND, student_weight_VD, teacher_hidden_NE, teacher_weight_UE, vocab_size)
    scale_N = weight_N
    if weight_N is not None:
        kept_K = weight_N.detach().nonzero().squeeze(-1)
        student_hidden_ND, teacher_hidden_NE = student_hidden_ND[kept_K], teacher_hidden_NE[kept_K]
        scale_N = weight_N.detach()[kept_K]
        temperature_N = None if temperature_N is None else temperature_N[kept_K]
    if temperature_N is not None:
        s_N = loss_scale(temperature_N, t2)
        scale_N = s_N if scale_N is None else scale_N * s_N

    def dense_loss(student_RV: Tensor, teacher_RV: Tensor, rows: slice) -> Tensor:
        temperature_R = None if temperature_N is None else temperature_N[rows]
        value_R = dense(student_RV, teacher_RV, temperature_R, **settings)
        return value_R if scale_N is None else value_R * scale_N[rows]

    if divergence in ("forward_kl", "reverse_kl"):
        loss = _kl_with_gradient(divergence == "reverse_kl", temperature_N, scale_N)
    else:
        loss = by_autograd(dense_loss)
    target = _teacher_logits(teacher_hidden_NE, teacher_weight_UE, vocab_size, compute_dtype(student_hidden_ND))
    return tiled_loss(student_hidden_ND, student_weight_VD, target, loss, vocab_size)


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
    vocab_size = _rows(student_weight_VD, vocab_size, "student")

    def loss(student_RV: Tensor, labels_R: Tensor, rows: slice) -> Tensor:
        value_R = torch.nn.functional.cross_entropy(student_RV, labels_R, reduction="none")
        return value_R if weight_N is None else value_R * weight_N.detach()[rows]

    return tiled_loss(student_hidden_ND, student_weight_VD, lambda rows: labels_N[rows], by_autograd(loss), vocab_size)


def _kl_with_gradient(reverse: bool, temperature_N: Tensor | None, scale_N: Tensor | None) -> TileLoss:
    """The two KLs, in place and with their gradients in closed form: a third of the passes that autograd makes.

    dD/dz is (q - p)/T for KL(p‖q) and q (log q - log p - D)/T for D = KL(q‖p).
    """

    def loss(student_RV: Tensor, teacher_RV: Tensor, rows: slice, wants_grad: bool) -> tuple[Tensor, Tensor | None]:
        if temperature_N is not None:
            temperature_R1 = temperature_N.detach()[rows].to(student_RV.dtype).unsqueeze(-1)
            student_RV, teacher_RV = student_RV.div_(temperature_R1), teacher_RV.div_(temperature_R1)
        log_q_RV, log_ratio_RV = _log_softmax(student_RV, "log q"), _log_softmax(teacher_RV, "log p")
        q_RV, p_RV = _exp(log_q_RV, out=student_RV), _exp(log_ratio_RV, out=teacher_RV)
        log_ratio_RV.sub_(log_q_RV)
        if reverse:
            value_R1 = -log_q_RV.copy_(q_RV).mul_(log_ratio_RV).sum(-1, keepdim=True)
            grad_RV = log_ratio_RV.add_(value_R1).mul_(q_RV).neg_()
        else:
            value_R1 = log_ratio_RV.mul_(p_RV).sum(-1, keepdim=True)
            grad_RV = q_RV.sub_(p_RV)
        if scale_N is not None:
            scale_R1 = scale_N[rows].to(student_RV.dtype).unsqueeze(-1)
            value_R1 = value_R1 * scale_R1
            grad_RV = grad_RV.mul_(scale_R1 if temperature_N is None else scale_R1 / temperature_R1)
        return value_R1.sum(), grad_RV if wants_grad else None

    return loss


def _log_softmax(logits_RV: Tensor, name: str) -> Tensor:
    """Log-probabilities in the buffer ``name``. That of probability 0 is the lowest finite number, so that their
    product is 0."""
    out_RV = buffer(name, logits_RV.shape, logits_RV.dtype, logits_RV.device)
    torch.log_softmax(logits_RV, dim=-1, out=out_RV)
    return out_RV.clamp_min_(torch.finfo(out_RV.dtype).min)


def _exp(log_RV: Tensor, out: Tensor) -> Tensor:
    """exp by way of 2^x, whose CPU kernel is twice as fast where MKL is not on Intel's processors."""
    return torch.mul(log_RV, math.log2(math.e), out=out).exp2_()


@torch.no_grad()
def linear_statistics(
    student_hidden_ND: Tensor,
    student_weight_VD: Tensor,
    teacher_hidden_NE: Tensor,
    teacher_weight_UE: Tensor | None,
    *,
    vocab_size: int | None = None,
) -> dict[str, Tensor]:
    """How close the student is to the teacher, per token, at temperature 1 and without gradient.

    The tensors are those of `linear_divergence`.

    Returns
    -------
    dict
        (N,) tensors: ``kl``, KL(p‖q) in nats; ``agreement``, whether both have the same most likely token.
    """
    vocab_size = _vocabulary(student_hidden_ND, student_weight_VD, teacher_hidden_NE, teacher_weight_UE, vocab_size)
    dtype, device = compute_dtype(student_hidden_ND), student_hidden_ND.device
    student = projection(student_hidden_ND, student_weight_VD[:vocab_size], dtype, "logits")
    teacher = _teacher_logits(teacher_hidden_NE, teacher_weight_UE, vocab_size, dtype)
    n_tokens = len(student_hidden_ND)
    kl_N = torch.zeros(n_tokens, dtype=dtype, device=device)
    agreement_N = torch.zeros(n_tokens, dtype=torch.bool, device=device)
    for tile in slices(n_tokens, tile_rows(vocab_size, device)):
        student_RV, teacher_RV = student(tile), teacher(tile)
        for piece in slices(len(student_RV), piece_rows(vocab_size, device)):
            rows = slice(tile.start + piece.start, tile.start + piece.stop)
            agreement_N[rows] = student_RV[piece].argmax(-1) == teacher_RV[piece].argmax(-1)
            log_ratio_RV = _log_softmax(teacher_RV[piece], "log p")
            p_RV = _exp(log_ratio_RV, out=teacher_RV[piece])
            kl_N[rows] = log_ratio_RV.sub_(_log_softmax(student_RV[piece], "log q")).mul_(p_RV).sum(-1)
    return {"kl": kl_N, "agreement": agreement_N}


def _teacher_logits(
    hidden_NE: Tensor, weight_UE: Tensor | None, vocab_size: int, dtype: torch.dtype
) -> Callable[[slice], Tensor]:
    """Logits of some rows, computed or, where there is no projection, as they are given."""
    if weight_UE is not None:
        return projection(hidden_NE, weight_UE[:vocab_size], dtype, "teacher")

    def given(rows: slice) -> Tensor:
        logits_RU = hidden_NE.detach()[rows, :vocab_size]
        return buffer("teacher", logits_RU.shape, dtype, logits_RU.device).copy_(logits_RU)

    return given


def _rows(weight_VD: Tensor, vocab_size: int | None, owner: str) -> int:
    if vocab_size is None:
        return len(weight_VD)
    if len(weight_VD) < vocab_size:
        raise ValueError(
            f"the {owner}'s output projection has {len(weight_VD)} rows, the tokenizer {vocab_size} tokens"
        )
    return vocab_size


def _vocabulary(
    student_hidden_ND: Tensor,
    student_weight_VD: Tensor,
    teacher_hidden_NE: Tensor,
    teacher_weight_UE: Tensor | None,
    vocab_size: int | None,
) -> int:
    """The vocabulary that both sides share, after checking that both sides fit together."""
    if len(student_hidden_ND) != len(teacher_hidden_NE):
        raise ValueError(f"{len(student_hidden_ND)} student tokens but {len(teacher_hidden_NE)} teacher tokens")
    # Given logits have as many columns as a projection has rows.
    teacher_UN = teacher_hidden_NE.T if teacher_weight_UE is None else teacher_weight_UE
    if vocab_size is None and len(student_weight_VD) != len(teacher_UN):
        raise ValueError(
            f"the student's output projection has {len(student_weight_VD)} rows and the teacher's "
            f"{len(teacher_UN)}; pass vocab_size, the tokenizer's length"
        )
    _rows(teacher_UN, vocab_size, "teacher")
    return _rows(student_weight_VD, vocab_size, "student")

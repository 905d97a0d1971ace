"""A teacher distribution in few numbers: its most probable tokens, and an unbiased sample of all others.

With 𝒦 the K most probable tokens and τ = Σ_{v∉𝒦} p_v the mass of the rest, S tokens are drawn from the rest, each with
probability p_v / τ. Token v then carries the mass

    m_v = p_v for v in 𝒦,        m_v = τ · (times that v was drawn) / S for all others,

so that E[m_v] = p_v for every v, and Σ_v m_v f(v) is an unbiased estimate of Σ_v p_v f(v) for every f. Masses sum to 1
without being normalised; the usual alternative, the K probabilities divided by their sum, is biased (arXiv 2503.16870,
whose sampling draws all tokens: here the head of the distribution has no sampling noise at all).

The S draws are stratified: the j-th takes its uniform number from [j/S, (j+1)/S). Each estimate is as unbiased as with
independent draws, and its variance is never larger.

Only what is linear in p has an unbiased estimate: the cross-entropy −Σ p log q, and with the exact entropy the forward
KL at T = 1 and its gradient. KL(q‖p), mixtures of p and q, and p at other temperatures need the whole distribution.

Shapes: N tokens, K slots (most probable tokens, then draws), S draws, U and V tokens of the vocabulary, R tokens of a
piece.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from entkd.runtime import to_device
from entkd.tiles import piece_rows, slices


@dataclass(frozen=True)
class SparseTarget:
    """Teacher distributions of some tokens. A slot of mass 0 is unused, and its id is 0."""

    ids_NK: Tensor
    """int32 token ids; those of a row differ, unused slots aside."""
    mass_NK: Tensor
    """fp32; each row sums to 1."""
    entropy_N: Tensor
    """fp32 entropy of the whole distributions, exact, in nats."""

    def __len__(self) -> int:
        return len(self.ids_NK)

    def __getitem__(self, rows: slice | Tensor) -> SparseTarget:
        """Some rows: a slice, or a tensor of indices or of bools."""
        return SparseTarget(self.ids_NK[rows], self.mass_NK[rows], self.entropy_N[rows])

    def to(self, device: torch.device) -> SparseTarget:
        """The same on a device."""
        return SparseTarget(
            to_device(self.ids_NK, device), to_device(self.mass_NK, device), to_device(self.entropy_N, device)
        )


def sparse_forward_kl(student_logits_NV: Tensor, target: SparseTarget) -> Tensor:
    """−H_i − Σ_k m_ik log q_i(ids_ik): an unbiased estimate of KL(p_i‖q_i), the readable dense reference.

    Parameters
    ----------
    student_logits_NV
        (N, V) logits; those of −inf are tokens of probability 0.
    target
        Of the same N tokens.

    Returns
    -------
    Tensor
        (N,) nats. An estimate may be below 0. The gradient by the logits is q − Σ_k m_k onehot(ids_k).
    """
    dtype = torch.promote_types(student_logits_NV.dtype, torch.float32)
    log_q_NV = torch.log_softmax(student_logits_NV, dim=-1, dtype=dtype)
    # 0·(-inf) is 0: what has no mass costs nothing, however improbable it is for the student.
    log_q_NK = log_q_NV.gather(-1, target.ids_NK.long()).masked_fill(target.mass_NK == 0, 0.0)
    return -target.entropy_N - (target.mass_NK * log_q_NK).sum(-1)


def densify(target: SparseTarget, vocab_size: int) -> Tensor:
    """(N, V) masses m over the whole vocabulary."""
    mass_NV = target.mass_NK.new_zeros(len(target), vocab_size)
    return mass_NV.scatter_add_(1, target.ids_NK.long(), target.mass_NK)


def pack(ids_NK: Tensor, mass_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and masses as a store keeps them: masses in fp16, those below its range dropped.

    6 bytes per slot; fp32 would take 8. The sampling error is three orders above fp16's rounding, but for the largest
    mass: half a unit in its last place is 2.4e-4 below 1, as much as a confident teacher leaves to all other tokens.
    `unpack_mass` makes that mass anew from the others.
    """
    packed_NK = mass_NK.half()
    return ids_NK.masked_fill(packed_NK == 0, 0), packed_NK


def unpack_mass(packed_NK: Tensor) -> Tensor:
    """(N, K) fp32 masses that sum to 1: the first is what the others leave, which is exact to fp16's relative rounding
    of the rest however close to 1 it is."""
    mass_NK = packed_NK.float()
    mass_NK[:, 0] = 1 - mass_NK[:, 1:].sum(-1, dtype=torch.float64)
    return mass_NK


@torch.no_grad()
def draw_target(logits_NU: Tensor, top_k: int, uniform_NS: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and masses of the ``top_k`` most probable tokens and of a sample of the rest.

    Parameters
    ----------
    logits_NU
        (N, U) logits of the teacher; −inf is probability 0.
    top_k
        K; a smaller vocabulary is kept whole.
    uniform_NS
        (N, S) fp64 numbers, uniform on [0, 1) and independent: all the chance there is.

    Returns
    -------
    tuple
        (N, K + S) int32 ids and fp32 masses. The most probable tokens come first, in descending order, then the draws,
        in the order of their ids and merged where a token was drawn repeatedly, then unused slots.
    """
    count, samples = len(logits_NU), uniform_NS.shape[1]
    ids_NK = torch.zeros(count, top_k + samples, dtype=torch.int32, device=logits_NU.device)
    mass_NK = torch.zeros(ids_NK.shape, dtype=torch.float32, device=logits_NU.device)
    # In pieces: the running sums are fp64, twice the size of the logits.
    for rows in slices(count, piece_rows(2 * logits_NU.shape[1], logits_NU.device)):
        _draw(logits_NU[rows], top_k, uniform_NS[rows], ids_NK[rows], mass_NK[rows])
    return ids_NK, mass_NK


def _draw(logits_RU: Tensor, top_k: int, uniform_RS: Tensor, ids_RK: Tensor, mass_RK: Tensor) -> None:
    """Fill the rows of a piece."""
    p_RU = torch.softmax(logits_RU, dim=-1, dtype=torch.promote_types(logits_RU.dtype, torch.float32))
    head = min(top_k, p_RU.shape[1])
    head_mass_RK, head_ids_RK = p_RU.topk(head, dim=-1)
    ids_RK[:, :head] = head_ids_RK.masked_fill(head_mass_RK == 0, 0)
    below_RU = p_RU.scatter_(1, head_ids_RK, 0.0).cumsum(-1, dtype=torch.float64)
    tail_R1 = below_RU[:, -1:]
    # A softmax in fp32 over a large vocabulary sums to 1 within 2e-5 only: the shares of its sum are the probabilities.
    total_R1 = head_mass_RK.sum(-1, keepdim=True, dtype=torch.float64) + tail_R1
    mass_RK[:, :head] = head_mass_RK / total_R1
    samples = uniform_RS.shape[1]
    stratum_S = torch.arange(samples, dtype=torch.float64, device=uniform_RS.device)
    # Rounding must not reach the total, above which there is no token.
    point_RS = torch.minimum((stratum_S + uniform_RS) / samples * tail_R1, tail_R1.nextafter(tail_R1.new_zeros(())))
    # The first token whose running sum is above the point: never one of probability 0, nor one of the head.
    drawn_RS = torch.searchsorted(below_RU, point_RS, right=True).clamp_(max=p_RU.shape[1] - 1)
    # Points ascend, so draws do, and equal ones are neighbours.
    slot_RS = torch.zeros_like(drawn_RS)
    slot_RS[:, 1:] = (drawn_RS[:, 1:] != drawn_RS[:, :-1]).cumsum(-1)
    share_R1 = (tail_R1 / total_R1 / samples).to(mass_RK.dtype)
    mass_RK[:, top_k:].scatter_add_(1, slot_RS, share_R1.expand(drawn_RS.shape))
    ids_RK[:, top_k:].scatter_(1, slot_RS, drawn_RS.masked_fill(share_R1 == 0, 0).to(ids_RK.dtype))

"""The output projections and the loss alone, by several libraries: mean KL(teacher ‖ student) over N tokens.

Shape suffixes: N tokens, D student width, E teacher width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from entkd.fused import linear_divergence

Head = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(hidden_ND, weight_VD, teacher_hidden_NE, teacher_weight_VE) → mean KL in nats, differentiable."""


def dense(hidden_ND: Tensor, weight_VD: Tensor, teacher_NE: Tensor, teacher_VE: Tensor) -> Tensor:
    """Plain PyTorch: logits of all tokens in the type of the weights, softmax and KL in fp32, autograd."""
    with torch.no_grad():
        log_p_NV = F.log_softmax((teacher_NE @ teacher_VE.T).float(), dim=-1)
    log_q_NV = F.log_softmax((hidden_ND @ weight_VD.T).float(), dim=-1)
    return F.kl_div(log_q_NV, log_p_NV, reduction="batchmean", log_target=True)


def trl_chunked(hidden_ND: Tensor, weight_VD: Tensor, teacher_NE: Tensor, teacher_VE: Tensor) -> Tensor:
    """TRL's `ChunkedDivergenceFunction`; ``beta=0`` is KL(teacher ‖ student). It gives the divergence per token."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence_N, _entropy_N = ChunkedDivergenceFunction.apply(
        hidden_ND, weight_VD, None, teacher_NE, teacher_VE, None, 0.0
    )
    return divergence_N.mean()


def _liger(compiled: bool) -> Head:
    """Liger's chunked JSD; ``beta=0`` is KL(teacher ‖ student). Its cross-entropy term has weight 0."""

    def head(hidden_ND: Tensor, weight_VD: Tensor, teacher_NE: Tensor, teacher_VE: Tensor) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=compiled)
        labels_N = torch.zeros(len(hidden_ND), dtype=torch.long)  # none of them ignored
        return loss(hidden_ND, weight_VD, teacher_NE, teacher_VE, labels_N)

    return head


def entkd(hidden_ND: Tensor, weight_VD: Tensor, teacher_NE: Tensor, teacher_VE: Tensor) -> Tensor:
    """This package, which gives a sum."""
    total = linear_divergence(hidden_ND, weight_VD, teacher_NE, teacher_VE, divergence="forward_kl")
    return total / len(hidden_ND)


def entkd_rounded(hidden_ND: Tensor, weight_VD: Tensor, teacher_NE: Tensor, teacher_VE: Tensor) -> Tensor:
    """This package with logits in bf16, to see what their rounding saves and costs."""
    total = linear_divergence(hidden_ND, weight_VD, teacher_NE, teacher_VE, rounded_logits=True)
    return total / len(hidden_ND)


HEADS: dict[str, Head] = {
    "dense": dense,
    "trl_chunked": trl_chunked,
    "liger": _liger(compiled=False),
    "liger_compiled": _liger(compiled=True),
    "entkd": entkd,
    "entkd_rounded": entkd_rounded,
}
"""Who is timed. One line for another."""
REFERENCE = "dense"
"""Whose seconds ratios are to."""


@dataclass
class Case:
    """Hidden states and weights of a student close to its teacher."""

    hidden_ND: Tensor
    weight_VD: Tensor
    teacher_NE: Tensor
    teacher_VE: Tensor

    @classmethod
    def draw(cls, n_tokens: int, vocab_size: int, width: int, dtype: torch.dtype, kl: float = 0.02) -> Case:
        """A teacher with logits of standard deviation 3, and a student that is it plus noise.

        The noise is set so that the mean KL is near ``kl`` nats: it grows with the square of the noise, so one look at
        a first guess tells the right size.
        """
        generator = torch.Generator().manual_seed(0)

        def normal(rows: int) -> Tensor:
            return torch.randn(rows, width, generator=generator)

        teacher_NE, teacher_VE = normal(n_tokens), normal(vocab_size) * (3 / width**0.5)
        noise_ND, noise_VD = normal(n_tokens), normal(vocab_size) * (3 / width**0.5)

        def student(scale: float) -> Case:
            return cls(
                (teacher_NE + scale * noise_ND).to(dtype),
                (teacher_VE + scale * noise_VD).to(dtype),
                teacher_NE.to(dtype),
                teacher_VE.to(dtype),
            )

        guess = 0.04
        found = student(guess).first(64).exact()[0]
        return student(guess * (kl / found) ** 0.5)

    def first(self, n_tokens: int) -> Case:
        """Its first tokens."""
        return Case(self.hidden_ND[:n_tokens], self.weight_VD, self.teacher_NE[:n_tokens], self.teacher_VE)

    def to(self, dtype: torch.dtype) -> Case:
        """The same values in another type."""
        return Case(*(tensor.to(dtype) for tensor in self.tensors()))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In the order of a `Head`'s arguments."""
        return self.hidden_ND, self.weight_VD, self.teacher_NE, self.teacher_VE

    def gradients(self, head: Head) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, dh and dW of a head, forward and backward."""
        hidden_ND, weight_VD = (tensor.detach().requires_grad_() for tensor in (self.hidden_ND, self.weight_VD))
        loss = head(hidden_ND, weight_VD, self.teacher_NE, self.teacher_VE)
        loss.backward()
        assert hidden_ND.grad is not None
        assert weight_VD.grad is not None
        return loss.detach(), hidden_ND.grad, weight_VD.grad

    def exact(self, rows: int = 128) -> tuple[float, Tensor, Tensor]:
        """Loss, dh and dW in fp64, in tiles of ``rows`` tokens, from dKL/dz = q − p."""
        weight_VD, teacher_VE = self.weight_VD.double(), self.teacher_VE.double()
        n_tokens, loss = len(self.hidden_ND), 0.0
        hidden_grad_ND, weight_grad_VD = torch.empty_like(self.hidden_ND, dtype=torch.float64), 0 * weight_VD
        for start in range(0, n_tokens, rows):
            tile = slice(start, start + rows)
            hidden_RD = self.hidden_ND[tile].double()
            log_q_RV = F.log_softmax(hidden_RD @ weight_VD.T, dim=-1)
            log_p_RV = F.log_softmax(self.teacher_NE[tile].double() @ teacher_VE.T, dim=-1)
            p_RV = log_p_RV.exp()
            loss += float((p_RV * (log_p_RV - log_q_RV)).sum()) / n_tokens
            grad_RV = (log_q_RV.exp() - p_RV) / n_tokens
            hidden_grad_ND[tile] = grad_RV @ weight_VD
            weight_grad_VD += grad_RV.T @ hidden_RD
        return loss, hidden_grad_ND, weight_grad_VD


def relative_error(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖."""
    return float((found.double() - exact).norm() / exact.norm())

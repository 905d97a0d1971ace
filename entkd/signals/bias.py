"""How far losses and gradients by a sparse target are from those by the whole distribution: bias apart from noise.

Both are errors of one token. Noise has mean 0 and shrinks as 1/√N where N tokens are averaged, as a training step
averages them; a bias stays. For comparison stand the most probable tokens in as many slots, divided by their sum.

Shape suffixes: N tokens of a document, K slots, E teacher width, U tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from entkd.runtime import torch_stream
from entkd.sparse import SparseTarget, densify, sparse_forward_kl

REFERENCE_KL = (0.02, 1.0)
"""Mean KL in nats to the two students that are made by adding noise to the teacher: late and early in a training."""


class ErrorSum:
    """Running comparison of targets with the exact distributions, for one student."""

    def __init__(self) -> None:
        self._exact: list[Tensor] = []
        self._error: list[Tensor] = []
        self._sums: dict[str, Tensor] = {}
        self._squares: dict[str, float] = {}

    def add(self, log_p_NU: Tensor, log_q_NU: Tensor, target: SparseTarget) -> None:
        """The tokens of a document: exact log-probabilities of teacher and student, and what stands for the teacher."""
        p_NU = log_p_NU.exp()
        exact_N = (p_NU * (log_p_NU - log_q_NU)).nan_to_num().double().sum(1)
        self._exact.append(exact_N.cpu())
        self._error.append((sparse_forward_kl(log_q_NU, target).double() - exact_N).cpu())
        # The gradient by the logits is q − m where it should be q − p.
        for name, difference_NU in (
            ("error", densify(target, p_NU.shape[1]) - p_NU),
            ("gradient", log_q_NU.exp() - p_NU),
        ):
            self._sums[name] = self._sums.get(name, 0) + difference_NU.double().sum(0)
            self._squares[name] = self._squares.get(name, 0.0) + float(difference_NU.double().square().sum())

    def numbers(self) -> dict[str, float]:
        """What was found, by name.

        ``tokens`` N; ``kl``, the exact mean; ``bias``, the mean error of the KL in nats, and its ``stderr``; the error
        of the gradient by the logits, relative to the exact gradient: ``per_token`` (root mean square) and ``averaged``
        over the N tokens; ``excess``, the averaged error over what independent errors of mean 0 would leave, which is
        about 1 for noise alone.
        """
        error_N = torch.cat(self._error)
        tokens = len(error_N)
        per_token = (self._squares["error"] / self._squares["gradient"]) ** 0.5
        error, gradient = float(self._sums["error"].norm()), float(self._sums["gradient"].norm())
        return {
            "tokens": tokens,
            "kl": float(torch.cat(self._exact).mean()),
            "bias": float(error_N.mean()),
            "stderr": float(error_N.std()) / tokens**0.5,
            "per_token": per_token,
            "averaged": error / gradient,
            "excess": error / self._squares["error"] ** 0.5,
        }


class BiasReport:
    """Sparse and renormalised targets against the exact distributions, for several students.

    Parameters
    ----------
    top_k, samples
        K and S of the sparse targets.
    """

    def __init__(self, top_k: int, samples: int) -> None:
        self._slots = top_k + samples
        self._names = (f"sparse ({top_k} + {samples} draws)", f"top {self._slots} renormalised")
        self._sums: dict[str, tuple[ErrorSum, ErrorSum]] = {}

    def add(self, log_p_NU: Tensor, target: SparseTarget, students: Iterator[tuple[str, Tensor]]) -> None:
        """The tokens of a document, with the log-probabilities (N, U) of the students."""
        compared = (target, renormalised(log_p_NU, self._slots))
        for name, log_q_NU in students:
            for errors, one in zip(self._sums.setdefault(name, (ErrorSum(), ErrorSum())), compared, strict=True):
                errors.add(log_p_NU, log_q_NU, one)

    def numbers(self) -> dict[str, dict[str, dict[str, float]]]:
        """Student → kind of target → `ErrorSum.numbers`."""
        return {
            student: {name: errors.numbers() for name, errors in zip(self._names, pair, strict=True)}
            for student, pair in self._sums.items()
        }

    def lines(self) -> Iterator[str]:
        """For people."""
        for student, kinds in self.numbers().items():
            for kind, found in kinds.items():
                yield (
                    f"{student}, KL {found['kl']:.3g}: {kind}: bias of the KL {found['bias']:+.2g} ± "
                    f"{found['stderr']:.2g} nats (standard error); error of the gradient {found['per_token']:.2g} per "
                    f"token, {found['averaged']:.2g} averaged over {found['tokens']} tokens, {found['excess']:.2g} × "
                    "that of noise alone"
                )


def renormalised(log_p_NU: Tensor, slots: int) -> SparseTarget:
    """The most probable tokens, their probabilities divided by their sum, with the entropy of that."""
    top_NK, ids_NK = log_p_NU.topk(min(slots, log_p_NU.shape[1]), dim=1)
    log_mass_NK = torch.log_softmax(top_NK, dim=1)
    mass_NK = log_mass_NK.exp()
    return SparseTarget(ids_NK.int(), mass_NK, torch.special.entr(mass_NK).sum(1))


def perturbed(hidden_NE: Tensor, head_UE: Tensor, log_p_NU: Tensor, document: int) -> Iterator[tuple[str, Tensor]]:
    """Students at `REFERENCE_KL` from the teacher: its logits from hidden states with noise, as log-probabilities."""
    generator = torch_stream(0, f"verify/{document}")
    noise_NE = torch.randn(hidden_NE.shape, generator=generator).to(hidden_NE.device)
    noise_NU = (noise_NE * hidden_NE.square().mean(1, keepdim=True).sqrt()) @ head_UE.T
    for wanted in REFERENCE_KL:
        scale = 0.1
        for _ in range(8):  # the KL grows about as the square of the noise
            log_q_NU = torch.log_softmax(log_p_NU + scale * noise_NU, dim=1)
            kl = float((log_p_NU.exp() * (log_p_NU - log_q_NU)).nan_to_num().sum(1).mean())
            if abs(kl / wanted - 1) < 0.05:
                break
            scale *= min(10.0, max(0.1, (wanted / max(kl, 1e-12)) ** 0.5))
        yield f"noisy teacher near {wanted:g}", log_q_NU

"""A published approach during a run: its state on the device, and the statistics that it reads.

Shapes: N tokens, G tokens of the global batch, D student width, S statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from entkd.data.packing import Batch
from entkd.methods import Approach
from entkd.methods.base import Factors, Tokens


class ApproachState(nn.Module):
    """The scalars of an approach as buffers, so that they are part of the resume state."""

    def __init__(self, settings: Approach) -> None:
        super().__init__()
        self.settings = settings
        for name, value in settings.state().items():
            self.register_buffer(name, torch.full((), value, dtype=torch.float64))

    @property
    def values(self) -> dict[str, Tensor]:
        """Name → scalar."""
        return dict(self.named_buffers())

    def teacher_share(self) -> Tensor | None:
        """t of a mixed teacher."""
        return self.settings.teacher_share(self.values)

    def temperature(self) -> Tensor | None:
        """The temperature of all tokens."""
        return self.settings.temperature(self.values)

    def end_step(self, terms: Mapping[str, Tensor], step: int, steps: int) -> None:
        """After step number ``step``, counted from 0, of ``steps``, with the terms of its loss over all processes."""
        with torch.no_grad():
            self.settings.end_step(self.values, terms, step, steps)

    def logged(self) -> dict[str, Tensor]:
        """The state as it is now, for the metrics."""
        return {f"{self.settings.name}_{name}": value.clone() for name, value in self.values.items()}


def document_of_tokens(batch: Batch) -> Tensor:
    """(N,) ascending number of the document of each predicting position."""
    return (batch.position_ids_BL == 0).flatten().cumsum(0)[batch.positions_N]


def response_lengths(batches: Sequence[Batch]) -> list[int]:
    """Response tokens of every document of a step that has any; asked of batches on the host."""
    return [int(n) for batch in batches for n in document_of_tokens(batch).unique(return_counts=True)[1]]


def combine(own: Tensor | None, factor_N: Tensor | None) -> Tensor | None:
    """Product of two weights, where None is 1."""
    if own is None or factor_N is None:
        return factor_N if own is None else own
    return own * factor_N


def factors_of_batches(
    state: ApproachState,
    found: Sequence[Mapping[str, Tensor]],
    documents: Sequence[Tensor],
    positions: int,
    selected: int,
    vocab_size: int,
) -> list[Factors]:
    """The factors of several micro-batches that are looked at together, one for each."""
    tokens = _together(found, documents, positions, selected, vocab_size)
    whole, cuts = state.settings.factors(tokens, state.values), [len(document_N) for document_N in documents]
    weights = [None] * len(cuts) if whole.weight_N is None else whole.weight_N.split(cuts)
    temperatures = [None] * len(cuts) if whole.temperature_N is None else whole.temperature_N.split(cuts)
    return [Factors(*pair) for pair in zip(weights, temperatures, strict=True)]


def distance_slopes(
    state: ApproachState,
    found: Sequence[Mapping[str, Tensor]],
    documents: Sequence[Tensor],
    positions: int,
    selected: int,
    vocab_size: int,
    slopes: Sequence[Tensor],
) -> list[Tensor]:
    """dL/ds of each token's Hellinger distance, one (N,) for each micro-batch, given dL/dT of its temperature.

    The other parameters are those of `factors_of_batches`: a distance also moves the temperatures of other tokens.
    """
    tokens = _together(found, documents, positions, selected, vocab_size)
    with torch.enable_grad():
        distance_G = tokens.statistics["hellinger"].detach().requires_grad_()
        moved = replace(tokens, statistics=tokens.statistics | {"hellinger": distance_G})
        temperature_G = state.settings.factors(moved, state.values).temperature_N
        assert temperature_G is not None
        (slope_G,) = torch.autograd.grad(temperature_G, distance_G, torch.cat(list(slopes)).to(temperature_G.dtype))
    return list(slope_G.split([len(document_N) for document_N in documents]))


def _together(
    found: Sequence[Mapping[str, Tensor]], documents: Sequence[Tensor], positions: int, selected: int, vocab_size: int
) -> Tokens:
    # Documents of different micro-batches are different ones.
    numbered, start = [], 0
    for document_N in documents:
        numbered.append(document_N + start)
        start += 2**32
    statistics = {name: torch.cat([each[name] for each in found]) for name in found[0]}
    return Tokens(statistics, torch.cat(numbered), positions, selected, vocab_size)

"""Factors of an approach that looks at the global batch of a step, where a forward pass sees less than that.

The student runs over all micro-batches without gradient, the statistics of all processes are put together, and each
micro-batch gets its part of what the approach makes of them. So neither micro-batches nor processes change the loss.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from entkd.config import Method
from entkd.distill.approach import distance_slopes, document_of_tokens, factors_of_batches
from entkd.distill.distributed import World
from entkd.distill.micro_batch import MicroBatch
from entkd.distill.objective import Objective
from entkd.methods.base import Factors
from entkd.runtime import to_device


def looks(method: Method) -> int:
    """How often an approach reads every token's outputs, without gradient, before it weighs them."""
    if method.approach is None or not method.approach.statistics:
        return 0
    return 2 if method.approach.moves_temperature else 1


def scans(method: Method, micro_batches: int) -> bool:
    """Whether a step needs forward passes of its own for that; a single micro-batch is read while it is trained."""
    return looks(method) > 0 and method.approach is not None and method.approach.scope == "batch" and micro_batches > 1


@torch.no_grad()
def with_factors(
    objective: Objective,
    micro_batches: list[MicroBatch],
    world: World,
    device: torch.device,
    dtype: torch.dtype,
    positions: int,
    selected: int,
) -> list[MicroBatch]:
    """The micro-batches of a step with their factors; of other processes' ones too, which nobody reads."""
    approach = objective.approach
    assert approach is not None
    sizes = [len(micro.batch.tokens_N) for micro in micro_batches]

    def look(names: tuple[str, ...], factors: list[Factors] | None) -> list[dict[str, torch.Tensor]]:
        """What every token's outputs say, of each micro-batch, put together from all processes."""
        found = {name: torch.zeros(sum(sizes), device=device) for name in names}
        parts = {name: value_G.split(sizes) for name, value_G in found.items()}
        for index in range(world.rank, len(micro_batches), world.size):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                own = objective.scan(micro_batches[index].to(device), None if factors is None else factors[index])
            for name in names:
                parts[name][index].copy_(own[name])
        parts = {name: value_G.split(sizes) for name, value_G in world.sum(found).items()}  # others' are 0 here
        return [{name: parts[name][index] for name in names} for index in range(len(sizes))]

    training = objective.student.training
    objective.student.eval()  # dropout would give the tokens other outputs than the ones that are trained
    found = look(approach.settings.statistics, None)
    documents = [to_device(document_of_tokens(micro.batch), device) for micro in micro_batches]
    looked_at = approach, found, documents, positions, selected, objective.vocab_size
    factors = factors_of_batches(*looked_at)
    if approach.settings.moves_temperature:
        slopes = [each["temperature_slope"] for each in look(("temperature_slope",), factors)]
        by_distance = distance_slopes(*looked_at, slopes)
        factors = [replace(own, distance_slope_N=slope_N) for own, slope_N in zip(factors, by_distance, strict=True)]
    objective.student.train(training)
    return [replace(micro, factors=own) for micro, own in zip(micro_batches, factors, strict=True)]

"""The arithmetic that a training step needs, by analysis: what is left out of it, padding above all, does not count."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from benchmarks.timing import Linear
from entkd.models import decoder_layers, trunk
from entkd.models.last_layer import can_be_cut


def linear_layers(student: PreTrainedModel, tokens: int, positions: int) -> list[Linear]:
    """The trunk's linear layers by shape.

    Parameters
    ----------
    tokens, positions
        Of the step: all tokens of its documents, and those that predict a response token. In the last layer the latter
        alone need more than keys and values.
    """
    last = decoder_layers(student)[-1]
    cut = {
        id(module)
        for name, module in last.named_modules()
        if can_be_cut(student) and not name.endswith(("k_proj", "v_proj"))
    }
    shapes: dict[tuple[int, int, int], int] = {}
    for module in trunk(student).modules():
        if isinstance(module, nn.Linear):
            shape = (positions if id(module) in cut else tokens, module.in_features, module.out_features)
            shapes[shape] = shapes.get(shape, 0) + 1
    return [Linear(*shape, count=count) for shape, count in shapes.items()]


def attention_flops(student: PreTrainedModel, lengths: Sequence[int], responses: Sequence[int]) -> float:
    """Of all layers, forward and backward: two products for every query and key that it sees, and twice that backward.

    Parameters
    ----------
    lengths, responses
        Tokens of each document, and how many of them, at its end, are response.
    """
    layers, width = int(student.config.num_hidden_layers), int(student.config.hidden_size)
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    # The query that predicts token i sees i keys.
    read = sum(sum(range(length - response, length)) for length, response in zip(lengths, responses, strict=True))
    seen = (layers - 1) * pairs + (read if can_be_cut(student) else pairs)
    return 3 * 4.0 * width * seen

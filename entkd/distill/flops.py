"""Analytic floating-point operations of training: matrix products only, a multiply-add counts two."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def trunk_flops_per_token(model: PreTrainedModel, block: int) -> float:
    """Forward FLOPs of one token through everything but the output projection.

    2 per weight of the decoder layers, and 4·block·width per layer for the attention scores and their use
    (computed over the whole block, whatever the mask).
    """
    config = model.config
    embeddings = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings().weight
    embeddings[id(head)] = head.numel()
    weights = sum(p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in embeddings)
    return 2.0 * weights + 4.0 * block * int(config.hidden_size) * int(config.num_hidden_layers)


def training_tflops(
    student: PreTrainedModel,
    tokens: int,
    positions: int,
    block: int,
    vocab_size: int,
    teacher_width: int | None,
    scanned_tokens: int = 0,
    scanned_positions: int = 0,
    projected: int = 0,
    projector_width: int = 0,
) -> float:
    """TFLOPs of a run: forward and backward of the student and the projectors, and the teacher's output projection.

    Parameters
    ----------
    tokens
        Tokens through the trunk, prompts and padding included.
    positions
        Response tokens through the output projections.
    teacher_width
        Width of the teacher's hidden states; None where the arm reads no teacher distribution.
    scanned_tokens, scanned_positions
        Tokens and response tokens that the student was run over once more without gradient, because an approach reads
        its outputs before it weighs them.
    projected
        Tokens with a feature loss, times its layer pairs.
    projector_width
        Width that linear projectors map to; 0 where there are none.

    Notes
    -----
    The backward pass costs twice the forward. The teacher's own forward passes are shared by all arms; the run
    record states them apart (``teacher_tokens``).
    """
    trunk = 3 * trunk_flops_per_token(student, block) * tokens
    head = 3 * 2.0 * int(student.config.hidden_size) * vocab_size * positions
    teacher = 2.0 * (teacher_width or 0) * vocab_size * positions
    scan = trunk_flops_per_token(student, block) * scanned_tokens
    scan += 2.0 * (int(student.config.hidden_size) + (teacher_width or 0)) * vocab_size * scanned_positions
    projectors = 3 * 2.0 * int(student.config.hidden_size) * projector_width * projected
    return (trunk + head + teacher + scan + projectors) / 1e12

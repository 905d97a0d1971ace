"""Dev evaluation during training: the same number for every arm, on the scale of the training cross-entropy."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from entkd.config import Training
from entkd.data import Corpus
from entkd.data.packing import collate, pack
from entkd.fused import linear_cross_entropy
from entkd.models import output_weight, packed_states


@torch.no_grad()
def dev_nll(
    student: PreTrainedModel,
    corpus: Corpus,
    training: Training,
    vocab_size: int,
    pad_id: int,
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Mean negative log-likelihood of the dev split's response tokens, in nats."""
    was_training = student.training
    student.eval()
    blocks = pack(corpus.lengths, training.block, np.arange(len(corpus)))
    total = torch.zeros((), device=device)
    for start in range(0, len(blocks), training.micro_blocks):
        batch = collate(corpus, blocks[start : start + training.micro_blocks], training.block, pad_id).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            hidden_ND, _ = packed_states(student, batch)
            total += linear_cross_entropy(hidden_ND, output_weight(student), batch.labels_N, vocab_size=vocab_size)
    student.train(was_training)
    return total.item() / corpus.response_tokens

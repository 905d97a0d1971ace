"""What the untrained student says of every training token, in one pass before the first step.

Shapes: N response tokens of a batch, R of the split, D student width, E teacher width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from entkd.closeness import linear_statistics
from entkd.config import Training
from entkd.data import Corpus
from entkd.data.packing import collate, pack
from entkd.distill.distributed import World
from entkd.models import output_weight, packed_states
from entkd.progress import Progress
from entkd.runtime import to_device
from entkd.signals import SignalStore
from entkd.tiles import slices, tile_rows


@torch.no_grad()
def untrained_statistics(
    source: str,
    student: PreTrainedModel,
    corpus: Corpus,
    store: SignalStore,
    training: Training,
    pad_id: int,
    world: World,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Entropy of the student's prediction, or KL(teacher ‖ student) at temperature 1, of every response token.

    Dropout is off and nothing random is drawn, so that a run that is continued finds the same numbers. Each process
    passes over its share of the documents.

    Parameters
    ----------
    source
        ``initial_student_entropy`` or ``initial_kl``.
    store
        Read for ``initial_kl`` alone.

    Returns
    -------
    Tensor
        (R,) fp32 nats on the CPU, by the global index of the response token.
    """
    was_training = student.training
    student.eval()
    split = store.split("train") if source == "initial_kl" else None
    head_UE = None if split is None or store.has_logprobs else store.head_UE.to(device)
    value_R = torch.zeros(corpus.response_tokens, device=device)
    blocks = pack(corpus.lengths, training.block, np.arange(len(corpus)))
    batches = [blocks[i : i + training.micro_blocks] for i in range(0, len(blocks), training.micro_blocks)]
    own = batches[world.rank :: world.size]
    with Progress(f"difficulty by {source}", sum(map(len, own)), "block", visible=world.leads) as progress:
        for batch_blocks in own:
            host = collate(corpus, batch_blocks, training.block, pad_id)
            batch = host.to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                hidden_ND, _ = packed_states(student, batch)
            # The teacher's side of a tile at a time: stored log-probabilities are as large as logits.
            for tile in slices(len(hidden_ND), tile_rows(store.vocab_size, device)):
                teacher_N = None
                if split is not None:
                    tokens_N = host.tokens_N[tile]
                    teacher_N = split.logprobs(tokens_N) if store.has_logprobs else split.hidden(tokens_N)
                    teacher_N = to_device(teacher_N, device)
                (found_N,) = linear_statistics(
                    hidden_ND[tile],
                    output_weight(student),
                    teacher_N,
                    head_UE,
                    wants=("entropy" if split is None else "divergence",),
                    vocab_size=store.vocab_size,
                ).values()
                value_R[batch.tokens_N[tile]] = found_N.float()
            progress.advance(len(batch_blocks))
    student.train(was_training)
    # Every token is some process's: all others add 0.
    return world.sum({source: value_R})[source].cpu()

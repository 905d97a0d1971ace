"""Forward passes of the teacher over documents, and what is kept of them.

Only positions that predict a response token meet the output projection, a tile of them at a time, so there is
never a tensor of all tokens × vocabulary. Shape suffixes: B rows, L tokens of a row, N predicting positions, R rows
of the result (response tokens in the order of the documents), E width, U tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from entkd.config import Signals
from entkd.data import Corpus, read_texts
from entkd.data.packing import Batch, collate, plan_batches
from entkd.entropy import token_entropy
from entkd.errors import UserError
from entkd.models import assert_linear_head, load_model, output_weight, packed_states, vocab_rows
from entkd.signals.content import feature_layers
from entkd.signals.kept import Keep, room
from entkd.signals.split import response_tokens
from entkd.signals.store import STATISTICS
from entkd.workspace import buffer

TILE_ELEMENTS = 2**24
"""Logits in a tile: 64 MiB of fp32."""

Select = Callable[[Tensor], Tensor]
"""Entropies (N,) → bool (N,): whose features are kept."""


@dataclass
class PassResult:
    """Signals of some documents; rows are their response tokens, in the order of ``documents``."""

    documents: NDArray[np.int64]
    response_lengths: NDArray[np.int64]
    statistics: dict[str, Tensor]
    """``entropy``, ``logsumexp``, ``target_logprob``: (R,) fp32, nats."""
    distributions: dict[str, Tensor]
    """What is kept of the distributions beside the log-probabilities: ``hidden`` (bf16), or ``sparse_ids`` (int32) and
    ``sparse_mass`` (fp16)."""
    feature_rows: Tensor
    """int64 rows that have features, ascending."""
    features: dict[int, Tensor]
    """Layer → bf16 states of these rows."""
    has_inf_logits: bool
    logprobs_RU: Tensor | None
    """fp16, nats; None where they are not kept. In a file of their own, as they are many times all else."""

    def keep_features(self, select: Select) -> None:
        """Drop the features of rows that are not selected."""
        kept = select(self.statistics["entropy"][self.feature_rows])
        self.feature_rows = self.feature_rows[kept]
        self.features = {layer: states[kept] for layer, states in self.features.items()}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a shard."""
        return {
            "documents": torch.from_numpy(self.documents),
            "response_lengths": torch.from_numpy(self.response_lengths),
            **self.statistics,
            **self.distributions,
            "feature_rows": self.feature_rows,
            **{f"feature_{layer}": states for layer, states in self.features.items()},
        }


class TeacherPass:
    """A loaded teacher and the settings of its forward passes.

    Parameters
    ----------
    folder
        The prepared teacher.
    vocab_size
        Tokens of the tokenizer; rows of the head beyond are padding and are cut off.
    needs
        What the arms need, see `entkd.signals.content.describe_content`.
    dtype
        Precision of the trunk. The output projection is always computed in fp32.
    settings
        What is kept of the distributions, and the tokens of a forward pass.
    advance
        Told the number of tokens after each forward pass.

    Raises
    ------
    UserError
        If the head has fewer rows than ``vocab_size``, or logits are no plain linear map of the hidden state.
    """

    def __init__(
        self,
        folder: Path,
        vocab_size: int,
        needs: dict[str, Any],
        dtype: torch.dtype,
        device: torch.device,
        settings: Signals,
        advance: Callable[[int], None],
    ) -> None:
        model = load_model(folder, dtype="auto")
        self.head_rows = vocab_rows(output_weight(model), vocab_size, f"teacher {folder}")
        assert_linear_head(model, f"teacher {folder}")
        # Taken before the trunk changes type: arms project with the head as it is stored.
        self.head_UE = output_weight(model)[:vocab_size].detach().cpu().clone()
        self.layers = feature_layers(needs, model.config.num_hidden_layers)
        self.model = model
        self.model.to(device=device, dtype=dtype)  # type: ignore[call-arg]  # Transformers' annotation
        self.head_device_UE = self.head_UE.to(device=device, dtype=torch.float32)
        self._device = device
        self._settings = settings
        self._advance = advance

    @torch.inference_mode()
    def run(self, data: Path, split: str, documents: NDArray[np.int64], select: Select | None) -> PassResult:
        """Signals of the ``documents`` (ascending indices) of a split.

        In the training split, features are kept of the rows that ``select`` chooses, or of all where it is None.
        """
        corpus = Corpus.open(data, split)
        layers = self.layers if split == "train" else ()
        tokens_R = response_tokens(corpus.response_offsets, documents)
        statistics = {name: torch.empty(len(tokens_R)) for name in STATISTICS}
        lengths, (vocab_size, width) = corpus.response_lengths, self.head_UE.shape
        distributions, logprobs_RU, keep = room(self._settings, split, documents, lengths, vocab_size, width)
        rows: list[Tensor] = []
        states: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        has_inf_logits = False
        for blocks, length in plan_batches(corpus.lengths, documents, self._settings.batch_tokens):
            batch = collate(corpus, blocks, length, pad_id=0).to(self._device)
            row_N = torch.from_numpy(np.searchsorted(tokens_R, batch.tokens_N.cpu().numpy()))
            hidden_NE, captured, found, inf = self.forward(batch, layers, keep, row_N)
            has_inf_logits |= inf
            self._refuse_non_finite(batch, [found["logsumexp"], *captured.values()], corpus, data, split)
            for name, values_N in found.items():
                statistics[name][row_N] = values_N.cpu()
            if "hidden" in distributions:
                distributions["hidden"][row_N] = hidden_NE.to(torch.bfloat16).cpu()
            if layers:
                kept = (
                    torch.ones_like(row_N, dtype=torch.bool) if select is None else select(statistics["entropy"][row_N])
                )
                rows.append(row_N[kept])
                for layer, states_NE in captured.items():
                    states[layer].append(states_NE[kept.to(self._device)].to(torch.bfloat16).cpu())
            self._advance(int(corpus.lengths[np.concatenate(blocks)].sum()))
        feature_rows, order = torch.cat(rows).sort() if rows else (torch.empty(0, dtype=torch.int64), torch.empty(0))
        return PassResult(
            documents,
            lengths[documents],
            statistics,
            distributions,
            feature_rows,
            {layer: torch.cat(parts)[order] for layer, parts in states.items()},
            has_inf_logits,
            logprobs_RU,
        )

    def forward(
        self, batch: Batch, layers: tuple[int, ...], keep: Keep | None = None, row_N: Tensor | None = None
    ) -> tuple[Tensor, dict[int, Tensor], dict[str, Tensor], bool]:
        """One forward pass: (N, E) last hidden states, (N, E) states of each layer, and `token_statistics`."""
        hidden_NE, states = packed_states(self.model, batch, layers)
        statistics, has_inf_logits = token_statistics(hidden_NE, self.head_device_UE, batch.labels_N, keep, row_N)
        return hidden_NE, states, statistics, has_inf_logits

    def _refuse_non_finite(self, batch: Batch, outputs: list[Tensor], corpus: Corpus, data: Path, split: str) -> None:
        """Name the document where the teacher's output is NaN or infinite. A −inf logit is neither."""
        bad_N = torch.zeros(len(batch.tokens_N), dtype=torch.bool, device=self._device)
        for output in outputs:
            bad_N |= ~torch.isfinite(output.reshape(len(bad_N), -1)).all(dim=1)
        if bool(bad_N.any()):
            token = int(batch.tokens_N[bad_N][0])
            document = int(np.searchsorted(corpus.response_offsets, token, side="right")) - 1
            name = read_texts(data, split)[document]["id"]
            raise UserError(
                f"teacher: NaN or infinite output in {int(bad_N.sum())} tokens, first at response token "
                f"{token - int(corpus.response_offsets[document])} of {split} document {name!r}; "
                "run with teacher.precision: fp32, or get an intact teacher"
            )


def token_statistics(
    hidden_NE: Tensor,
    head_UE: Tensor,
    target_N: Tensor,
    keep: Keep | None = None,
    row_N: Tensor | None = None,
) -> tuple[dict[str, Tensor], bool]:
    """Entropy, logsumexp and log-probability of the target, (N,) fp32 in nats, and whether any logit is −inf.

    The hidden state is used as it comes, before any rounding for storage; logits are fp32 and exist for one
    tile of tokens at a time: ``keep``, where given, is called with each, and with its part of ``row_N``.
    """
    tile = max(1, TILE_ELEMENTS // len(head_UE))
    found: dict[str, list[Tensor]] = {name: [] for name in STATISTICS}
    # On the device until the last tile: a look at it waits for all work before.
    has_inf_logits = torch.zeros((), dtype=torch.bool, device=hidden_NE.device)
    for start in range(0, len(hidden_NE), tile):
        part, target = hidden_NE[start : start + tile].float(), target_N[start : start + tile]
        logits_NU = buffer("logits", (len(part), len(head_UE)), torch.float32, part.device)
        torch.mm(part, head_UE.T, out=logits_NU)
        logsumexp_N = logits_NU.logsumexp(dim=1)
        found["entropy"].append(token_entropy(logits_NU))
        found["logsumexp"].append(logsumexp_N)
        found["target_logprob"].append(logits_NU.gather(1, target[:, None])[:, 0] - logsumexp_N)
        has_inf_logits |= torch.isneginf(logits_NU.amin())
        if keep is not None and row_N is not None:
            keep(row_N[start : start + tile], logits_NU, logsumexp_N)
    return {name: torch.cat(parts) for name, parts in found.items()}, bool(has_inf_logits)

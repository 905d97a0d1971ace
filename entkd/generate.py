"""Batched generation with a key-value cache, for synthetic data and SeqKD.

A loop of our own instead of ``model.generate``: prompts are sorted by length, finished rows leave the batch, and
the nucleus is sampled without sorting the vocabulary; on two CPU cores that is several times faster.
Shape suffixes: B rows of the running batch, L prompt tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from entkd.progress import Progress

_COMPACT_BELOW = 0.875
"""Finished rows leave when no more than this share of the batch is still running: leaving copies the cache."""

_CHUNK = 256
"""Tokens whose probabilities are summed together before sampling."""


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    max_length: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    batch: int = 64,
    eos_token_id: int | None = None,
    progress: str | None = None,
) -> list[list[int]]:
    """Continue every prompt until EOS or a limit; EOS is part of the continuation.

    Parameters
    ----------
    max_new_tokens
        Longest continuation.
    max_length
        Longest prompt with its continuation; every prompt is shorter.
    temperature
        0 is greedy; otherwise sampling from softmax(logits / temperature), from its ``top_p`` nucleus.
    generator
        CPU generator of the samples. They depend on ``batch`` too, as it decides which rows draw together.
    eos_token_id
        The token that ends a continuation; the tokenizer's EOS by default.
    progress
        Label of the progress bar; none by default.

    Returns
    -------
    One list of token ids per prompt, in the order of the prompts.
    """
    eos = tokenizer.eos_token_id if eos_token_id is None else eos_token_id
    # Rows of one length need no padding, and the longest batch first shows at once whether memory suffices.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    outputs: list[list[int]] = [[] for _ in prompts]
    with Progress(progress or "", len(prompts), "text", visible=progress is not None) as bar:
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            limits = [min(max_new_tokens, max_length - len(prompts[row])) for row in rows]
            running = _Batch.start(model, [prompts[row] for row in rows], limits, pad_id=eos)
            while running.active_B.any():
                logits_BV = running.next_logits(model)[:, : len(tokenizer)].float().cpu()
                tokens_B = choose(logits_BV, temperature, top_p, generator)
                for row, token in running.append(tokens_B, eos):
                    outputs[rows[row]].append(token)
            bar.advance(len(rows))
    return outputs


@dataclass
class _Batch:
    """Rows that are being continued together, left-padded to one length."""

    ids: torch.Tensor
    """(B, new) tokens that the cache does not hold yet."""
    mask_BL: torch.Tensor
    """1 where a token is, 0 where padding is; all tokens so far."""
    positions: torch.Tensor
    """(B, new) positions of ``ids``, counted without padding."""
    rows_B: torch.Tensor
    """Index of each row in the batch as it started."""
    left_B: torch.Tensor
    """Tokens that each row may still get."""
    active_B: torch.Tensor
    """Rows that have not ended."""
    cache: DynamicCache

    @classmethod
    def start(
        cls, model: PreTrainedModel, prompts: Sequence[Sequence[int]], limits: Sequence[int], pad_id: int
    ) -> _Batch:
        longest = max(map(len, prompts))
        ids = [[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        mask_BL = torch.tensor(mask, device=model.device)
        return cls(
            torch.tensor(ids, device=model.device),
            mask_BL,
            (mask_BL.cumsum(-1) - 1).clamp_min(0),
            torch.arange(len(prompts)),
            torch.tensor(limits),
            torch.ones(len(prompts), dtype=torch.bool),
            DynamicCache(config=model.config),
        )

    def next_logits(self, model: PreTrainedModel) -> torch.Tensor:
        """(B, V) logits of each row's next token."""
        output = model(
            input_ids=self.ids,
            attention_mask=self.mask_BL,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def append(self, tokens_B: torch.Tensor, eos: int) -> list[tuple[int, int]]:
        """Add a token to every row; returns (row, token) of those that were active, and drops ended rows."""
        added = list(zip(self.rows_B[self.active_B].tolist(), tokens_B[self.active_B].tolist(), strict=True))
        self.left_B -= 1
        self.active_B &= (tokens_B != eos) & (self.left_B > 0)
        self.ids = tokens_B[:, None].to(self.ids.device)
        self.positions = self.positions[:, -1:] + 1
        self.mask_BL = torch.cat([self.mask_BL, self.mask_BL.new_ones(len(self.mask_BL), 1)], dim=1)
        active = int(self.active_B.sum())
        if 0 < active <= _COMPACT_BELOW * len(self.rows_B):
            keep = self.active_B.nonzero()[:, 0]
            self.rows_B, self.left_B, self.active_B = self.rows_B[keep], self.left_B[keep], self.active_B[keep]
            keep = keep.to(self.ids.device)
            self.ids, self.positions, self.mask_BL = self.ids[keep], self.positions[keep], self.mask_BL[keep]
            self.cache.batch_select_indices(keep)
        return added


def choose(
    logits_BV: torch.Tensor, temperature: float, top_p: float = 1.0, generator: torch.Generator | None = None
) -> torch.Tensor:
    """The next token of each row: the most probable one at temperature 0, otherwise a sample.

    The nucleus is the smallest set of most probable tokens with mass ``top_p``: a token is in it exactly when
    the tokens above it have less mass than that. So a sample of the full distribution is kept if it is in the
    nucleus and drawn again if not, which needs no sorting and is exact.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    probs_BV = torch.softmax(logits_BV / temperature, dim=-1)
    draw = _Inversion(probs_BV)
    tokens_B = torch.full((len(probs_BV),), -1)
    pending = torch.arange(len(probs_BV))
    while len(pending):
        uniform_B = torch.rand(len(pending), generator=generator, dtype=torch.float64)
        drawn_B = draw(pending, uniform_B)
        tokens_B[pending] = drawn_B
        if top_p == 1:
            return tokens_B
        rows_BV = probs_BV if len(pending) == len(probs_BV) else probs_BV[pending]
        own_B1 = rows_BV.gather(1, drawn_B[:, None])
        above_B = torch.where(rows_BV > own_B1, rows_BV, 0.0).sum(-1)
        pending = pending[above_B >= top_p]
    return tokens_B


class _Inversion:
    """Tokens by inversion of the cumulative distribution, in two levels: sums of chunks, then one chunk's tokens.

    A running sum over the vocabulary in fp64 is a tenth of a decoding step; sums of chunks are nearly free.
    """

    def __init__(self, probs_BV: torch.Tensor) -> None:
        rest = -probs_BV.shape[1] % _CHUNK
        padded_BV = torch.nn.functional.pad(probs_BV, (0, rest)) if rest else probs_BV
        self.probs_BCK = padded_BV.view(len(probs_BV), -1, _CHUNK)
        self.cdf_BC = self.probs_BCK.sum(-1, dtype=torch.float64).cumsum(-1)

    def __call__(self, rows: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
        """The token of each row at which its cumulative probability passes ``uniform_B`` in [0, 1)."""
        cdf_BC = self.cdf_BC[rows]
        wanted_B1 = uniform_B[:, None] * cdf_BC[:, -1:]
        chunk_B1 = _first_above(cdf_BC, wanted_B1)
        before_B1 = torch.where(chunk_B1 > 0, cdf_BC.gather(1, (chunk_B1 - 1).clamp_min(0)), 0.0)
        cdf_BK = self.probs_BCK[rows, chunk_B1[:, 0]].cumsum(-1, dtype=torch.float64)
        return (chunk_B1 * _CHUNK + _first_above(cdf_BK, wanted_B1 - before_B1))[:, 0]


def _first_above(cdf_BC: torch.Tensor, wanted_B1: torch.Tensor) -> torch.Tensor:
    """Index of the first entry above the wanted value; where rounding leaves none, of the last that rose."""
    found_B1 = torch.searchsorted(cdf_BC, wanted_B1, right=True)
    last_B1 = torch.searchsorted(cdf_BC, cdf_BC[:, -1:].contiguous(), right=False)
    return torch.minimum(found_B1, last_B1)

"""Batched generation with a key-value cache, for synthetic data and SeqKD.

A loop of our own instead of ``model.generate``: prompts are sorted by length, equal prompts are read once, finished
rows leave the batch, the cache grows in place, a CPU's weights are reordered once, and the nucleus is sampled without
sorting the vocabulary. How much faster that is, ``benchmarks/generate.py`` measures.
Shape suffixes: B rows of the running batch, L prompt tokens, V vocabulary, C chunks of K tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from entkd.cache import growing_cache
from entkd.progress import Progress
from entkd.reordered import reordered_weights
from entkd.softmax import argmax

_COMPACT_BELOW = 0.875
"""Finished rows leave when no more than this share of the batch is still running: leaving copies the cache."""

_CHUNK = 256
"""Tokens whose probabilities are summed together before sampling."""

_ROWS = 4
"""Rows that are sampled together: their probabilities, in fp32 and fp64, stay in a core's cache."""

_REORDER_FROM = 32
"""Tokens of a continuation from which reordered weights make up for the time that reordering takes."""


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
    vocabulary = len(tokenizer)
    # Rows of one length need no padding, and the longest batch first shows at once whether memory suffices.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    outputs: list[list[int]] = [[] for _ in prompts]
    long = min(max_new_tokens, max_length - min(map(len, prompts), default=max_length)) >= _REORDER_FROM
    with (
        Progress(progress or "", len(prompts), "text", visible=progress is not None) as bar,
        reordered_weights(model) if long else nullcontext(),
    ):
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            limits = [min(max_new_tokens, max_length - len(prompts[row])) for row in rows]
            running = _Batch.start(model, [prompts[row] for row in rows], limits, pad_id=eos)
            while running.active_B.any():
                tokens_B = choose(running.next_logits(model)[:, :vocabulary], temperature, top_p, generator)
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
        width = max(map(len, prompts))
        if model.device.type == "cpu" and model.dtype == torch.bfloat16 and width == min(map(len, prompts)):
            # A column of padding, for without any there is no mask, and without a mask transformers leaves
            # grouped-query attention to PyTorch's CPU kernel, which in bf16 then takes four times as long.
            width += 1
        ids = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        mask_BL = torch.tensor(mask, device=model.device)
        return cls(
            torch.tensor(ids, device=model.device),
            mask_BL,
            (mask_BL.cumsum(-1) - 1).clamp_min(0),
            torch.arange(len(prompts)),
            torch.tensor(limits),
            torch.ones(len(prompts), dtype=torch.bool),
            growing_cache(model),
        )

    def next_logits(self, model: PreTrainedModel) -> torch.Tensor:
        """(B, V) logits of each row's next token."""
        if self.cache.get_seq_length() > 0:
            return self._forward(model, self.ids, self.mask_BL, self.positions)
        first: dict[tuple[int, ...], int] = {}
        copies = [first.setdefault(tuple(row), index) for index, row in enumerate(self.ids.tolist())]
        if len(first) == len(copies):
            return self._forward(model, self.ids, self.mask_BL, self.positions)
        # Equal prompts, as all prompts for requests are, pass the model once.
        once = torch.tensor(list(first.values()), device=self.ids.device)
        rank = {row: index for index, row in enumerate(first.values())}
        again = torch.tensor([rank[row] for row in copies], device=self.ids.device)
        logits_BV = self._forward(model, self.ids[once], self.mask_BL[once], self.positions[once])
        self.cache.batch_select_indices(again)
        return logits_BV[again]

    def _forward(
        self, model: PreTrainedModel, ids: torch.Tensor, mask_BL: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        output = model(
            input_ids=ids,
            attention_mask=mask_BL,
            position_ids=positions,
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
    """The next token of each row, on the CPU: the most probable one at temperature 0, otherwise a sample.

    The nucleus is the smallest set of most probable tokens with mass ``top_p``: a token is in it exactly when
    the tokens above it have less mass than that. So a sample of the full distribution is kept if it is in the
    nucleus and drawn again if not, which needs no sorting and is exact.
    """
    if temperature == 0:
        return argmax(logits_BV).cpu()
    logits_BV = logits_BV.cpu()
    tokens_B = torch.full((len(logits_BV),), -1)
    pending = torch.arange(len(logits_BV))
    while len(pending):
        uniform_B = torch.rand(len(pending), generator=generator, dtype=torch.float64)
        pending_BV = logits_BV if len(pending) == len(logits_BV) else logits_BV[pending]
        kept = []
        for start in range(0, len(pending), _ROWS):
            rows = slice(start, start + _ROWS)
            rows_BV = pending_BV[rows].float()
            probs_BV = torch.softmax(rows_BV if temperature == 1 else rows_BV / temperature, dim=-1)
            drawn_B = tokens_B[pending[rows]] = _invert(probs_BV, uniform_B[rows])
            kept.append(_in_nucleus(probs_BV, drawn_B, top_p))
        pending = pending[~torch.cat(kept)]
    return tokens_B


def _in_nucleus(probs_BV: torch.Tensor, tokens_B: torch.Tensor, top_p: float) -> torch.Tensor:
    """Whether the tokens that are more probable than a row's token have less mass than ``top_p``."""
    if top_p == 1:
        return torch.ones(len(tokens_B), dtype=torch.bool)
    own_B1 = probs_BV.gather(1, tokens_B[:, None])
    return torch.where(probs_BV > own_B1, probs_BV, 0.0).sum(-1) < top_p


def _invert(probs_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """The token of each row at which its cumulative probability passes ``uniform_B`` in [0, 1).

    In two levels: sums of chunks, then one chunk's tokens. A running sum over the vocabulary in fp64 is a tenth of a
    decoding step; sums of chunks are nearly free.
    """
    rest = -probs_BV.shape[1] % _CHUNK
    padded_BV = torch.nn.functional.pad(probs_BV, (0, rest)) if rest else probs_BV
    probs_BCK = padded_BV.view(len(probs_BV), -1, _CHUNK)
    cdf_BC = probs_BCK.sum(-1, dtype=torch.float64).cumsum(-1)
    wanted_B1 = uniform_B[:, None] * cdf_BC[:, -1:]
    chunk_B1 = _first_above(cdf_BC, wanted_B1)
    before_B1 = torch.where(chunk_B1 > 0, cdf_BC.gather(1, (chunk_B1 - 1).clamp_min(0)), 0.0)
    cdf_BK = probs_BCK[torch.arange(len(probs_BV)), chunk_B1[:, 0]].cumsum(-1, dtype=torch.float64)
    return (chunk_B1 * _CHUNK + _first_above(cdf_BK, wanted_B1 - before_B1))[:, 0]


def _first_above(cdf_BC: torch.Tensor, wanted_B1: torch.Tensor) -> torch.Tensor:
    """Index of the first entry above the wanted value; where rounding leaves none, of the last that rose."""
    found_B1 = torch.searchsorted(cdf_BC, wanted_B1, right=True)
    last_B1 = torch.searchsorted(cdf_BC, cdf_BC[:, -1:].contiguous(), right=False)
    return torch.minimum(found_B1, last_B1)

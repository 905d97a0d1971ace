"""The model as lm-eval sees it: its HFLM with another way to log-likelihoods.

HFLM materialises logits for every position and normalises all of them. Here only positions that predict a scored
token are projected, in tiles, each distinct prefix once: sentences of minimal pairs share beginnings, and so do the
choices of a question. Log-softmax is taken in fp32 over the tokenizer's entries; rows that pad the vocabulary never
count.

Shapes: B rows of a batch, L tokens of a row, N distinct scored positions, M scored tokens, V vocabulary, D width.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entkd.models import Prefixes, assert_linear_head, goes_by_prefix, output_weight, prefix_states, vocab_rows
from entkd.products import compute_dtype
from entkd.progress import Progress
from entkd.score.greedy import continued, is_greedy
from entkd.softmax import largest_and_logsumexp
from entkd.tiles import piece_rows, slices, tile_rows
from entkd.workspace import buffer


@dataclass(frozen=True)
class _Row:
    """One forward pass and the requests that read it."""

    inputs: tuple[int, ...]
    """Token ids; they predict the tokens from the second on, and one more."""
    requests: list[tuple[int, tuple[int, ...]]]
    """Request index, and the tokens it scores: those that the row's last positions predict."""


class LanguageModel(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """A loaded causal model for lm-eval.

    Parameters
    ----------
    memory_gib
        Bounds the tokens of a batch: 8·V bytes each, an fp32 logit and its probability for every vocabulary entry,
        as if all logits of a batch were held at once. Here they are not, so that attention, activations and the
        key-value cache of generation fit in beside them.

    Notes
    -----
    Sentences without context. Where the tokenizer puts a BOS before any text, the sentence is conditioned on it.
    Where it does not, there is no prefix token: a model not trained with one would be scored off its distribution,
    so the first token conditions the rest and is not scored itself.

    White space at the end of a context stays in the context where it is a token of its own (lm-eval moves it to the
    continuation); `_encode_pair` falls back to lm-eval's way where it is not.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, memory_gib: float) -> None:
        assert_linear_head(model, "scored model")
        self.encoded: dict[str, list[int]] = {}
        # Log-likelihoods are batched below by tokens, so the batch size that lm-eval cuts them into beforehand is
        # without limit; generate_until sets it.
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=sys.maxsize)
        self.scored_vocabulary = len(tokenizer)
        self.rows = vocab_rows(output_weight(model), self.scored_vocabulary, "scored model")
        self.batch_tokens = max(1, int(memory_gib * 2**30) // (8 * self.scored_vocabulary))
        first = tokenizer("a")["input_ids"][0]
        self.automatic_bos = first if first == tokenizer.bos_token_id else None

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability in nats, is it the greedy choice) of every (context, continuation)."""
        self._encode_all([text for request in requests for text in (request.args[0], "".join(request.args))])
        encoded = []
        for context, continuation in (request.args for request in requests):
            ids = self._encode_pair(context, continuation) if context else self._encode_alone(continuation)
            encoded.append(((context, continuation), *ids))
        self.encoded.clear()
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)

    def _encode_all(self, texts: list[str]) -> None:
        """Put into ``encoded`` what `tok_encode` says of these texts: one call takes a fraction of many calls' time."""
        prefix = self.tokenizer.decode(self.prefix_token_id)
        # lm-eval treats texts that begin with the prefix in a way of its own.
        own = [text for text in dict.fromkeys(texts) if text and not text.startswith(prefix)]
        if own:
            options = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
            self.encoded = dict(zip(own, self.tokenizer(own, **options)["input_ids"], strict=True))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids as HFLM finds them."""
        if add_special_tokens is None and not kwargs and string in self.encoded:
            return self.encoded[string]
        ids: list[int] = super().tok_encode(string, add_special_tokens, **kwargs)
        return ids

    def _encode_alone(self, text: str) -> tuple[list[int], list[int]]:
        ids = self.tok_encode(text, add_special_tokens=False)
        prefix = self.automatic_bos
        if prefix is None and len(ids) == 1:
            prefix = self.prefix_token_id  # a single token has nothing else to be conditioned on
        return (ids[:1], ids[1:]) if prefix in (None, ids[0]) else ([prefix], ids)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        whole, alone = self.tok_encode(context + continuation), self.tok_encode(context)
        if len(whole) > len(alone) and whole[: len(alone)] == alone:
            return alone, whole[len(alone) :]
        pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
        return pair

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        with Progress("log-likelihoods", len(requests), "request", visible=not disable_tqdm) as bar:
            for batch in self._batches(requests):
                logprob_M, greedy_M, owner_M = self._score(batch)
                for logprob, greedy, owner in zip(logprob_M, greedy_M, owner_M, strict=True):
                    total, all_greedy = answers[owner]
                    answers[owner] = (total + logprob, all_greedy and greedy)
                bar.advance(sum(len(row.requests) for row in batch))
        return answers

    def _batches(self, requests: list[tuple[Any, list[int], list[int]]]) -> Iterator[list[_Row]]:
        """Rows in batches of at most ``batch_tokens``: where they are padded, sorted by length, longest first."""
        rows: dict[tuple[int, ...], _Row] = {}
        for index, (_, context, continuation) in enumerate(requests):
            ids = tuple(context + continuation)[-(self.max_length + 1) :]
            row = rows.setdefault(ids[:-1], _Row(ids[:-1], []))
            row.requests.append((index, ids[max(1, len(ids) - len(continuation)) :]))
        by_prefix = goes_by_prefix(self.model)
        batch: list[_Row] = []
        tokens = 0
        # Side by side in the order of their tokens, rows that begin alike are in one batch.
        for inputs in sorted(rows, key=None if by_prefix else lambda ids: (-len(ids), ids)):
            if batch and tokens + len(inputs if by_prefix else batch[0].inputs) > self.batch_tokens:
                yield batch
                batch, tokens = [], 0
            batch.append(rows[inputs])
            tokens += len(inputs if by_prefix else batch[0].inputs)
        if batch:
            yield batch

    def _score(self, batch: list[_Row]) -> tuple[list[float], list[bool], list[int]]:
        """Log-probability of each scored token, whether it is the most probable one, and its request."""
        prefixes = Prefixes.of([row.inputs for row in batch])
        number_of: dict[int, int] = {}  # prefix → index among the N distinct scored positions
        labels: list[int] = []
        sources: list[int] = []
        owners: list[int] = []
        for row, own in zip(batch, prefixes.of_rows, strict=True):
            for owner, scored in row.requests:
                labels += scored
                sources += [number_of.setdefault(prefix, len(number_of)) for prefix in own[len(own) - len(scored) :]]
                owners += [owner] * len(scored)
        hidden_ND = prefix_states(self.model, prefixes, torch.tensor(list(number_of), device=self.device))
        weight_VD = output_weight(self.model)[: self.scored_vocabulary]
        logprob_M, greedy_M = label_logprobs(
            hidden_ND,
            weight_VD,
            torch.tensor(sources, device=self.device),
            torch.tensor(labels, device=self.device),
        )
        return logprob_M.tolist(), greedy_M.tolist(), owners

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations as HFLM makes them, in batches that fit the memory."""
        longest = max(
            len(self.tok_encode(context)) + kwargs.get("max_gen_toks", self.max_gen_toks)
            for context, kwargs in (request.args for request in requests)
        )
        self.batch_size_per_gpu = max(1, self.batch_tokens // longest)
        try:
            texts: list[str] = super().generate_until(requests, disable_tqdm or not sys.stderr.isatty())
        finally:
            self.batch_size_per_gpu = sys.maxsize
        return texts

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        if is_greedy(self.model, self.tokenizer, stop, kwargs):
            return continued(self.model, self.tokenizer, context, kwargs["attention_mask"], max_length)
        if self.rows > self.scored_vocabulary:
            kwargs["suppress_tokens"] = list(range(self.scored_vocabulary, self.rows))
        ids: Tensor = super()._model_generate(context, max_length, stop, **kwargs)
        return ids


def label_logprobs(hidden_ND: Tensor, weight_VD: Tensor, source_M: Tensor, label_M: Tensor) -> tuple[Tensor, Tensor]:
    """log softmax(hidden · weightᵀ)[label] in fp32, and whether the label is the most probable token.

    The logits are the model's own, of its dtype, as lm-eval takes them: training needs them in fp32, for gradients.

    Parameters
    ----------
    hidden_ND, weight_VD
        Last hidden states and output projection.
    source_M, label_M
        For each scored token, the row of ``hidden_ND`` that predicts it, and its id.

    Returns
    -------
    tuple
        (M,) log-probabilities in nats, fp32 (fp64 for fp64 inputs), and (M,) bool.
    """
    device, vocabulary, dtype = hidden_ND.device, len(weight_VD), compute_dtype(hidden_ND)
    order_M = source_M.argsort(stable=True)
    sorted_M = source_M[order_M].contiguous()
    logprob_M = torch.empty(len(label_M), dtype=dtype, device=device)
    greedy_M = torch.empty(len(label_M), dtype=torch.bool, device=device)
    for tile in slices(len(hidden_ND), tile_rows(vocabulary, device)):
        hidden_RD = hidden_ND[tile]
        logits_RV = buffer("logits", (len(hidden_RD), vocabulary), hidden_RD.dtype, device)
        torch.mm(hidden_RD, weight_VD.T, out=logits_RV)
        normaliser_R = torch.empty(len(logits_RV), dtype=dtype, device=device)
        largest_R = torch.empty_like(normaliser_R)
        for piece in slices(len(logits_RV), piece_rows(vocabulary, device)):
            piece_RV = buffer("piece", logits_RV[piece].shape, dtype, device).copy_(logits_RV[piece])
            largest_R[piece], normaliser_R[piece] = largest_and_logsumexp(piece_RV)
        bounds = torch.searchsorted(sorted_M, torch.tensor([tile.start, tile.stop], device=device)).tolist()
        own_K = order_M[bounds[0] : bounds[1]]
        row_K = source_M[own_K] - tile.start
        logit_K = logits_RV[row_K, label_M[own_K]].to(dtype)
        logprob_M[own_K] = logit_K - normaliser_R[row_K]
        greedy_M[own_K] = logit_K == largest_R[row_K]
    return logprob_M, greedy_M

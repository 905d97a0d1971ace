"""Data that the teacher writes itself: requests, then responses (Magpie, arXiv 2406.08464).

Given only the chat template up to the place where a user's request begins, an instruction-tuned model writes a
request; given the request, it writes a response.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from transformers import PreTrainedModel

from entkd.config import SyntheticData
from entkd.data.corpus import Document
from entkd.data.duplicates import NearDuplicates
from entkd.data.templates import Formatter
from entkd.errors import UserError
from entkd.generate import generate
from entkd.models import load_model
from entkd.runtime import device_slot, numpy_stream, resolve_dtype, torch_stream

_MOST_REQUESTS_PER_DOCUMENT = 20
"""Sampling ends with an error past this many requests per wanted document."""


def synthetic_documents(
    settings: SyntheticData, formatter: Formatter, teacher: str | Path, precision: str
) -> tuple[dict[str, list[Document]], dict[str, dict[str, int]]]:
    """Documents of the three splits, and what was dropped before the split, by reason (under ``train``).

    Raises
    ------
    UserError
        If too few requests are usable.
    """
    wanted = settings.train + settings.dev + settings.test
    dropped: Counter[str] = Counter()
    documents: list[Document] = []
    with device_slot() as device:
        model = load_model(teacher, dtype=resolve_dtype(precision, device))
        model.to(device)  # type: ignore[arg-type]
        writer = _Writer(settings, formatter, model, dropped)
        while len(documents) < wanted:
            # Some to spare: in place of a dropped response, another would be written alone, as long as a whole batch.
            missing = wanted - len(documents)
            requests = writer.requests(missing + math.ceil(missing / 20))
            documents += writer.respond(requests, first=len(documents))
    del documents[wanted:]
    # Later requests differ from all earlier ones, so consecutive slices would put the unusual ones into test.
    order = numpy_stream(settings.seed, "synthetic split").permutation(len(documents))
    documents = [documents[index] for index in order]
    first, second = settings.train, settings.train + settings.dev
    splits = {"train": documents[:first], "dev": documents[first:second], "test": documents[second:]}
    return splits, {"train": dict(dropped)}


class _Writer:
    """Samples requests and responses; remembers what it has written and counts what it drops."""

    def __init__(
        self, settings: SyntheticData, formatter: Formatter, model: PreTrainedModel, dropped: Counter[str]
    ) -> None:
        self.settings = settings
        self.formatter = formatter
        self.model = model
        self.dropped = dropped
        self.drawn = 0
        self.kept = 0
        self._seen = NearDuplicates(settings.near_duplicate)
        self._special = set(formatter.tokenizer.all_special_ids)
        self._request_stream = torch_stream(settings.seed, "synthetic requests")
        self._response_stream = torch_stream(settings.seed, "synthetic responses")
        self._spare: list[str] = []

    def requests(self, wanted: int) -> list[str]:
        """``wanted`` new requests, none a near duplicate of an earlier one."""
        settings = self.settings
        most = _MOST_REQUESTS_PER_DOCUMENT * (settings.train + settings.dev + settings.test) + settings.batch
        while len(self._spare) < wanted:
            if self.drawn >= most:
                reasons = ", ".join(f"{reason} {count}" for reason, count in self.dropped.most_common())
                raise UserError(
                    f"data: of {self.drawn} sampled requests only {self.kept} were usable (dropped: {reasons}); "
                    "this teacher is no instruction-tuned chat model, or max_prompt_tokens is too small"
                )
            share = max(0.1, self.kept / self.drawn) if self.drawn else 0.65
            count = min(math.ceil((wanted - len(self._spare)) / share), most - self.drawn)
            for ids in self._sample([self.formatter.before_request] * count, requests=True):
                self._consider(ids)
            self.drawn += count
        taken, self._spare = self._spare[:wanted], self._spare[wanted:]
        return taken

    def _consider(self, ids: list[int]) -> None:
        if ids[-1] != self.formatter.end_of_request:
            self.dropped["request_too_long"] += 1
            return
        content = ids[:-1]
        text = self.formatter.text(content).strip()
        if self._special & set(content):
            self.dropped["request_with_special_token"] += 1
        elif len(content) < self.settings.min_prompt_tokens or not text:
            self.dropped["request_too_short"] += 1
        elif not self._seen.add(text):
            self.dropped["near_duplicate"] += 1
        else:
            self.kept += 1
            self._spare.append(text)

    def respond(self, requests: list[str], first: int) -> list[Document]:
        """Documents of the requests whose responses are usable, numbered from ``first``."""
        formatter = self.formatter
        documents: list[Document] = []
        chats, prompts = [], []
        for request in requests:
            chat = [{"role": "user", "content": request}]
            prompt = formatter.prompt_ids(formatter.prompt_text(chat))
            if len(prompt) < formatter.max_tokens:
                chats.append(chat)
                prompts.append(prompt)
            else:
                self.dropped["prompt_too_long"] += 1
        for chat, ids in zip(chats, self._sample(prompts, requests=False), strict=True):
            content = ids[:-1] if ids[-1] == formatter.end_of_response else ids
            text = formatter.text(content)
            if self._special & set(content):
                self.dropped["response_with_special_token"] += 1
                continue
            if len(content) < self.settings.min_response_tokens or not text.strip():
                self.dropped["response_too_short"] += 1
                continue
            document = formatter.document(f"synthetic-{first + len(documents)}", chat, [text], ids)
            assert document is not None  # prompts without room for a response are gone by now
            documents.append(document)
        return documents

    def _sample(self, prompts: list[list[int]], requests: bool) -> list[list[int]]:
        settings, formatter = self.settings, self.formatter
        return generate(
            self.model,
            formatter.tokenizer,
            prompts,
            # One more token than a request may have: its end.
            max_new_tokens=settings.max_prompt_tokens + 1 if requests else settings.max_response_tokens,
            max_length=formatter.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p if requests else 1.0,
            generator=self._request_stream if requests else self._response_stream,
            batch=settings.batch,
            eos_token_id=formatter.end_of_request if requests else formatter.end_of_response,
            progress="requests" if requests else "responses",
        )

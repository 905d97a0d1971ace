"""How prompt and response become text and token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import jinja2
from transformers import PreTrainedTokenizerBase

from entkd.data.corpus import Document
from entkd.errors import UserError
from entkd.rows import Messages

# The prompt without input of Stanford Alpaca (Taori et al. 2023), which its descendants share.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{user}\n\n### Response:\n"
)
_SENTINEL = "entkdSENTINELentkd"
"""Stands for a turn's content where a template is taken apart. Plain letters survive any template's trimming."""


@dataclass(frozen=True)
class Formatter:
    """One tokenizer and template: from turns to prompt text, and from text to documents.

    Prompt and response are tokenised separately and concatenated. That way the boundary is exact: tokenised
    together, the last characters of the prompt and the first of the response could merge into one token, which
    would be neither; and generation feeds the model exactly these prompt tokens too.
    """

    tokenizer: PreTrainedTokenizerBase
    template: Literal["chat", "alpaca", "plain"]
    max_tokens: int
    """Longest document."""

    def __post_init__(self) -> None:
        if self.template == "chat" and not self.tokenizer.chat_template:
            raise UserError(
                "data.template chat: this tokenizer has no chat template; use `template: alpaca` or `template: plain`"
            )
        if self.tokenizer.eos_token_id is None:
            raise UserError("teacher: its tokenizer has no EOS token, so no response could end; use another teacher")

    def prompt_text(self, messages: Messages) -> str:
        """The text up to the place where the response begins.

        Raises
        ------
        ValueError
                If the template refuses the turns, e.g. several of them where it takes one request.
        """
        if self.template == "chat":
            try:
                return self._rendered(messages, add_generation_prompt=True)
            except jinja2.TemplateError as error:  # how templates refuse roles, or orders of turns
                raise ValueError(f"the tokenizer's chat template refuses these turns: {error}") from error
        if len(messages) != 1 or messages[0]["role"] != "user":
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(f"template {self.template} takes one user turn, not ({roles}); use `template: chat`")
        user = messages[0]["content"]
        return _ALPACA.format(user=user) if self.template == "alpaca" else user

    def prompt_ids(self, text: str) -> list[int]:
        """Token ids of a prompt, with exactly one BOS where this tokenizer's convention is to begin with one."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if self._adds_bos and ids[:1] != [self.tokenizer.bos_token_id]:
            return [self.tokenizer.bos_token_id, *ids]
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return str(self.tokenizer.decode(list(ids)))

    @cached_property
    def _adds_bos(self) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("a")["input_ids"][0] == bos

    @cached_property
    def end_of_response(self) -> int:
        """The token that ends a response: the template's end of an assistant turn, else the tokenizer's EOS."""
        if self.template != "chat":
            return int(self.tokenizer.eos_token_id)
        return self._end_of_turn([{"role": "user", "content": "a"}, {"role": "assistant", "content": _SENTINEL}])

    @cached_property
    def end_of_request(self) -> int:
        """The token that ends a user turn of the chat template, else the tokenizer's EOS."""
        return self._end_of_turn([{"role": "user", "content": _SENTINEL}])

    @cached_property
    def before_request(self) -> list[int]:
        """Token ids of the chat template up to where a user's request begins (Magpie, arXiv 2406.08464)."""
        return self.prompt_ids(self._around([{"role": "user", "content": _SENTINEL}])[0])

    def _rendered(self, messages: Messages, add_generation_prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        )

    def _around(self, messages: Messages) -> tuple[str, str]:
        before, found, after = self._rendered(messages, add_generation_prompt=False).partition(_SENTINEL)
        if not found:
            raise UserError("data.template chat: this tokenizer's chat template does not show the turn's content")
        return before, after

    def _end_of_turn(self, messages: Messages) -> int:
        following = self.tokenizer(self._around(messages)[1], add_special_tokens=False)["input_ids"][:1]
        special = following and following[0] in self.tokenizer.all_special_ids
        return int(following[0] if special else self.tokenizer.eos_token_id)

    def document(
        self, identifier: str, messages: Messages, references: Sequence[str], response_ids: Sequence[int] | None = None
    ) -> Document | None:
        """The document of one row, or None if its prompt leaves no room for a response.

        Parameters
        ----------
        references
            Acceptable responses; the first is the document's.
        response_ids
            Its token ids where the response was generated, with its end token unless it was cut off.
        """
        prompt = self.prompt_text(messages)
        prompt_ids = self.prompt_ids(prompt)
        room = self.max_tokens - len(prompt_ids)
        if room < 1:
            return None
        if response_ids is None:
            plain: list[int] = self.tokenizer(references[0], add_special_tokens=False)["input_ids"]
            response_ids = [*plain, self.end_of_response]
        kept = list(response_ids[:room])
        cut = kept[-1] != self.end_of_response
        shortened = len(kept) < len(response_ids)
        text: dict[str, Any] = {
            "id": identifier,
            "prompt": prompt,
            "response": self.text(kept if cut else kept[:-1]) if shortened else references[0],
            "user": next((m["content"] for m in reversed(messages) if m["role"] == "user"), ""),
            "cut": cut,
        }
        if len(references) > 1:
            text["references"] = list(references)
        return Document(prompt_ids, kept, text)

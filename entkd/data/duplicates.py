"""Near duplicates by the overlap of word 3-grams."""

from __future__ import annotations

import re
from collections import Counter, defaultdict


def word_trigrams(text: str) -> frozenset[tuple[str, ...]]:
    """The set of word 3-grams of ``text``, without case and punctuation; all words where there are fewer than 3.

    A text without words stands for itself.
    """
    words = re.findall(r"\w+", text.casefold()) or [text]
    if len(words) < 3:
        return frozenset([tuple(words)])
    return frozenset(zip(words, words[1:], words[2:], strict=False))


class NearDuplicates:
    """The texts kept so far; a text too similar to one of them is refused.

    Similarity is the Jaccard index of the word 3-gram sets, so exact duplicates have 1.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._sizes: list[int] = []
        self._holders: dict[tuple[str, ...], list[int]] = defaultdict(list)

    def add(self, text: str) -> bool:
        """Keep ``text`` and return True, or return False if it is a near duplicate of a kept one."""
        grams = word_trigrams(text)
        shared = Counter(holder for gram in grams for holder in self._holders.get(gram, ()))
        for holder, common in shared.items():
            if common / (len(grams) + self._sizes[holder] - common) >= self.threshold:
                return False
        for gram in grams:
            self._holders[gram].append(len(self._sizes))
        self._sizes.append(len(grams))
        return True

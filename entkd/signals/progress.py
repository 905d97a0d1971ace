"""Progress of the teacher pass, in tokens."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

LOG_SECONDS = 30.0


class TokenProgress:
    """A bar where standard error is a terminal, otherwise a line every half minute and at the end."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total, self._done = name, total, 0
        self._began = self._logged = time.monotonic()
        self._bar = tqdm(total=total, desc=name, unit="token", unit_scale=True) if sys.stderr.isatty() else None

    def advance(self, tokens: int) -> None:
        """Count tokens that went through the teacher."""
        self._done += tokens
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(tokens)
        elif self._done == self._total or now - self._logged > LOG_SECONDS:
            self._logged = now
            pace = self._done / max(now - self._began, 1e-9)
            print(
                f"{self._name}: {self._done:,} of {self._total:,} tokens, {pace:,.0f} tokens/s",
                file=sys.stderr,
                flush=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

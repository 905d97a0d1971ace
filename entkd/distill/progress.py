"""Progress of a long loop: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm


class Progress:
    """A tqdm bar where standard error is a terminal, otherwise one line every `every` steps."""

    def __init__(self, name: str, total: int, start: int, every: int, visible: bool = True) -> None:
        self._name, self._total, self._done, self._every = name, total, start, every
        self._visible = visible
        self._began = time.monotonic()
        self._first = start
        self._bar = (
            tqdm(total=total, initial=start, desc=name, unit="step", dynamic_ncols=True)
            if visible and sys.stderr.isatty()
            else None
        )

    def advance(self, **values: float) -> None:
        """Count one step; the values are shown beside it."""
        self._done += 1
        text = " ".join(f"{key} {value:.4g}" for key, value in values.items())
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
        elif self._visible and (self._done % self._every == 0 or self._done == self._total):
            pace = (time.monotonic() - self._began) / (self._done - self._first)
            left = pace * (self._total - self._done)
            print(f"{self._name}: step {self._done}/{self._total} {text} ({pace:.2f} s/step, {left:.0f} s left)", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

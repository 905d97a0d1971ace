"""Progress of long work: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

LINE_SECONDS = 20.0
"""Between two lines where there is no terminal."""


class Progress:
    """Counts units of work on standard error.

    Parameters
    ----------
    name
        What is being done.
    total
        Units in all.
    unit
        One unit, in the singular.
    start
        Units that an earlier, interrupted run has done.
    visible
        False prints nothing: one of several processes reports.
    """

    def __init__(self, name: str, total: int, unit: str, start: int = 0, visible: bool = True) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._done = self._first = start
        self._visible = visible
        self._began = self._printed = time.monotonic()
        on_terminal = visible and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=start, desc=name, unit=unit, dynamic_ncols=True) if on_terminal else None

    def advance(self, units: int = 1, **values: float) -> None:
        """Count units; the values are shown beside the count."""
        self._done += units
        text = " ".join(f"{key} {value:.4g}" for key, value in values.items())
        now = time.monotonic()
        if self._bar is not None:
            if text:
                self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(units)
        elif self._visible and (self._done >= self._total > self._done - units or now - self._printed > LINE_SECONDS):
            self._printed = now
            pace = (self._done - self._first) / max(now - self._began, 1e-9)
            left = (self._total - self._done) / max(pace, 1e-9)
            count = f"{self._done:,} of {self._total:,} {self._unit}s, {pace:,.3g}/s, {left:.0f} s left"
            print(f"{self._name}: {count} {text}".rstrip(), file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

"""Error texts: the path, the value, what is allowed, the nearest match."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_name(path: str, value: str, allowed: Iterable[str]) -> str:
    """One line for a name that is not known, with the nearest one that is."""
    names = sorted(allowed)
    near = difflib.get_close_matches(value, names, n=1)
    hint = f"; did you mean `{near[0]}`?" if near else ""
    return f"{path}: unknown name `{value}`{hint} Known: {', '.join(names)}"

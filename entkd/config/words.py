"""Settings in words, for tables and messages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from entkd.config.method import Method
from entkd.names import COMPONENTS
from entkd.settings import Settings


def changed(settings: Settings, *but: str) -> str:
    """`` key=value`` of every setting off its default, except those named; `` block.key=value`` within a block."""
    return "".join(f" {key}={value}" for key, value in _changed(settings) if key not in but)


def _changed(settings: Settings) -> Iterator[tuple[str, Any]]:
    given = settings.model_dump(mode="json")
    for key, field in type(settings).model_fields.items():
        value, default = getattr(settings, key), field.get_default(call_default_factory=True)
        if isinstance(value, Settings) and isinstance(default, Settings):
            yield from ((f"{key}.{inner}", shown) for inner, shown in _changed(value))
        elif key in given and value != default:
            yield key, given[key]


def base_of(method: Method, pipeline: str) -> str:
    """What an arm's components stand on, e.g. `forward_kl`, `jsd beta=0.2 + ce`, `seqkd: ce`.

    All terms of the method but the components and the difficulty that they read, so that arms with equal words differ
    in their components alone.
    """
    terms = [
        getattr(term, "name", key) + changed(term, "name")
        for key, term in method
        if key not in (*COMPONENTS, "difficulty") and term is not None
    ]
    return ("" if pipeline == "distill" else f"{pipeline}: ") + " + ".join(terms)

"""Settings in words, for tables and messages."""

from __future__ import annotations

from entkd.config.method import Method
from entkd.names import COMPONENTS
from entkd.settings import Settings


def changed(settings: Settings, *but: str) -> str:
    """`` key=value`` of every setting that is not at its default, except those named."""
    defaults = {name: field.default for name, field in type(settings).model_fields.items()}
    given = settings.model_dump(mode="json")
    return "".join(f" {key}={given[key]}" for key in given if key not in but and given[key] != defaults[key])


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

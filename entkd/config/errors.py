"""Error texts: the path, the value, what is allowed, the nearest match.

pydantic reports where validation failed as a tuple that also holds the tags of the unions it went through;
here such a report becomes one line in the words of the experiment file.
"""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from entkd.errors import UserError
from entkd.names import SLUG

EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
    "dict": "a mapping of settings",
    "model": "a mapping of settings",
    "tuple": "a list",
    "list": "a list",
}
"""What pydantic's families of type errors ask for, in the words of a YAML file."""


class ConfigError(UserError):
    """An experiment that cannot run: one line per problem."""

    def __init__(self, problems: Iterable[str], source: str = "") -> None:
        self.problems = list(problems)
        super().__init__("\n".join(f"{source}: {problem}" if source else problem for problem in self.problems))


class ProblemsError(ValueError):
    """Several problems found by one validator; pydantic carries it to where the file is known."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(self.problems))


def nearest(value: str, allowed: Iterable[str]) -> str:
    """``; did you mean `x`?`` for the closest allowed name, or nothing where none is close."""
    near = difflib.get_close_matches(value, list(allowed), n=1)
    return f"; did you mean `{near[0]}`?" if near else "."


def unknown_name(path: str, value: str, allowed: Iterable[str]) -> str:
    """One line for a name that is not known, with the nearest one that is."""
    names = sorted(allowed)
    return f"{path}: unknown name `{value}`{nearest(value, names)} Known: {', '.join(names)}"


def problems_of(
    error: ValidationError, model: type[BaseModel], prefix: str = "", extra: Iterable[str] = ()
) -> list[str]:
    """One line per problem of a pydantic error raised by ``model``.

    ``prefix`` is the dotted path at which the model stands in the file; ``extra`` are keys that are allowed
    beside the model's own at its top level.
    """
    # What a value may be instead is one line; keys that are missing or unknown are one each.
    lines: dict[tuple[str, str], list[str]] = {}
    verbatim: list[str] = []
    reports = error.errors(include_url=False)
    for report in reports:
        depth = len(report["loc"])
        deeper = [other for other in reports if len(other["loc"]) > depth and other["loc"][:depth] == report["loc"]]
        if report["type"] == "too_short" and deeper:
            continue  # pydantic counts only the valid entries of a list
        cause = report.get("ctx", {}).get("error")
        if isinstance(cause, ProblemsError):
            verbatim += cause.problems
            continue
        path, owner = _locate(model, report["loc"], prefix)
        path, text = _text(path, dict(report), owner, extra if owner is model else ())
        own = text if report["type"] in ("missing", "extra_forbidden") else ""
        texts = lines.setdefault((path, own), [])
        if text not in texts:
            texts.append(text)
    return verbatim + [
        f"{path}: {' or '.join(texts)}" if path else " or ".join(texts) for (path, _), texts in lines.items()
    ]


def _text(path: str, report: dict[str, Any], owner: type[BaseModel] | None, extra: Iterable[str]) -> tuple[str, str]:
    """Path and words of one pydantic report."""
    kind, value, context = report["type"], report["input"], report.get("ctx", {})
    parent, _, key = path.rpartition(".")
    if kind == "extra_forbidden" and owner is not None:
        known = sorted({*owner.model_fields, *extra})
        return parent, f"unknown key `{key}`{nearest(key, known)} Known: {', '.join(known)}"
    if kind == "missing" and owner is not None:
        description = owner.model_fields[key].description
        return parent, f"`{key}` is missing." + (f" {_first_line(description)}" if description else "")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        allowed = [tag.strip(" '") for tag in context.get("expected_tags", "").split(",") if tag.strip(" '")]
        discriminator = context["discriminator"].strip("'")
        if kind == "union_tag_invalid":
            hint = nearest(str(context["tag"]), allowed)
            return f"{path}.{discriminator}", f"unknown name `{context['tag']}`{hint} Known: {', '.join(allowed)}"
        return path, f"`{discriminator}` is missing; it says which kind this is."
    if kind == "value_error":
        return path, str(context["error"])
    if kind == "literal_error":
        allowed = [part.strip("'") for part in context["expected"].replace(" or ", ", ").split(", ")]
        return path, f"{show(value)} must be one of {', '.join(allowed)}{nearest(str(value), allowed)}"
    if kind == "too_short":
        return path, f"{show(value)} needs at least {context['min_length']} entry"
    if kind == "string_pattern_mismatch":
        words = " (lower-case letters, digits and _ . = - alone)" if context["pattern"] == SLUG else ""
        return path, f"{show(value)} must match {context['pattern']}{words}"
    if kind.endswith(("_type", "_parsing", "_from_float")) and kind.partition("_")[0] in EXPECTED:
        return path, f"{show(value)} must be {EXPECTED[kind.partition('_')[0]]}{_instead(kind, value)}"
    message = report["msg"][0].lower() + report["msg"][1:]
    return path, f"{show(value)} {message.replace('input should be', 'must be')}"


def _instead(kind: str, value: Any) -> str:
    """What to write in place of a value of another type, where that is plain."""
    scalar = isinstance(value, int | float | str)
    if kind in ("tuple_type", "list_type") and scalar:
        return f"; write `[{value}]`"
    if kind == "string_type" and scalar:
        return f'; write it in quotes: `"{value}"`'
    return ""


def show(value: Any) -> str:
    """A value as it would stand in the file, cut to a readable length."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0]


def _locate(model: type[BaseModel], location: Iterable[str | int], prefix: str) -> tuple[str, type[BaseModel] | None]:
    """Dotted path of a pydantic location without union tags, and the model that holds its last key."""
    path = prefix
    owner: type[BaseModel] | None = model
    annotation: Any = model
    for part in location:
        annotation = _strip(annotation)
        if part == "[key]":
            continue
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            owner = annotation
            path = f"{path}.{part}" if path else str(part)
            field = annotation.model_fields.get(str(part))
            annotation = field.annotation if field is not None else None
        elif _is_union(annotation):
            members = [member for member in get_args(annotation) if _tag_fits(member, part)]
            annotation = members[0] if members else None  # the part names a union member, not a key of the file
        elif get_origin(annotation) in (dict, Mapping):
            owner = None
            path = f"{path}.{part}"
            annotation = get_args(annotation)[1]
        elif isinstance(part, int):
            owner = None
            path = f"{path}[{part}]"
            annotation = get_args(annotation)[0] if get_args(annotation) else None
    return path, owner


def _strip(annotation: Any) -> Any:
    """Without Annotated and without ``| None``: neither leaves a trace in pydantic's locations."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if _is_union(annotation):
        members = tuple(member for member in get_args(annotation) if member is not type(None))
        if len(members) == 1:
            return _strip(members[0])
    return annotation


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _tag_fits(member: Any, tag: str | int) -> bool:
    """Whether a union member is a settings class one of whose Literal fields allows exactly ``tag``."""
    if not (isinstance(member, type) and issubclass(member, BaseModel)):
        return False
    hints = typing.get_type_hints(member, include_extras=False)
    return any(get_origin(hint) is Literal and get_args(hint) == (tag,) for hint in hints.values())

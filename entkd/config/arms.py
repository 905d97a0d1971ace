"""Arms: JSON Merge Patches (RFC 7396) on the experiment's method, with two guards.

Removing what is not there is an error, and so are two arms that resolve to the same experiment.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ValidationError, model_validator

from entkd.config.errors import ProblemsError, problems_of, show, unknown_name
from entkd.config.method import Method
from entkd.config.words import base_of
from entkd.names import COMPONENTS, SLUG
from entkd.settings import Settings

Role = Literal["factorial", "baseline", "control"]

ARM_NAME = re.compile(SLUG)
RESERVED_NAMES = ("teacher", "untrained")
"""Rows of the table that are not arms: the teacher, and the student before training."""


class Arm(Settings):
    """One arm as written: a merge patch on the method, and what the arm is in the comparison."""

    role: Role = "baseline"
    """`factorial` arms are the design of the three components, and of their divergence where they have two (that of the
    first arm is the one to compare with); a `control` separates an idea from its side effects."""
    pipeline: str = "distill"
    """Which rule trains the arm: `distill`, or a baseline pipeline with a rules file of its own such as `seqkd`."""
    patch: dict[str, Any] = {}
    """The merge patch on `method`. In the file its keys stand beside `role` and `pipeline`."""

    @model_validator(mode="before")
    @classmethod
    def _collect_patch(cls, value: Any) -> Any:
        if value is None:
            return {}
        if isinstance(value, Mapping):
            own = {key: item for key, item in value.items() if key in ("role", "pipeline")}
            return own | {"patch": {key: item for key, item in value.items() if key not in own}}
        return value


class ResolvedArm(Settings):
    """One arm after patching."""

    name: str
    """The arm's name."""
    role: Role
    """What the arm is in the comparison."""
    pipeline: str
    """Which rule trains it."""
    method: Method
    """Its complete method."""

    @property
    def components(self) -> dict[str, Any]:
        """Name, role, which components are on, and on what base: what decides the arm's cell of the factorial."""
        on = {component: getattr(self.method, component) is not None for component in COMPONENTS}
        return {"name": self.name, "role": self.role, "base": self.base} | on

    @property
    def base(self) -> str:
        """The terms that its components stand on, in words."""
        return base_of(self.method, self.pipeline)

    @property
    def trained_method(self) -> dict[str, Any]:
        """What decides the trained weights: the terms that are present. No name, no role.

        Two arms are the same experiment exactly when this and the pipeline are equal.
        """
        terms = {key: value for key, value in self.method.model_dump(mode="json").items() if value is not None}
        if not self.method.reads_difficulty:
            del terms["difficulty"]
        return terms


def merge_patch(target: Any, patch: Any, path: str) -> Any:
    """RFC 7396 merge of ``patch`` into ``target``.

    Raises
    ------
    ValueError
        If the patch removes (``null``) a key that the target has not got, or that is already null.
    """
    if not isinstance(patch, Mapping):
        return patch
    merged = dict(target) if isinstance(target, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            if merged.get(key) is None:
                raise ValueError(f"{path}.{key}: null removes `{key}`, but the method has none; delete this line")
            del merged[key]
        else:
            merged[key] = merge_patch(merged.get(key), value, f"{path}.{key}")
    return merged


def expand_sweeps(arms: Mapping[str, Arm], sweeps: Mapping[str, Mapping[str, list[Any]]]) -> dict[str, Arm]:
    """The arms, and for each sweep the product of its values as arms ``{arm}.{key}={value}``."""
    expanded = dict(arms)
    for base, axes in sweeps.items():
        if base not in arms:
            raise ValueError(unknown_name("sweeps", base, arms))
        for values in itertools.product(*axes.values()):
            name, patch = base, arms[base].patch
            for key, value in zip(axes, values, strict=True):
                name += f".{key.rsplit('.', 1)[-1]}={str(value).lower()}"
                nested: Any = value
                for part in reversed(key.split(".")):
                    nested = {part: nested}
                patch = merge_patch(patch, nested, f"sweeps.{base}")
            if not ARM_NAME.fullmatch(name):
                raise ValueError(f"sweeps.{base}: values {show(list(values))} make no arm name; write these arms out")
            if name in expanded:
                raise ValueError(f"sweeps.{base}: makes an arm `{name}`, which is there already; remove one of them")
            role = "control" if arms[base].role == "factorial" else arms[base].role  # a design has each cell once
            expanded[name] = Arm(role=role, pipeline=arms[base].pipeline, **patch)
    return expanded


def resolve_arms(
    method: Method, arms: Mapping[str, Arm], sweeps: Mapping[str, Mapping[str, list[Any]]]
) -> dict[str, ResolvedArm]:
    """Every arm with its complete method; raises ProblemsError naming each arm where a guard fails."""
    base = method.model_dump(mode="json", exclude_unset=True)
    if method.divergence is not None:  # the name is a default, which exclude_unset drops
        base["divergence"] |= {"name": method.divergence.name}
    if method.on_policy is not None:
        base["on_policy"] |= {"name": method.on_policy.name}
    resolved: dict[str, ResolvedArm] = {}
    seen: dict[str, str] = {}
    problems: list[str] = []
    for name, arm in expand_sweeps(arms, sweeps).items():
        if name in RESERVED_NAMES:
            problems.append(f"arms.{name}: this name stands for a reference row of the table; choose another")
            continue
        where = f"arms.{name}" if name in arms else f"sweeps, arm {name}"
        try:
            patched = Method.model_validate(merge_patch(base, arm.patch, where))
        except ValidationError as error:
            problems += problems_of(error, Method, where, extra=("role", "pipeline"))
            continue
        except ValueError as error:
            problems.append(str(error))
            continue
        resolved[name] = ResolvedArm(name=name, role=arm.role, pipeline=arm.pipeline, method=patched)
        key = json.dumps([arm.pipeline, resolved[name].trained_method], sort_keys=True)
        if key in seen:
            problems.append(f"arms.{name}: the same experiment as arms.{seen[key]}; remove one of them")
        seen.setdefault(key, name)
    if problems:
        raise ProblemsError(problems)
    return resolved

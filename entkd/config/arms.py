"""Arms: JSON Merge Patches (RFC 7396) on the experiment's method, with two guards.

Removing what is not there is an error, and so are two arms that resolve to the same experiment.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, model_validator

from entkd.config.base import Settings
from entkd.config.method import Method

Role = Literal["factorial", "baseline", "control"]


class Arm(Settings):
    """One arm as written: a merge patch on the method, and what the arm is in the comparison."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    role: Role = "baseline"
    """`factorial` arms make up the design of the three components; `control` separates an idea from its side effects."""
    pipeline: str = "distill"
    """Which rule trains the arm: `distill`, or a baseline pipeline with a rules file of its own such as `seqkd`."""
    patch: dict[str, Any] = {}
    """The merge patch. In the file its keys stand beside `role` and `pipeline`."""

    @model_validator(mode="before")
    @classmethod
    def _collect_patch(cls, value: Any) -> Any:
        if value is None:
            return {}
        if isinstance(value, Mapping) and "patch" not in value:
            own = {k: v for k, v in value.items() if k in ("role", "pipeline")}
            return own | {"patch": {k: v for k, v in value.items() if k not in own}}
        return value


class ResolvedArm(Settings):
    """One arm after patching: what its training job gets, beside the seed."""

    name: str
    """The arm's name."""
    role: Role
    """What the arm is in the comparison."""
    pipeline: str
    """Which rule trains it."""
    method: Method
    """Its complete method."""


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
            merged[key] = None
        else:
            merged[key] = merge_patch(merged.get(key), value, f"{path}.{key}")
    return merged


def expand_sweeps(arms: Mapping[str, Arm], sweeps: Mapping[str, Mapping[str, list[Any]]]) -> dict[str, Arm]:
    """The arms, and for each sweep the product of its values as arms ``{arm}.{key}={value}``."""
    expanded = dict(arms)
    for base, axes in sweeps.items():
        if base not in arms:
            from entkd.config.errors import unknown_name

            raise ValueError(unknown_name("sweeps", base, arms))
        for values in itertools.product(*axes.values()):
            name, patch = base, arms[base].patch
            for key, value in zip(axes, values, strict=True):
                name += f".{key.rsplit('.', 1)[-1]}={str(value).lower()}"
                nested: Any = value
                for part in reversed(key.split(".")):
                    nested = {part: nested}
                patch = merge_patch(patch, nested, f"sweeps.{base}")
            expanded[name] = Arm(role=arms[base].role, pipeline=arms[base].pipeline, patch=patch)
    return expanded


def resolve_arms(
    method: Method, arms: Mapping[str, Arm], sweeps: Mapping[str, Mapping[str, list[Any]]]
) -> dict[str, ResolvedArm]:
    """Every arm with its complete method; raises ValueError naming the arm where a guard fails."""
    base = method.model_dump(mode="json", exclude_unset=True)
    if method.divergence is not None:  # the name is a default, which exclude_unset drops
        base["divergence"] = method.divergence.model_dump(mode="json", exclude_unset=True) | {"name": method.divergence.name}
    resolved: dict[str, ResolvedArm] = {}
    seen: dict[str, str] = {}
    for name, arm in expand_sweeps(arms, sweeps).items():
        patched = Method.model_validate(merge_patch(base, arm.patch, f"arms.{name}"))
        key = json.dumps([arm.pipeline, patched.model_dump(mode="json")], sort_keys=True)
        if key in seen:
            raise ValueError(f"arms.{name} and arms.{seen[key]} resolve to the same experiment; remove one of them")
        seen[key] = name
        resolved[name] = ResolvedArm(name=name, role=arm.role, pipeline=arm.pipeline, method=patched)
    return resolved

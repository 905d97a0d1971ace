"""Published alternatives, one file each: settings, formula, what it reads of the outputs, and its state.

A file here defines one class derived from `entkd.methods.base.Approach`; nothing else has to be told of it. The files
import no torch: the workflow reads their settings on machines that have none.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field

from entkd.methods.base import Approach

_MODULES = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]

APPROACHES: dict[str, type[Approach]] = {
    cls.model_fields["name"].default: cls for cls in Approach.__subclasses__() if cls.__module__.startswith(__name__)
}
"""Every approach by its name in the settings."""

if TYPE_CHECKING:
    AnyApproach = Any
else:
    AnyApproach = Annotated[Union[tuple(APPROACHES.values())], Field(discriminator="name")]  # noqa: UP007

__all__ = ["APPROACHES", "AnyApproach", "Approach"]

"""What every settings class shares: frozen, closed to unknown keys, documented by its attribute docstrings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer, model_validator


class Settings(BaseModel):
    """A frozen block of settings. Unknown keys, NaN and infinities are refused."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            for key, value in values.items():
                field = cls.model_fields.get(key)
                given = value if isinstance(value, list | tuple) else [value]
                booleans = [entry for entry in given if isinstance(entry, bool)]
                if booleans and field is not None and field.annotation is not bool:
                    says = f"{key}: {str(booleans[0]).lower()} is allowed only where true or false is asked for"
                    raise ValueError(f"{says}{_instead(key, booleans[0], field.annotation)}")
        return values

    def idle(self) -> dict[str, str]:
        """Keys that mean nothing beside the other settings, and beside which."""
        return {}

    @model_validator(mode="after")
    def _every_key_means_something(self) -> Settings:
        # At their defaults such keys are harmless: settings that were written whole are read again.
        for key, why in self.idle().items():
            if getattr(self, key) != type(self).model_fields[key].get_default(call_default_factory=True):
                raise ValueError(f"`{key}` means nothing with `{why}`; remove it (`{key}: null` in an arm)")
        return self


def _instead(key: str, value: bool, annotation: Any) -> str:
    """How a block of settings is switched, where someone wrote true or false for it."""
    kinds = get_args(annotation) or (annotation,)
    if not any(isinstance(kind, type) and issubclass(kind, Settings) for kind in kinds):
        return ""
    return f"; write `{key}: {'{}' if value else 'null'}`"


def all_keys(settings: Settings, path: str = "") -> Iterator[str]:
    """Dotted paths of all keys, also of those that are not written, and those of settings within."""
    for key in type(settings).model_fields:
        value = getattr(settings, key)
        if isinstance(value, Settings):
            yield from all_keys(value, f"{path}{key}.")
        else:
            yield f"{path}{key}"


def idle_keys(settings: Settings, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted paths of all `Settings.idle` keys, those of settings within included, and beside what they are idle."""
    yield from ((f"{path}{key}", why) for key, why in settings.idle().items())
    for key in type(settings).model_fields:
        value = getattr(settings, key)
        if isinstance(value, Settings):
            yield from idle_keys(value, f"{path}{key}.")


class Sparing(Settings):
    """Settings that write only the keys they use.

    What was made by settings of before a key existed has then still the same settings, and is not made again.
    """

    def left_out(self) -> set[str]:
        """Keys that are not written."""
        raise NotImplementedError

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = handler(self)
        return {key: value for key, value in written.items() if key not in self.left_out()}

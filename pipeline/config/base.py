"""The base class of all sections of a configuration, the types of their numbers, and a walk over all keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from pipeline.errors import holds_secret

# Control characters of terminals and of text direction, and halves of surrogate pairs.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_BREAKS = str.maketrans("\n\t", "  ")
_SEVERAL_LINES = ("prompts", "description", "system")  # fields with texts of several lines


class Section(BaseModel):
    """A section of the configuration; it is immutable and refuses unknown keys, tokens and control characters."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `yes` and `true` for a number, which Python takes for 1.

        A validator in the types of numbers would keep their bounds out of the JSON schema.
        """
        if isinstance(value, bool):
            allowed = _types(cls.model_fields[info.field_name or ""].annotation)
            if bool not in allowed and (int in allowed or float in allowed):
                raise ValueError("a number is expected")
        return value

    @field_validator("*")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse tokens and control characters, because values are written to files, terminals and cards."""
        for text in _texts(value):
            if holds_secret(text):
                raise ValueError("it contains a token, which would be published. Try: an environment variable for it")
            if _CONTROLS.search(text.translate(_BREAKS) if info.field_name in _SEVERAL_LINES else text):
                raise ValueError("it contains a control character or half a character")
        return value


def _texts(value: Any) -> list[str]:
    """Return the texts in a value, but not those of a section, which checks its own."""
    values = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str)]


def fields(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield the dotted key and the field of every key below a section, in the order of the schema."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", field
        for below in sections_in(field.annotation):
            yield from fields(below, f"{prefix}{name}.")


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that a field's type names, such as `Data | None` or `list[VariantSpec]`."""
    return [kind for kind in _types(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _types(annotation: Any) -> list[Any]:
    """Return the plain types in an annotation, such as int and None of `Count | None`."""
    parts = get_args(annotation)
    return [kind for part in parts for kind in _types(part)] if parts else [annotation]


Whole = Annotated[int, Field(lt=2**31)]
Real = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[Whole, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Rate = Annotated[Real, Field(gt=0, le=1)]

"""The base class of all sections of a configuration, and the types of their numbers."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from pipeline.errors import holds_secret

# Control characters of terminals and of text direction, and halves of surrogate pairs.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_BREAKS = str.maketrans("\n\t", "  ")


class Section(BaseModel):
    """A section of the configuration; it is immutable and refuses unknown keys, tokens and control characters."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())

    @field_validator("*")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse tokens and control characters, because values are written to files, terminals and cards."""
        for text in _texts(value):
            if holds_secret(text):
                raise ValueError(
                    "it contains a token, which would be published. Try: set HF_TOKEN or TRACKIO_WRITE_TOKEN"
                )
            if _CONTROLS.search(text if info.field_name != "prompts" else text.translate(_BREAKS)):
                raise ValueError("it contains a control character or half a character")
        return value


def _texts(value: Any) -> list[str]:
    """Return the texts in a value, but not those of a section, which checks its own."""
    values = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str)]


def _not_bool(value: Any) -> Any:
    """Refuse `yes` and `true`, which Python takes for numbers."""
    if isinstance(value, bool):
        raise ValueError("a number is expected")
    return value


Whole = Annotated[int, BeforeValidator(_not_bool), Field(lt=2**31)]
Real = Annotated[float, BeforeValidator(_not_bool), Field(allow_inf_nan=False)]
Count = Annotated[Whole, Field(ge=1)]
Seed = Annotated[int, BeforeValidator(_not_bool), Field(ge=0, lt=2**32)]
Rate = Annotated[Real, Field(gt=0, le=1)]

"""What the configuration's sections are made of: a strict base class, and problems in words.

Left out: the sections themselves (`config/schema.py`, and beside the methods `methods/settings.py`)
and reading them from files (`config/reading.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

_Number = TypeVar("_Number", int, float)
AtLeastZero = Annotated[_Number, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Name = Annotated[str, Field(min_length=1)]


def _auto_or_at_least_one(value: Any) -> Any:
    if value == "auto" or (type(value) is int and value >= 1):
        return value
    raise problem(value, 'must be "auto" or an integer of at least 1')


# One validator instead of the union's two, each of which would report its own problem.
Batch = Annotated[int | Literal["auto"], BeforeValidator(_auto_or_at_least_one)]
"""How many at once; "auto": as many as fit into memory (`memory/advice.py`)."""


class ResumeMark:
    """Marks a field that may differ between a run and its continuation."""


FREE_ON_RESUME = ResumeMark()
"""It decides where, when and with how much memory the run works, not what it computes."""
RECORDED_ON_RESUME = ResumeMark()
"""It steers what is computed from then on, and the run's record says when it was changed."""


class Section(BaseModel):
    """A part of the configuration; every field carries a sentence, from which help is made."""

    # Strict: "3", 3.0 and true are not integers. Defaults are validated too, because a default
    # may contradict a field that the user did set.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )


def section_of(field: FieldInfo) -> tuple[type[BaseModel] | None, bool]:
    """The section that a field holds, if any, and whether it holds a list of them."""
    is_list = get_origin(field.annotation) is list
    annotation = get_args(field.annotation)[0] if is_list else field.annotation
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, is_list
    return None, False


def marked(
    section: type[BaseModel], mark: ResumeMark, prefix: tuple[str, ...] = ()
) -> Iterator[tuple[str, ...]]:
    """The keys of a section's fields, and of the sections in it, that have a mark."""
    for name, field in section.model_fields.items():
        inner, is_list = section_of(field)
        if mark in field.metadata:
            yield (*prefix, name)
        elif inner is not None and not is_list:
            yield from marked(inner, mark, (*prefix, name))


def problem(value: object, allowed: str, field: str = "", beside: str = "") -> PydanticCustomError:
    """An error about a value, for validators to raise.

    Args:
        value: what was given.
        allowed: what must be.
        field: the field inside the validated one that is at fault.
        beside: the field of the same section, in place of the validated one, that is at fault.
    """
    message = f"got {shown(value)}; {allowed}"
    # Braces would be taken for placeholders in a template; as a context value they are not.
    context = {"message": message, "field": field, "beside": beside}
    return PydanticCustomError("inconsistent", "{message}", context)


def shown(value: object) -> str:
    """A value as it is written in YAML, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 100 else f"{text[:97]}..."

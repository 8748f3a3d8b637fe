"""The configuration's keys and problems in words.

Left out: the configuration itself (`schema.py`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from treegrpo.config.schema import Config, config_class
from treegrpo.errors import UserError, together
from treegrpo.methods.registry import BUILT_IN
from treegrpo.settings import section_of, shown


class ConfigError(UserError):
    """The configuration cannot be used; the message lists every problem, one per line.

    Attributes:
        problems: each of them.
        rest: the configuration with the defaults of the keys that are wrong; None: it is not known.
        faulty: the sections that these keys are in.
    """

    def __init__(
        self, *problems: str, rest: Config | None = None, faulty: Iterable[str] = ()
    ) -> None:
        message = problems[0]
        if len(problems) > 1:
            message = together("the configuration has", problems)
        super().__init__(message)
        self.problems, self.rest, self.faulty = problems, rest, frozenset(faulty)


def describe_fields() -> Iterator[tuple[str, str, str]]:
    """(key, default as YAML, sentence with the choices) of every field, in order.

    Those of all built-in methods; where only some have a field, its sentence ends with their names,
    and where one has another default, with that.
    """
    every = dict(_fields(Config))
    for method in BUILT_IN:
        every |= {k: v for k, v in _fields(config_class(method)).items() if k not in every}
    sections = list(Config.model_fields)
    for key in sorted(every, key=lambda key: sections.index(key.partition(".")[0])):
        default, sentence = every[key]
        methods = methods_with(key)
        of = "" if len(methods) == len(BUILT_IN) else f" Of {', '.join(methods)}."
        others = (f"{value} in {name}" for name, value in methods.items() if value != default)
        if key != "rollout.method":
            of += "".join(f" The default is {other}." for other in others)
        yield key, default, sentence + of


def methods_with(key: str) -> dict[str, str]:
    """The built-in methods that have a key, and its default in each."""
    fields = {method: _fields(config_class(method)) for method in BUILT_IN}
    return {method: of[key][0] for method, of in fields.items() if key in of}


@cache
def _fields(section: type[BaseModel], prefix: str = "") -> dict[str, tuple[str, str]]:
    """Key to default and sentence."""
    found: dict[str, tuple[str, str]] = {}
    for name, field in section.model_fields.items():
        inner, is_list = section_of(field)
        if inner is not None:
            found |= _fields(inner, f"{prefix}{name}.{'N.' if is_list else ''}")
            continue
        default = (
            "required"
            if field.is_required()
            else shown(field.get_default(call_default_factory=True))
        )
        sentence = " ".join((field.description or "").split())
        if get_origin(field.annotation) is Literal:
            sentence += f" One of {', '.join(map(str, get_args(field.annotation)))}."
        found[f"{prefix}{name}"] = default, sentence
    return found


def in_words(details: ErrorDetails, config: type[Config]) -> str:
    """A problem that pydantic found in such a configuration, as a line."""
    kind, context = details["type"], details.get("ctx", {})
    location = [str(key) for key in details["loc"]]
    if kind == "inconsistent":
        if context["field"]:
            location.append(context["field"])
        if context["beside"]:
            location[-1] = context["beside"]
        return f"{'.'.join(location)}: {context['message']}"
    key_path = ".".join(location)
    if kind == "extra_forbidden":
        methods = [*methods_with(key_path)]
        if methods:
            listed = " and ".join(filter(None, [", ".join(methods[:-1]), methods[-1]]))
            mine = config.model_fields["rollout"].get_default(call_default_factory=True).method
            return (
                f"{key_path}: {mine} has no such setting; "
                f"{listed} {'has' if len(methods) == 1 else 'have'}"
            )
        return f"{key_path}: unknown key; {_suggest(location, config)}"
    if kind == "missing":
        return f"{key_path}: missing; must be given"
    allowed = {
        "greater_than": "must be greater than {gt}",
        "greater_than_equal": "must be at least {ge}",
        "less_than": "must be less than {lt}",
        "less_than_equal": "must be at most {le}",
        "int_type": "must be an integer",
        "int_from_float": "must be an integer",
        "float_type": "must be a number",
        "finite_number": "must be finite",
        "bool_type": "must be true or false",
        "string_type": "must be text",
        "path_type": "must be a path",
        "list_type": "must be a list",
        "model_type": "must be keys and values",
        "literal_error": "must be one of {expected}",
        "too_short": "must have at least {min_length} element",
        "string_too_short": "must not be empty",
    }.get(kind, details["msg"].replace("{", "{{").replace("}", "}}"))
    words = {
        name: int(value) if isinstance(value, float) and value.is_integer() else value
        for name, value in context.items()
    }
    if kind == "literal_error":
        words["expected"] = str(context["expected"]).replace("'", '"').replace(" or ", ", ")
    return f"{key_path}: got {shown(details['input'])}; {allowed.format(**words)}"


def _suggest(location: list[str], config: type[Config]) -> str:
    *parents, key = location
    section: type[BaseModel] = config
    for parent in parents:
        if not parent.isdecimal():
            inner, _ = section_of(section.model_fields[parent])
            section = inner or section
    siblings = list(section.model_fields)
    near = difflib.get_close_matches(key, siblings, n=1)
    # A right name in the wrong section is as common a slip as a wrong name.
    elsewhere = [path for path, _, _ in describe_fields() if path.split(".")[-1] == key]
    if near or elsewhere:
        return f'did you mean "{[*elsewhere, *near][0]}"?'
    return f"must be one of {', '.join(siblings)}"

"""Reading a configuration: defaults, changed by a YAML file, changed by overrides; and writing it.

Left out: what the keys mean (`schema.py`) and problems in words (`wording.py`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from treegrpo.config.schema import Config, config_class
from treegrpo.config.wording import ConfigError, in_words
from treegrpo.errors import UserError
from treegrpo.methods.registry import DEFAULT
from treegrpo.settings import shown
from treegrpo.textfile import read_utf8

METHOD_SECTIONS = ("rollout", "advantage", "objective")


def load_config(
    path: Path | None, overrides: list[str], *, defaults: Mapping[str, Any] | None = None
) -> Config:
    """The defaults, changed by a YAML file, changed by overrides.

    Where an override names another method than the file does, settings in the file that only the
    file's method has are left behind.

    Args:
        path: the YAML file; None: the defaults alone. A list in it replaces the default list.
        overrides: `key.path=value` each, see `parse_argument`; a number addresses a list's element.
        defaults: by `key.path`, in place of the method's own.

    Raises:
        ConfigError: lists every problem with its key, value and what is allowed.
    """
    given = {} if path is None else _read_mapping(path)
    of_file = _method(given)
    data, problems = _with(of_file, given, overrides, defaults)
    method = _method(data)
    if method != of_file:
        own = _without_own(of_file, method, given)
        data, problems = _with(method, own, overrides, defaults)
    return validated(data, problems)


def method_in(path: Path | None) -> str:
    """The name of the method that a configuration file is for.

    Raises:
        ConfigError: the file cannot be read.
    """
    return _method({} if path is None else _read_mapping(path))


def has_setting(method: str, key: str) -> bool:
    """Whether a key of the sections that belong to the method is one of its; others always are."""
    section, _, name = key.partition(".")
    if section not in METHOD_SECTIONS:
        return True
    return name in getattr(_class_of(method).model_fields[section].annotation, "model_fields", {})


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """A configuration with other values, by `key.path`.

    Raises:
        ConfigError: they do not go with the rest.
    """
    data = config.model_dump(mode="json")
    for key_path, value in changes.items():
        _set(data, key_path.split("."), value)
    return validated(data)


def validated(data: dict[str, Any], problems: Sequence[str] = ()) -> Config:
    """The configuration that a whole tree of values makes.

    Args:
        problems: that the tree had before.

    Raises:
        ConfigError: lists every problem.
    """
    method, config, found = _method(data), Config, list(problems)
    faulty: set[str] = set()
    try:
        config = config_class(method)
    except UserError as error:
        found.append(f"rollout.method: got {shown(method)}; {error}")
        # What they should hold is not known.
        faulty.update(METHOD_SECTIONS)
        data = {name: value for name, value in data.items() if name not in METHOD_SECTIONS}
    try:
        result = config.model_validate(data)
    except ValidationError as error:
        found += [in_words(details, config) for details in error.errors()]
        faulty.update(str(details["loc"][0]) for details in error.errors())
        raise ConfigError(*found, rest=_rest(config, data, error), faulty=faulty) from None
    if found:
        raise ConfigError(*found, rest=result, faulty=faulty)
    return result


def _keys(section: dict[Any, Any] | list[Any]) -> Iterable[Any]:
    return section if isinstance(section, dict) else range(len(section))


def _rest(config: type[Config], data: dict[str, Any], error: ValidationError) -> Config | None:
    """The configuration without the keys, and then without the sections, that are wrong."""
    data = copy.deepcopy(data)
    for details in error.errors():
        section: Any = data
        last, *rest = details["loc"]
        while rest and isinstance(section, dict | list) and last in _keys(section):
            inner: Any = section
            section, (last, *rest) = inner[last], rest
        if isinstance(section, dict) and section is not data and not rest:
            section.pop(last, None)
    for _ in range(2):  # keys that contradict each other are told of their section
        try:
            return config.model_validate(data)
        except ValidationError as left:
            for details in left.errors():
                data.pop(str(details["loc"][0]), None)
    return None


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.dump(
        config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True
    )


# --- the method decides which keys there are ---


def _method(data: dict[Any, Any]) -> str:
    rollout = data.get("rollout")
    method = rollout.get("method", DEFAULT) if isinstance(rollout, dict) else DEFAULT
    return method if isinstance(method, str) else DEFAULT


def _class_of(method: str) -> type[Config]:
    """The configuration of a method; of the default one where there is none of that name."""
    try:
        return config_class(method)
    except UserError:
        return Config


def _with(
    method: str,
    given: dict[Any, Any],
    overrides: list[str],
    defaults: Mapping[str, Any] | None,
) -> tuple[dict[Any, Any], list[str]]:
    """The values, and what is wrong with overrides."""
    config, problems = _class_of(method), []
    data = config().model_dump(mode="json")
    for key_path, value in (defaults or {}).items():
        _set(data, key_path.split("."), value)
    _merge(data, given)
    for override in overrides:
        try:
            _apply_override(data, override, config)
        except ConfigError as error:
            problems.append(str(error))
    return data, problems


def _without_own(before: str, after: str, given: dict[Any, Any]) -> dict[Any, Any]:
    """What a file gives, without the settings that one method has and the other one has not."""
    result = copy.deepcopy(given)
    for name in METHOD_SECTIONS:
        left, kept = (_class_of(method).model_fields[name].annotation for method in (before, after))
        own = getattr(left, "model_fields", {}).keys() - getattr(kept, "model_fields", {}).keys()
        if isinstance(result.get(name), dict):
            result[name] = {key: value for key, value in result[name].items() if key not in own}
    return result


# --- reading YAML ---


class _Loader(yaml.SafeLoader):
    """Safe YAML, in which 1e-4 is a number and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f'key "{key.value}" is given twice', problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _ArgumentLoader(_Loader):
    """For an argument, which is a value and no document: in YAML without comments."""

    def scan_to_next_token(self) -> None:
        if re.compile(r"\s*#").match(self.buffer, self.pointer):
            raise yaml.MarkedYAMLError(
                problem='"#" would begin a comment; quote the text that it is in',
                problem_mark=self.get_mark(),
            )
        super().scan_to_next_token()


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would read as a number."""


# YAML 1.1 asks for a point and a signed exponent, and reads "1e-4" as text.
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def parse_yaml(text: str, source: str, loader: type[_Loader] = _Loader) -> Any:
    """A YAML value, read as configurations are: 1e-4 is a number, a key given twice an error.

    Args:
        source: what the text is, to begin messages with.
        loader: how it is read.

    Raises:
        ConfigError: it is not valid; says where.
    """
    try:
        return yaml.load(text, Loader=loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{source}{where}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from None


def parse_argument(text: str, source: str, kinds: Sequence[Any] = ()) -> Any:
    """A value given on the command line, in YAML: [a, b] is a list, 1e-4 a number.

    What takes text gets the argument as it stands, unless all of it is in quotes, or it is null and
    may be. Elsewhere, what is no YAML without comments is text as well.

    Args:
        source: what the text is, to begin messages with.
        kinds: the types that take it; none: any.

    Raises:
        ConfigError: a list or mapping in it is not valid YAML; says where.
    """
    # A number beside words, such as "auto", is still a number.
    takes_text = any(_is_text(kind) for kind in kinds) and int not in kinds
    try:
        node = yaml.compose(text, Loader=_ArgumentLoader)
    except yaml.YAMLError:
        if takes_text or not text.lstrip().startswith(("[", "{", "'", '"')):
            return text
        node = None  # to be refused
    if takes_text:
        if isinstance(node, yaml.ScalarNode):
            if node.style in ("'", '"'):
                return node.value
            if NoneType in kinds and node.tag == "tag:yaml.org,2002:null":
                return None
        return text
    # "a: b" and "- a" may be meant as text.
    if not kinds and isinstance(node, yaml.CollectionNode) and not node.flow_style:
        return text
    return parse_yaml(text, source, _ArgumentLoader)


def _is_text(kind: Any) -> bool:
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    return kind in (str, Path) or any(isinstance(choice, str) for choice in choices)


def _kinds(section: type[BaseModel], keys: Sequence[str]) -> list[Any]:
    """The types that the field at a key path takes; none where that is not known."""
    kinds: list[Any] = [section]
    for key in keys:
        following: list[Any] = []
        for kind in kinds:
            if get_origin(kind) is list:
                following += _alternatives(get_args(kind)[0])
            elif isinstance(kind, type) and issubclass(kind, BaseModel):
                field = kind.model_fields.get(key)
                following += [] if field is None else _alternatives(field.annotation)
        kinds = following
    return [] if Any in kinds else kinds


def _alternatives(kind: Any) -> Iterator[Any]:
    if get_origin(kind) is Annotated:
        yield from _alternatives(get_args(kind)[0])
    elif get_origin(kind) in (Union, UnionType):
        for each in get_args(kind):
            yield from _alternatives(each)
    else:
        yield kind


def _read_mapping(path: Path) -> dict[Any, Any]:
    text = read_utf8(path, "configuration file", ConfigError)
    data = parse_yaml(text, f"configuration file {path}")
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"configuration file {path}: got {shown(data)}; must be keys and values")
    return data


def _merge(base: dict[Any, Any], changes: dict[Any, Any]) -> None:
    for key, value in changes.items():
        if isinstance(base.get(key), dict) and (value is None or isinstance(value, dict)):
            # A section with nothing in it (all of it commented out) changes nothing.
            _merge(base[key], value or {})
        else:
            base[key] = copy.deepcopy(value)


def _apply_override(data: dict[Any, Any], override: str, config: type[Config]) -> None:
    key_path, equals, text = override.partition("=")
    keys = key_path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f'override "{override}": must be key.path=value')
    value = parse_argument(text, f'override "{override}"', _kinds(config, keys))
    _set(data, keys, value)


def _set(data: dict[Any, Any], keys: list[str], value: Any) -> None:
    target: Any = data
    *path, last = keys
    for depth, key in enumerate(keys):
        here = ".".join(keys[:depth])
        if isinstance(target, list):
            if not key.isdecimal() or int(key) >= len(target):
                allowed = f"must be 0 to {len(target) - 1}" if target else "the list is empty"
                raise ConfigError(f"{here}.{key}: no such element; {allowed}")
        elif not isinstance(target, dict):
            raise ConfigError(f"{here}: has no key {shown(key)}; its value is {shown(target)}")
        if depth < len(path):
            target = target[int(key)] if isinstance(target, list) else target.setdefault(key, {})
    if isinstance(target, list):
        target[int(last)] = value
    else:
        _merge(target, {last: value})

"""What is compared: methods, variants from a file and values of a sweep, and their configurations.

Left out: seeds and numbers of iterations (`study.py`).
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from treegrpo.config import (
    Config,
    describe_fields,
    has_setting,
    load_config,
    method_in,
    parse_yaml,
    variants_file,
)
from treegrpo.errors import UserError
from treegrpo.methods.registry import BUILT_IN, find_method
from treegrpo.settings import shown
from treegrpo.textfile import read_utf8

METHOD_KEY = "rollout.method"

# What the comparison decides itself, and what is given to it instead.
_DECIDED = {
    "output": "use --output",
    "train.seed": "use --first-seed and --seeds",
    "train.time_limit_minutes": "use --budget, such as --budget 20minutes",
    "evaluation.every": "every run is measured at about 8 points",
}
_COMPARED = ("rollout", "advantage", "objective", "train")


@dataclass(frozen=True)
class Shared:
    """The configuration that all entries start from.

    Attributes:
        file: None: the default one.
        changes: `key.path=value` of the command line; one that a method has not is not its.
    """

    file: Path | None = None
    changes: tuple[str, ...] = ()

    @property
    def method(self) -> str:
        """The configuration's own."""
        named = [change for change in self.changes if change.startswith(f"{METHOD_KEY}=")]
        return named[-1].partition("=")[2] if named else method_in(self.file)


@dataclass(frozen=True)
class Entry:
    """One thing that is compared.

    Attributes:
        label: unique among them.
        changes: `key.path=value` of its variant and its place in the sweep.
    """

    label: str
    method: str
    changes: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """A name for a folder."""
        return re.sub(r"[^\w.=-]+", "-", self.label)


@dataclass(frozen=True)
class Grid:
    """Values of one key, as text."""

    key: str
    values: tuple[str, ...]

    @property
    def changes(self) -> list[str]:
        """A change of the configuration per value."""
        return [f"{self.key}={value}" for value in self.values]

    def at_an_end(self, chosen: Iterable[str]) -> bool:
        """Whether the change that was chosen has the least or the largest of values in order."""
        try:
            numbers = [float(value) for value in self.values]
        except ValueError:
            return False  # words have no order
        ends = {numbers.index(min(numbers)), numbers.index(max(numbers))}
        return any(self.changes[end] in chosen for end in ends)


def read_grids(option: str, texts: Sequence[str]) -> tuple[Grid, ...]:
    """The grids that an option was given, KEY=VALUE,VALUE each; brackets hold a value together.

    Raises:
        UserError: names the option and what is wrong.
    """
    grids = []
    for text in texts:
        key, equals, listed = text.partition("=")
        values = tuple(part.strip() for part in re.split(r",(?![^\[{]*[\]}])", listed))
        if not equals or not all(values):
            raise UserError(f"{option}: got {text!r}; must be KEY=VALUE,VALUE,...")
        if len(set(values)) < max(len(values), 2):
            raise UserError(f"{option} {key}: got {listed}; must be at least two different values")
        check_key(f"{option} {key}", key)
        if key == METHOD_KEY:
            raise UserError(f"{option} {key}: methods are compared by --methods")
        grids.append(Grid(key, values))
    keys = [grid.key for grid in grids]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"{option} {key}: is given {keys.count(key)} times; must be once")
    return tuple(grids)


def check_key(field: str, key: str) -> None:
    """Refuse a key in which entries may not differ.

    Raises:
        UserError: names the field.
    """
    if key in _DECIDED:
        raise UserError(f"{field}: is decided by the comparison; {_DECIDED[key]}")
    if key == "train.iterations":
        raise UserError(f"{field}: is decided by the budget; use --budget")
    known = [name for name, _, _ in describe_fields()]
    section = key.partition(".")[0]
    if section not in _COMPARED:
        near = difflib.get_close_matches(key, known, n=1)
        if section in {name.partition(".")[0] for name in known}:
            allowed = "a comparison is on one model, and on the same rewards and prompts"
        else:
            allowed = f"unknown key{f'; did you mean {near[0]}?' if near else ''}"
        raise UserError(f"{field}: {allowed}; must be a key of {', '.join(_COMPARED)}")


def read_changes(changes: Sequence[str]) -> tuple[str, ...]:
    """The changes of the command line, none of which the comparison decides itself.

    Raises:
        UserError: names the key.
    """
    for change in changes:
        key = change.partition("=")[0]
        if key in _DECIDED:
            raise UserError(f"{key}: is decided by the comparison; {_DECIDED[key]}")
    return tuple(changes)


def read_methods(listed: str | None) -> list[str]:
    """The methods of `--methods a,b`; none: not given.

    Raises:
        UserError: there is no such method, or it is given twice.
    """
    names = [name.strip() for name in listed.split(",")] if listed else []
    for name in names:
        try:
            find_method(name)
        except UserError as error:
            raise UserError(f"--methods: got {shown(name)}; {error}") from None
        if names.count(name) > 1:
            raise UserError(f"--methods: {name} is given {names.count(name)} times; must be once")
    return names


def read_variants(name: str | None) -> dict[str, tuple[str, ...]]:
    """Changes by name, from a file of `name: {key.path: value, ...}` or an ablation of that name.

    None: not given.

    Raises:
        UserError: names the file, the variant and what is wrong.
    """
    if name is None:
        return {}
    file = variants_file(name)
    given = parse_yaml(read_utf8(file, "--variants:", UserError), f"--variants: {file}")
    form = "must be variants by name, such as wide: {rollout.branching: 4}"
    if not isinstance(given, dict) or not given:
        raise UserError(f"--variants: {file}: got {shown(given)}; {form}")
    variants = {}
    for variant, settings in given.items():
        if not isinstance(settings, dict):
            raise UserError(f"--variants: {file}: {variant}: got {shown(settings)}; {form}")
        for key in settings:
            check_key(f"--variants: {file}: {variant}: {key}", str(key))
        variants[str(variant)] = tuple(as_change(key, value) for key, value in settings.items())
    return variants


def as_change(key: str, value: Any) -> str:
    """`key.path=value`, which reads back as the same value."""
    return f"{key}={json.dumps(value)}"


def make_entries(
    shared: Shared,
    methods: Sequence[str],
    variants: Mapping[str, tuple[str, ...]],
    sweeps: Sequence[Grid],
) -> tuple[Entry, ...]:
    """Every method with every variant at every point of the sweeps.

    Without any of them all built-in methods; with variants or sweeps alone, the configuration's.

    Raises:
        UserError: a variant names a method beside `--methods`, or two entries would be alike.
    """
    alone = bool(variants or sweeps)
    names = list(methods) or ([shared.method] if alone else list(BUILT_IN))
    entries = []
    points = product(*(grid.changes for grid in sweeps))
    for point in list(points):
        for variant, changes in variants.items() or {"": ()}.items():
            own = [change for change in changes if change.startswith(f"{METHOD_KEY}=")]
            if own and methods:
                raise UserError(f"--methods: variant {variant} has a {METHOD_KEY} of its own")
            for name in [json.loads(own[-1].partition("=")[2])] if own else names:
                parts = [name] if len(names) > 1 or not alone else []
                parts += [variant, *(change.rpartition(".")[2] for change in point)]
                entries.append(Entry(" ".join(filter(None, parts)), name, (*changes, *point)))
    folders = [entry.folder for entry in entries]
    for entry in entries:
        if folders.count(entry.folder) > 1:
            raise UserError(f"--variants: {entry.label} is there twice; give another name")
    return tuple(entries)


def configure(shared: Shared, entry: Entry, changes: Sequence[str] = (), *, flow: bool) -> Config:
    """An entry's configuration.

    In rising order: defaults, what the method was published with, the file, the command line, the
    entry's own changes, and further ones. A file describes its own method: of another, what was
    published stands above it.

    Args:
        flow: of a flow model, else of a diffusion model.

    Raises:
        ConfigError: it is none.
    """
    published = find_method(entry.method).published(flow=flow)
    ours = [c for c in shared.changes if has_setting(entry.method, c.partition("=")[0])]
    given = [*ours, *entry.changes, *changes, f"{METHOD_KEY}={entry.method}"]
    if shared.file is not None and method_in(shared.file) != entry.method:
        above = [as_change(key, value) for key, value in published.items()]
        return load_config(shared.file, [*above, *given])
    return load_config(shared.file, given, defaults=published)


def check_changes(shared: Shared, entries: Sequence[Entry]) -> None:
    """Refuse a change of the command line that no entry's method has.

    Raises:
        ConfigError: names the key and its nearest.
    """
    for change in shared.changes:
        key = change.partition("=")[0]
        if not any(has_setting(entry.method, key) for entry in entries):
            load_config(shared.file, [f"{METHOD_KEY}={entries[0].method}", change])

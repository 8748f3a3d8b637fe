"""Cuts every key of the configuration loose and shows which row of test_wiring.py notices.

    python tests/cut_keys.py              every key: about a minute
    python tests/cut_keys.py train.seed   these keys

A key is cut by making its field answer with its default, whatever the configuration says: as if
the code that reads it had the default written in its place. Exits with 1 where none of a key's
rows fails.

Left out: what a row looks at (test_wiring.py).
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

import pytest
from pydantic import BaseModel
from test_wiring import ROWS, Row, check, quick_collections
from wiring import Observer, make_files

from treegrpo.config import Config
from treegrpo.report.run import TrainingResult
from treegrpo.training.loop import train

WITHOUT_DEFAULT = "wiring:brightness"  # a reward's name


def section_of(config: Config, key: str) -> BaseModel:
    """The part of a configuration that holds a key."""
    section: Any = config
    for name in key.split(".")[:-1]:
        section = section[0] if name == "N" else getattr(section, name)
    assert isinstance(section, BaseModel)
    return section


def _answer(value: Any, section: BaseModel) -> Any:
    return value


@contextmanager
def cut(key: str, config: Config) -> Iterator[None]:
    """The key answers with its default, or, where it has none, with the same whatever is given."""
    section, name = section_of(config, key), key.split(".")[-1]
    field, section_class = type(section).model_fields[name], type(section)
    default = (
        WITHOUT_DEFAULT if field.is_required() else field.get_default(call_default_factory=True)
    )
    # A property goes before what an instance holds.
    setattr(section_class, name, property(partial(_answer, default)))
    try:
        yield
    finally:
        delattr(section_class, name)


def notices(row: Row, files: Path, runs: Path) -> str:
    """How the row fails with its key cut; "" where it does not."""

    def train_without(config: Config) -> TrainingResult:
        with cut(row.key, config):
            return train(config)

    try:
        check(row, Observer(files, runs, train_without))
    except (AssertionError, pytest.fail.Exception) as error:
        return str(error).splitlines()[0]
    except Exception as error:  # a cut key may break a run; that is noticed too
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def main(wanted: list[str]) -> int:
    escaped = []
    with tempfile.TemporaryDirectory() as folder, quick_collections():
        os.environ["TREEGRPO_CACHE"] = str(Path(folder) / "cache")
        make_files(Path(folder))
        for key in dict.fromkeys(row.key for row in ROWS):
            if wanted and key not in wanted:
                continue
            found: dict[str, str] = {}
            for number, row in enumerate(row for row in ROWS if row.key == key):
                runs = Path(folder) / "runs" / key / str(number)
                found[row.case or "its row"] = notices(row, Path(folder), runs)
            caught = {case: how for case, how in found.items() if how}
            missed = [case for case in found if case not in caught]
            if not caught:
                escaped.append(key)
            print(f"{key}: {f'caught by {len(caught)}' if caught else 'NOT CAUGHT'}", flush=True)
            for case, how in caught.items():
                print(f"    {case}: {how}")
            if missed:
                print(f"    unnoticed by: {', '.join(missed)}")
    print(f"not caught: {', '.join(escaped) or 'none'}")
    return 1 if escaped else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

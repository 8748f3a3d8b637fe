"""A run's folder: the names of what is in it, refusals of what is there already, and its records.

Left out: the state that a run continues from (`checkpoint.py`), and who writes the records
(`tracking.py`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from treegrpo.config import Config, load_config, to_yaml
from treegrpo.errors import UserError
from treegrpo.miniature import EMBEDDED
from treegrpo.settings import FREE_ON_RESUME, RECORDED_ON_RESUME, marked
from treegrpo.versions import versions

STATE_FILE = "checkpoint.pt"
EARLIER_STATE_FILE = "checkpoint.earlier.pt"
CONFIG_FILE = "config.yaml"
VERSIONS_FILE = "versions.json"
DEPENDENCIES_FILE = "dependencies.json"
METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
MODEL_FOLDER = "model"
FAILED_REWARD_FOLDER = "failed_reward"
TENSORBOARD_FOLDER = "tensorboard"
SUMMARY_FILE = "summary.json"
PICTURE_FILES = ("before_after.png", "curve.png")

# All that a run writes into its folder: what `--overwrite` replaces. Nothing else is touched.
_AT_THE_START = (CONFIG_FILE, VERSIONS_FILE, DEPENDENCIES_FILE, TENSORBOARD_FOLDER)
_WRITTEN = (
    *_AT_THE_START,
    STATE_FILE,
    STATE_FILE + ".partial",
    EARLIER_STATE_FILE,
    METRICS_FILE,
    EVALUATIONS_FILE,
    MODEL_FOLDER,
    FAILED_REWARD_FOLDER,
    SUMMARY_FILE,
    *PICTURE_FILES,
)

# Options that say how a reward is asked, not what it answers: a server may have moved.
FREE_OPTIONS = {
    "batch_size",
    "concurrency",
    "device",
    "give_up_after_seconds",
    "headers",
    "threads",
    "timeout_seconds",
    "token_env",
    "token_header",
    "url",
}


# Keys whose values may be files or folders.
_FILES = (
    ("model", "path"),
    ("model", "lora_path"),
    ("prompts", "train"),
    ("prompts", "held_out"),
)


class RunError(UserError):
    """A run's folder that cannot be used as asked."""


def check_run_folder(config: Config, *, resume: bool, overwrite: bool) -> None:
    """Refuse an output folder that cannot be used as asked; changes nothing.

    Raises:
        RunError: the folder holds something and neither `resume` nor `overwrite` was given; it
            holds something that is no run; there is nothing to resume; or the run to resume was
            made with other settings.
    """
    folder = config.output
    if resume and overwrite:
        raise RunError("--resume and --overwrite: give one of them")
    check_is_folder(folder)
    if resume:
        if not (folder / STATE_FILE).is_file():
            raise RunError(f"output: {folder} holds no run to resume (no {STATE_FILE})")
        _check_same_settings(folder, config)
    elif folder.is_dir() and any(folder.iterdir()):
        # A configuration alone may be the user's own.
        if not all((folder / name).is_file() for name in (CONFIG_FILE, VERSIONS_FILE)):
            raise RunError(
                f"output: {folder} is not empty and holds no run, so nothing in it is "
                "replaced; choose another folder with output=FOLDER"
            )
        # A run that ended before its first evaluation has nothing to lose.
        begun = any((folder / name).exists() for name in _WRITTEN if name not in _AT_THE_START)
        if begun and not overwrite:
            raise RunError(
                f"output: {folder} already holds a run; continue it with --resume, replace "
                "it with --overwrite, or choose another folder with output=FOLDER"
            )
        for section, key in _FILES:
            given = getattr(getattr(config, section), key) or "miniature"
            path = Path(given).expanduser().resolve()
            if any(path.is_relative_to((folder / name).resolve()) for name in _WRITTEN):
                raise RunError(
                    f"{section}.{key}: {given} belongs to the run in {folder}, which would be "
                    "replaced; choose another folder with output=FOLDER"
                )


def check_is_folder(folder: Path) -> None:
    """Refuse an output, with a RunError, that is a file."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"output: {folder} is a file; must be a folder")


def check_dependencies(config: Config, found: Mapping[str, str]) -> None:
    """Refuse to resume a run upon other files than it began with.

    Args:
        found: their digests now, by name. What the run has not recorded may be anything.

    Raises:
        RunError: names those that differ.
    """
    path = config.output / DEPENDENCIES_FILE
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    changed = [name for name, digest in before.items() if found.get(name) != digest]
    if changed:
        raise RunError(
            f"output: the run in {config.output} began with other files, so it cannot go on as it "
            "was; bring these back, or start another run\n  "
            + "\n  ".join(f"{name}: {'changed' if name in found else 'gone'}" for name in changed)
        )


def prepare_folder(
    config: Config,
    *,
    resume: bool,
    overwrite: bool,
    iteration: int = 0,
    dependencies: Mapping[str, str] | None = None,
) -> None:
    """Make the run's folder (anew with `overwrite`) and write its configuration.

    Args:
        dependencies: digests of files, for `check_dependencies`.
        iteration: that a resumed run goes on with, for the record of changed settings.

    Raises:
        RunError: as `check_run_folder`.
    """
    check_run_folder(config, resume=resume, overwrite=overwrite)
    notes = _notes(config, iteration) if resume else ""
    if not resume:
        for name in _WRITTEN:
            path = config.output / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    config.output.mkdir(parents=True, exist_ok=True)
    write_atomically(config.output / CONFIG_FILE, to_yaml(located(config)) + notes)
    write_atomically(config.output / VERSIONS_FILE, json.dumps(versions(), indent=2) + "\n")
    if dependencies is not None:
        digests = json.dumps(dict(dependencies), indent=2)
        write_atomically(config.output / DEPENDENCIES_FILE, digests + "\n")


def located(config: Config) -> Config:
    """With the model's and the prompts' files by whole paths, which mean the same anywhere."""
    changes: dict[str, dict[str, str]] = {}
    for section, name in _FILES:
        value = getattr(getattr(config, section), name)
        path = Path(value or "").expanduser()
        if value not in (None, *EMBEDDED) and path.exists():
            changes.setdefault(section, {})[name] = str(path.resolve())
    sections = {
        section: getattr(config, section).model_copy(update=values)
        for section, values in changes.items()
    }
    return config.model_copy(update=sections)


def _check_same_settings(folder: Path, config: Config) -> None:
    try:
        saved = load_config(folder / CONFIG_FILE, [])
    except UserError as error:
        raise RunError(f"output: the run in {folder} cannot be resumed: {error}") from error
    before, now = _settings(saved), _settings(config)
    free = set(marked(type(config), FREE_ON_RESUME))
    recorded = set(marked(type(config), RECORDED_ON_RESUME))
    changed = [key for key in _differing(before, now) if key not in free]
    if set(changed) - recorded:
        listed = [
            f"{'.'.join(key)}: was {before.get(key)!r}, now {now.get(key)!r}"
            + (" (which may change)" if key in recorded else "")
            for key in changed
        ]
        raise RunError(
            f"output: the run in {folder} was made with other settings; to resume, keep "
            "them\n  " + "\n  ".join(listed)
        )


_NOTE = "# changed at iteration "


def _notes(config: Config, iteration: int) -> str:
    """Comments for the configuration of a resumed run: what was changed at which resume."""
    path = config.output / CONFIG_FILE
    lines = path.read_text(encoding="utf-8").splitlines()
    notes = [line for line in lines if line.startswith(_NOTE)]
    before, now = _settings(load_config(path, [])), _settings(config)
    recorded = set(marked(type(config), RECORDED_ON_RESUME))
    if config.train.learning_rate_schedule == "constant":
        recorded.discard(("train", "iterations"))  # they steer nothing then
    notes += [
        f"{_NOTE}{iteration}: {'.'.join(key)} was {before[key]!r}, now {now[key]!r}"
        for key in _differing(before, now)
        if key in recorded
    ]
    return "".join(f"{line}\n" for line in notes)


def _differing(
    before: dict[tuple[str, ...], Any], now: dict[tuple[str, ...], Any]
) -> list[tuple[str, ...]]:
    return [k for k in sorted({*before, *now}, key=str) if before.get(k) != now.get(k)]


def _settings(config: Config) -> dict[tuple[str, ...], Any]:
    """By key, for comparison."""
    settings = yaml.safe_load(to_yaml(located(config)))
    for name in ("train", "held_out"):
        path = Path(settings["prompts"][name] or "")
        if path.is_absolute():  # the project may have been moved; the state knows the prompts
            settings["prompts"][name] = path.name
    for given, reward in zip(settings["rewards"], config.rewards, strict=True):
        given["label"] = reward.key
        if reward.name.startswith(("http://", "https://")):
            given["name"] = "a server"
        for option in FREE_OPTIONS & given["options"].keys():
            del given["options"][option]
    return flatten(settings)


def flatten(tree: dict[str, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """A tree's leaves, by the keys on the way to each."""
    flat: dict[tuple[str, ...], Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, (*prefix, name))
        else:
            flat[(*prefix, name)] = value
    return flat


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Add a record to a file of JSON lines."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a file by `append_line`; a last one that a crash cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def drop_lines_from(path: Path, iteration: int) -> None:
    """Forget records of an iteration and later ones."""
    kept = [record for record in read_lines(path) if record["iteration"] < iteration]
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)

"""The folder of kept prompt embeddings: where it is, what it holds, and making room in it.

Left out: what is in a file, and when it is used (`text.py`); torch is not needed here.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

# Nothing else in the folder, which is the user's to choose, is counted or dropped.
_MODEL = re.compile(r"[0-9a-f]{24}")
_ENTRY = re.compile(r"[0-9a-f]{32}\.safetensors")
_NAME_FILE = "model.txt"
MANIFEST_FILE = "digests.json"


@dataclass(frozen=True)
class Kept:
    """The embeddings of one model.

    Attributes:
        model: the checkpoint that they are of, or "" where that is not known.
        bytes: of all of them.
        used: when one of them was last, in seconds since 1970.
    """

    model: str
    prompts: int
    bytes: int
    used: float


def cache_folder(setting: str) -> Path:
    """What `model.embedding_cache` names; "auto" is TREEGRPO_CACHE or the user's cache folder."""
    if setting != "auto":
        return Path(setting)
    if folder := os.environ.get("TREEGRPO_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "treegrpo"


def model_folder(cache: Path, key: str, model: Path) -> Path:
    """The folder of a model's embeddings, made where there is none, with the model's name in it."""
    folder = cache / "embeddings" / key
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _NAME_FILE).write_text(f"{model}\n", encoding="utf-8")
    return folder


def kept(cache: Path) -> list[Kept]:
    """What a cache holds, by model, the last used first."""
    models = []
    for folder in _model_folders(cache):
        found = [status for _, status in _entries(folder)]
        name = folder / _NAME_FILE
        models.append(
            Kept(
                name.read_text(encoding="utf-8").strip() if name.is_file() else "",
                len(found),
                sum(status.st_size for status in found),
                max((status.st_mtime for status in found), default=folder.stat().st_mtime),
            )
        )
    return sorted(models, key=lambda one: -one.used)


def make_room(cache: Path, most: float, spare: Collection[Path]) -> None:
    """Drop the embeddings that were used longest ago until all take at most so many bytes.

    Args:
        spare: files that stay in any case.
    """
    found = [entry for folder in _model_folders(cache) for entry in _entries(folder)]
    size = sum(status.st_size for _, status in found)
    for path, status in sorted(found, key=lambda entry: entry[1].st_mtime):
        if size <= most:
            return
        if path not in spare:
            path.unlink(missing_ok=True)
            size -= status.st_size


def clear(cache: Path) -> None:
    """Drop all embeddings, and the digests of models' files."""
    for folder in _model_folders(cache):
        shutil.rmtree(folder)
    (cache / MANIFEST_FILE).unlink(missing_ok=True)


def _model_folders(cache: Path) -> list[Path]:
    folders = (cache / "embeddings").glob("*")
    return [folder for folder in folders if _MODEL.fullmatch(folder.name) and folder.is_dir()]


def _entries(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.iterdir():
        if _ENTRY.fullmatch(path.name):
            try:
                yield path, path.stat()
            except FileNotFoundError:  # another process has dropped it
                continue

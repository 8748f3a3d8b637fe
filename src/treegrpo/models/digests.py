"""Digests of whole files; a manifest remembers them, so that no file is read twice.

Left out: what they are for: the key of kept embeddings (`text.py`), and the files that a run began
with (`training/dependencies.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# A file this young may change once more without its times telling.
_SETTLED_SECONDS = 2.0


def file_digest(path: Path, manifest: Path | None = None) -> str:
    """The SHA-256 of a file, in hexadecimal digits; see `folder_digest` for the manifest."""
    return _digests([path], manifest)[0]


def folder_digest(folder: Path, files: Iterable[Path], manifest: Path | None = None) -> str:
    """One for the names and contents of files in a folder, in hexadecimal digits.

    Args:
        manifest: a JSON file that keeps digests by path, and is made where there is none. One is
            taken only while the file's size and times are what they were.
    """
    files = sorted(files)
    digest = hashlib.sha256()
    for path, of_file in zip(files, _digests(files, manifest), strict=True):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{of_file}\n".encode())
    return digest.hexdigest()


def _digests(files: Iterable[Path], manifest: Path | None) -> list[str]:
    known, new, digests = _read(manifest), {}, []
    for path in files:
        key, stamp = str(path.resolve()), _stamp(path)
        entry = known.get(key)
        if isinstance(entry, dict) and entry.get("stamp") == stamp and "sha256" in entry:
            digests.append(str(entry["sha256"]))
            continue
        settled = time.time_ns() - max(stamp[1:]) > _SETTLED_SECONDS * 1e9
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        if settled and _stamp(path) == stamp:
            new[key] = {"stamp": stamp, "sha256": digests[-1]}
    if manifest is not None and new:
        _write(manifest, new)
    return digests


def _stamp(path: Path) -> list[int]:
    """Size, and when the content and anything else of it last changed: copies keep the former."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _read(manifest: Path | None) -> dict[str, Any]:
    """Nothing of a missing or damaged manifest."""
    with contextlib.suppress(OSError, ValueError):
        data = json.loads(manifest.read_bytes()) if manifest is not None else None
        return data if isinstance(data, dict) else {}
    return {}


def _write(manifest: Path, new: dict[str, Any]) -> None:
    """Add to a manifest, at once; without it the digests are computed again the next time."""
    with contextlib.suppress(OSError):
        manifest.parent.mkdir(parents=True, exist_ok=True)
        partial = manifest.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps({**_read(manifest), **new}, indent=1), encoding="utf-8")
        os.replace(partial, manifest)

"""What a run depends on beside its configuration: digests of the files that decide its numbers.

Left out: reward code and servers, which may be repaired and then resumed; prompts (`prompts.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from treegrpo.config import Config
from treegrpo.models.cache import MANIFEST_FILE, cache_folder
from treegrpo.models.components import Components
from treegrpo.models.digests import file_digest, folder_digest
from treegrpo.models.folder import SAMPLING_FILE, components, lora_file


def dependencies(config: Config, checkpoint: Components) -> dict[str, str]:
    """Digests of whole files, by the key that names them and what of it they are.

    Those of the checkpoint's components, of LoRA weights to start from, and of local files and
    folders that rewards' options name.
    """
    cache = config.model.embedding_cache
    manifest = None if cache is None else cache_folder(cache) / MANIFEST_FILE
    paths = {
        f"model.path, {name}": checkpoint.folder / name
        for name in (*components(checkpoint.index), SAMPLING_FILE)
    }
    if config.model.lora_path is not None:
        paths["model.lora_path"] = lora_file(config.model.lora_path)
    for number, reward in enumerate(config.rewards):
        paths |= dict(_named(f"rewards.{number}.options", reward.options))
    return {
        name: folder_digest(path, [p for p in path.rglob("*") if p.is_file()], manifest)
        if path.is_dir()
        else file_digest(path, manifest)
        for name, path in paths.items()
        if path.exists()
    }


def _named(key: str, value: Any) -> Iterator[tuple[str, Path]]:
    """The local files, and folders where an option's name says so, in a reward's options."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, each in items:
            yield from _named(f"{key}.{name}", each)
    elif isinstance(value, str) and value:
        path = Path(value).expanduser()
        # Another text may happen to be a folder's name, and that folder large.
        if path.is_file() or (path.is_dir() and key.endswith(("path", "folder", "checkpoint"))):
            yield key, path

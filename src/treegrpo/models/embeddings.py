"""Prompt embeddings, computed once: kept on disk by model and prompt, the recent ones in memory."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

# Of embeddings that the disk also holds: an iteration's prompts fit many times over.
_MEMORY_BYTES = 2**30
# What of each weights file goes into a model's key: enough to tell models apart, quick to read.
_SAMPLE_BYTES = 2**20


def cache_folder() -> Path:
    """`TREEGRPO_CACHE`, else `treegrpo` in the user's cache folder."""
    if folder := os.environ.get("TREEGRPO_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "treegrpo"


def model_key(folder: Path, parts: Iterable[str], settings: str) -> str:
    """A name for "what these text encoders give": from their files, settings and libraries.

    Args:
        folder: the checkpoint.
        parts: its text encoders and tokenizers.
        settings: what else decides an embedding (dtype, prompt length).
    """
    digest = hashlib.sha256(settings.encode())
    for package in ("diffusers", "transformers", "ftfy"):  # ftfy mends the prompts of some families
        digest.update(f"{package} {version(package)}".encode())
    for part in sorted(parts):
        for path in sorted(p for p in (folder / part).rglob("*") if p.is_file()):
            size = path.stat().st_size
            digest.update(f"{path.relative_to(folder)} {size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(_SAMPLE_BYTES))
                file.seek(max(0, size - _SAMPLE_BYTES))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:24]


class EmbeddingStore:
    """Prompt to named tensors, on the CPU. Without a folder everything stays in memory."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._recent: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._bytes = 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def __contains__(self, prompt: str) -> bool:
        return prompt in self._recent or (self.folder is not None and self._path(prompt).is_file())

    def get(self, prompt: str) -> dict[str, Tensor]:
        if prompt in self._recent:
            self._recent.move_to_end(prompt)
            return self._recent[prompt]
        tensors = load_file(self._path(prompt))
        self._remember(prompt, tensors)
        return tensors

    def put(self, prompt: str, tensors: dict[str, Tensor]) -> None:
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        if self.folder is not None:
            path = self._path(prompt)
            # Several processes may write the same prompt; each file appears whole.
            partial = path.with_suffix(f".{os.getpid()}.partial")
            save_file(tensors, partial)
            os.replace(partial, path)
        self._remember(prompt, tensors)

    def _remember(self, prompt: str, tensors: dict[str, Tensor]) -> None:
        self._recent[prompt] = tensors
        self._bytes += _bytes(tensors)
        while self.folder is not None and self._bytes > _MEMORY_BYTES and len(self._recent) > 1:
            _, forgotten = self._recent.popitem(last=False)
            self._bytes -= _bytes(forgotten)

    def _path(self, prompt: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{hashlib.sha256(prompt.encode()).hexdigest()[:32]}.safetensors"


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

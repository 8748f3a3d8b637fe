"""Prompts to embeddings: the text encoders, and the store in which each prompt is kept.

Embeddings are kept on disk by model and prompt, the recent ones in memory too; the text encoders
are in memory only while prompts are new.

Left out: how a family's pipeline encodes, and its negative prompt (`policy.py`); the folder of all
models' embeddings (`cache.py`).
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import math
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from treegrpo.errors import reason
from treegrpo.models.cache import make_room
from treegrpo.models.components import Components
from treegrpo.models.digests import folder_digest
from treegrpo.models.folder import ModelError, loading
from treegrpo.versions import versions

# What the text encoders give, by name: [prompts, ...] each.
Conditioning = dict[str, Tensor]

PROMPTS_PER_ENCODING = 32
_LETTERS_PER_TOKEN = 4.5  # of English, in today's vocabularies
# Of embeddings that the disk also holds: an iteration's prompts fit many times over.
_MEMORY_BYTES = 2**30
# Whose versions decide an embedding; ftfy mends the prompts of some families.
_LIBRARIES = ("treegrpo", "diffusers", "transformers", "tokenizers", "ftfy")


class PromptEncoder:
    """Prompts to conditioning: each is computed once and kept."""

    def __init__(
        self,
        load: Callable[[], Any],
        encode: Callable[[Any, list[str]], Mapping[str, Tensor | list[Tensor]]],
        store: EmbeddingStore,
        device: torch.device,
    ) -> None:
        """Nothing is loaded before the first new prompt.

        Args:
            load: gives the pipeline, as `load_encoders`.
            encode: (pipeline, prompts) to conditioning by name, a row per prompt.
        """
        self._load, self._encode, self._device = load, encode, device
        self.store = store
        self.pipeline: Any = None  # of the text encoders, while they are in memory

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts to conditioning on the device, [prompts, ...] by name.

        The text encoders are loaded when a prompt is new, and stay until `release`. Shorter
        sequences are padded with zeros.
        """
        self._encode_new(self._new(prompts))
        rows = [self.store.get(prompt) for prompt in prompts]
        return {
            name: stack([row[name] for row in rows]).to(self._device, non_blocking=True)
            for name in rows[0]
        }

    def prepare(
        self, prompts: Sequence[str], say: Callable[[str], None], others: Sequence[str] = ()
    ) -> None:
        """Encode all prompts that a run will need, then let the text encoders go.

        Without a folder the store is in memory alone, and so the encoders stay for what else comes.

        Args:
            say: is told where that may take a while.
            others: the run's prompts that other processes encode, which need room too.

        Raises:
            ModelError: the disk, or the limit of the cache, has no room for them.
        """
        self.store.touch(prompts)
        new, folder = self._new(prompts), self.store.folder
        if len(new) > PROMPTS_PER_ENCODING:
            say(f"encoding {len(new):,} prompts{f', kept in {folder}' if folder else ''}")
        self._encode_new(new[:PROMPTS_PER_ENCODING])
        if folder is not None and new:
            each = _bytes(self.store.get(new[0]))
            free = shutil.disk_usage(folder).free
            if each * len(new) > free:
                raise ModelError(
                    f"model.embedding_cache: {folder} has {free / 2**30:.1f} GiB free, "
                    f"but the embeddings of {len(new):,} prompts need {each * len(new) / 2**30:.1f}"
                    " GiB; name a folder with room, or null to keep the text encoders in memory"
                )
        self.store.make_room([*prompts, *others])
        self._encode_new(new[PROMPTS_PER_ENCODING:])
        if folder is not None:
            self.release()

    def release(self) -> None:
        """Let the text encoders leave memory."""
        self.pipeline = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _new(self, prompts: Sequence[str]) -> list[str]:
        return [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.store]

    @torch.no_grad()
    def _encode_new(self, prompts: Sequence[str]) -> None:
        for start in range(0, len(prompts), PROMPTS_PER_ENCODING):
            if self.pipeline is None:
                self.pipeline = self._load()
            part = list(prompts[start : start + PROMPTS_PER_ENCODING])
            encoded = self._encode(self.pipeline, part)
            for row, prompt in enumerate(part):
                self.store.put(prompt, {name: values[row] for name, values in encoded.items()})


def load_encoders(
    checkpoint: Components, present: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> Any:
    """The checkpoint's pipeline with its text encoders and tokenizers alone.

    `present` are other components, into which some pipelines look for sizes.
    """
    absent = {
        name: None
        for name, value in checkpoint.index.items()
        if isinstance(value, list) and name not in checkpoint.text_parts
    }
    encoders = {
        name: checkpoint.read(name, dtype, device).requires_grad_(False).eval()
        for name in checkpoint.text_parts
        if name in checkpoint.configs
    }
    with loading(checkpoint.folder):
        return checkpoint.pipeline_class().from_pretrained(
            checkpoint.folder, dtype=dtype, **{**absent, **present, **encoders}
        )


def count_tokens(checkpoint: Components, text: str) -> int:
    """Tokens of a text, by the checkpoint's tokenizer; roughly, where its files are not here."""
    folder = checkpoint.folder / "tokenizer"
    if not any(folder.glob("*")):
        return math.ceil(len(text) / _LETTERS_PER_TOKEN)
    tokenizer_class = checkpoint.component_class("tokenizer")
    with loading(folder):
        return len(tokenizer_class.from_pretrained(folder)(text).input_ids)


def stack(rows: Sequence[Tensor]) -> Tensor:
    """[rows, ...]; where the rows' first dimensions differ, padded with zeros to the longest."""
    if all(row.shape == rows[0].shape for row in rows):
        return torch.stack(list(rows))
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


# --- the store ---


def model_key(
    folder: Path, parts: Iterable[str], settings: str, manifest: Path | None = None
) -> str:
    """A name for "what these text encoders give": from their files, settings and libraries.

    Args:
        settings: what else decides an embedding: dtype, prompt length.
        manifest: of the files' digests.
    """
    files = [path for part in parts for path in (folder / part).rglob("*") if path.is_file()]
    of_files = folder_digest(folder, files, manifest)
    return hashlib.sha256(f"{settings} {versions(_LIBRARIES)} {of_files}".encode()).hexdigest()[:24]


class EmbeddingStore:
    """Prompt to named tensors, on the CPU: a file of `folder` per prompt; None: in memory alone.

    Args:
        folder: of one model, in a cache of several.
        limit: of the cache, in bytes; None: there is none.
    """

    def __init__(self, folder: Path | None, limit: float | None = None) -> None:
        self.folder, self._limit = folder, limit
        self._recent: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._bytes = 0

    def __contains__(self, prompt: str) -> bool:
        return prompt in self._recent or (self.folder is not None and _is_whole(self._path(prompt)))

    def touch(self, prompts: Sequence[str]) -> None:
        """Note that kept prompts are used now."""
        for path in map(self._path, prompts if self.folder is not None else ()):
            with contextlib.suppress(OSError):
                os.utime(path)

    def make_room(self, prompts: Sequence[str]) -> None:
        """Drop from the cache what was used longest ago, so that all of these have room in it.

        Raises:
            ModelError: the limit is too small for them, by the size of those that are kept.
        """
        if self.folder is None or self._limit is None:
            return
        paths = {self._path(prompt) for prompt in prompts}
        sizes = [path.stat().st_size for path in paths if path.exists()]
        coming = (len(paths) - len(sizes)) * max(sizes, default=0)
        if sum(sizes) + coming > self._limit:
            raise ModelError(
                f"model.embedding_cache_gib: got {self._limit / 2**30:g}, but the embeddings of "
                f"{len(paths):,} prompts take {(sum(sizes) + coming) / 2**30:.1f} GiB; must be at "
                "least that, or null, or model.embedding_cache null to keep the text encoders in "
                "memory"
            )
        make_room(self.folder.parents[1], self._limit - coming, paths)

    def get(self, prompt: str) -> dict[str, Tensor]:
        """A kept prompt's tensors."""
        if prompt in self._recent:
            self._recent.move_to_end(prompt)
            return self._recent[prompt]
        tensors = load_file(self._path(prompt))
        self._remember(prompt, tensors)
        return tensors

    def put(self, prompt: str, tensors: dict[str, Tensor]) -> None:
        """Keep a prompt's tensors, of which copies are made; ModelError: the disk refuses them."""
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        if self.folder is not None:
            path = self._path(prompt)
            # Several processes may write the same prompt; each file appears whole.
            partial = path.with_suffix(f".{os.getpid()}.partial")
            try:
                save_file(tensors, partial)
                os.replace(partial, path)
            except (OSError, SafetensorError) as error:
                partial.unlink(missing_ok=True)
                raise ModelError(
                    f"model.embedding_cache: {path} cannot be written: {reason(error)}"
                ) from error
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


def _is_whole(path: Path) -> bool:
    """Whether a file can be read, by its header, which knows the file's size."""
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

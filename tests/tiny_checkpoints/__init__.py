"""Tiny checkpoints of every family's real architecture: random weights, built without a download.

One file per family says in its `CASES` how to build a checkpoint and how diffusers' own pipeline
is called on it; tests/test_families.py and docs/make_parity_table.py find the files and do the
rest.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from treegrpo.models.policy import Conditioning, Sampling

# A JSON file's name to the keys that get another value; `...` removes one.
Edits = Mapping[str, Mapping[str, Any]]


def edited(source: Path, folder: Path, edits: Edits) -> Path:
    """A copy of a checkpoint in a new folder, with changed files."""
    shutil.copytree(source, folder)
    for name, changes in edits.items():
        values = {**json.loads((folder / name).read_text(encoding="utf-8")), **changes}
        kept = {key: value for key, value in values.items() if value is not ...}
        (folder / name).write_text(json.dumps(kept), encoding="utf-8")
    return folder


def scheduler(name: str, **settings: Any) -> Edits:
    """The edits that give a checkpoint another scheduler; the old one's settings stay beside."""
    return {
        "model_index.json": {"scheduler": ["diffusers", name]},
        "scheduler/scheduler_config.json": {"_class_name": name, **settings},
    }


def flow_solver(name: str, **settings: Any) -> Edits:
    """A solver of a higher order for flows, with first-order steps, which ours are."""
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 1}
    return scheduler(name, **flow, disable_corrector=list(range(50)), **settings)


@dataclass(frozen=True)
class Case:
    """One family.

    Attributes:
        name: of the family, for people.
        build: writes a checkpoint into a folder; the same one every time.
        call: (pipeline, prompts, noise [prompts, *latent_shape], sampling) to what the pipeline's
            own `__call__` draws: images [prompts, 3, height, width] in [0, 1], or videos
            [prompts, frames, 3, height, width].
        encode: (pipeline, prompts, sampling) to its own `encode_prompt`, named as ours.
        absent: components that `from_pretrained` must be told are absent.
        make_first_order: where the checkpoint's own solver is of a higher order: the same levels
            with a first-order one.
        variations: name to fields of `Sampling` under which images must agree.
        edits: name to changes of the checkpoint's files, as `edited` takes them, after which images
            must agree.
    """

    name: str
    build: Callable[[Path], None]
    call: Callable[[Any, list[str], Tensor, Sampling], Tensor]
    encode: Callable[[Any, list[str], Sampling], Conditioning]
    absent: tuple[str, ...] = ()
    make_first_order: Callable[[Any], None] | None = None
    variations: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"defaults": {}})
    edits: Mapping[str, Edits] = field(default_factory=dict)

    def pipeline(self, folder: Path) -> Any:
        """The checkpoint in diffusers alone."""
        from diffusers import DiffusionPipeline

        pipeline = DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(self.absent))
        pipeline.set_progress_bar_config(disable=True)
        if self.make_first_order is not None:
            self.make_first_order(pipeline)
        return pipeline


def cases() -> list[Case]:
    """Of every file here."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
    modules = [importlib.import_module(f"tiny_checkpoints.{name}") for name in names]
    return [case for module in modules for case in module.CASES]


def byte_level_clip_tokenizer(max_length: int = 77) -> Any:
    """A CLIP tokenizer whose words are letters: 514 entries, no merges, no files."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=max_length)


def save_pipeline(pipeline: Any, folder: Path, sampling: Mapping[str, Any]) -> None:
    """In evaluation mode (T5 has dropout), with how it is sampled."""
    for part in pipeline.components.values():
        if hasattr(part, "eval"):
            part.eval()
    pipeline.save_pretrained(folder, safe_serialization=True)
    (folder / "sampling.json").write_text(json.dumps(dict(sampling)), encoding="utf-8")

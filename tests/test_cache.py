"""The cache of prompt embeddings: its limit, what is dropped first, and the command."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from command_line import CommandLine

from treegrpo.config import ModelConfig
from treegrpo.models.cache import kept
from treegrpo.models.folder import ModelError
from treegrpo.models.opening import open_policy
from treegrpo.models.policy import Policy


def opened(checkpoint: Path, cache: Path, gib: float | None) -> Policy:
    model = ModelConfig(path=str(checkpoint), embedding_cache=str(cache), embedding_cache_gib=gib)
    return open_policy(model, device=torch.device("cpu"))


def silent(text: str) -> None:
    pass


def test_what_was_used_longest_ago_makes_room(tiny_checkpoint: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = opened(tiny_checkpoint, cache, None)
    first.prepare(["one", "two", "three"], silent)  # and the negative one
    (model,) = kept(cache)
    assert (model.model, model.prompts) == (str(tiny_checkpoint), 4)
    each = model.bytes // 4
    entries = {name: first.text.store._path(name) for name in ("", "one", "two", "three")}
    for age, name in enumerate(("three", "two", "one", "")):
        os.utime(entries[name], (1e9 - age * 1e6,) * 2)
    own = [cache / "notes.safetensors", cache / "embeddings" / "mine" / entries["one"].name]
    for file in own:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"0" * 10 * each)

    # Room for five of six: "one" is older than "two", and "" is this run's own.
    second = opened(tiny_checkpoint, cache, 5.5 * each / 2**30)
    second.prepare(["four", "five"], silent)
    assert [name for name, path in entries.items() if not path.exists()] == ["one"]
    assert kept(cache)[0].prompts == 5
    assert kept(cache)[0].bytes <= 5.5 * each
    # What a run needs stays, whatever its age; here the others' part of it.
    os.utime(entries["three"], (1e8, 1e8))
    third = opened(tiny_checkpoint, cache, 3.5 * each / 2**30)
    third.prepare(["four"], silent, others=["four", "three"])
    assert entries["three"].exists() and entries[""].exists()
    assert kept(cache)[0].prompts == 3
    assert all(file.exists() for file in own)


def test_a_run_that_alone_is_above_the_limit_is_refused(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    policy = opened(tiny_checkpoint, tmp_path / "cache", 1e-6)
    prompts = [f"{number} circles" for number in range(50)]
    with pytest.raises(ModelError, match=r"^model\.embedding_cache_gib: got 1e-06, but .* 51 "):
        policy.prepare(prompts, silent)
    # Not all of them were encoded in vain.
    assert kept(tmp_path / "cache")[0].prompts < 40


def test_the_command_shows_and_clears(tiny_checkpoint: Path, treegrpo: CommandLine) -> None:
    folder = Path("cache").resolve()
    empty = f"0 prompts, 0.0 MiB in {folder}\n"
    assert treegrpo("cache", "--folder", str(folder)) == (0, empty, "")
    opened(tiny_checkpoint, folder, None).prepare(["one", "two"], silent)
    (folder / "mine.txt").write_text("kept")
    code, out, _ = treegrpo("cache", "--folder", str(folder))
    assert code == 0
    assert str(tiny_checkpoint)[:40] in out
    assert f"3 prompts, 0.0 MiB in {folder}\n" in out
    code, out, _ = treegrpo("cache", "--folder", str(folder), "--clear")
    assert out == f"deleted 3 prompts, 0.0 MiB in {folder}\n"
    assert kept(folder) == []
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["mine.txt"]
    assert treegrpo("cache", "--folder", str(folder)) == (0, empty, "")

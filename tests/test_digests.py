"""Digests of whole files, and the manifest that remembers them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from treegrpo.models import digests
from treegrpo.models.digests import file_digest, folder_digest

LENGTH = 3 * 2**20
TICK = 0.02  # seconds; changes nearer to each other may have the same time


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(bytes(LENGTH))
    return path


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of files that need not be old."""
    monkeypatch.setattr(digests, "_SETTLED_SECONDS", -1.0)
    return tmp_path / "cache" / "digests.json"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def change_the_middle(path: Path) -> None:
    time.sleep(TICK)
    with path.open("r+b") as file:
        file.seek(LENGTH // 2)
        file.write(b"changed")


def test_one_byte_anywhere_is_another_digest(file: Path, manifest: Path) -> None:
    before = file_digest(file, manifest)
    assert before == sha256(file)
    change_the_middle(file)
    assert file_digest(file) == file_digest(file, manifest) == sha256(file) != before


def test_a_file_is_read_once(file: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = folder_digest(file.parent, [file], manifest)
    monkeypatch.setattr(hashlib, "file_digest", None)  # calling it would fail
    assert folder_digest(file.parent, [file], manifest) == expected


@pytest.mark.parametrize("stamps", [True, False], ids=["times put back", "as written"])
def test_a_changed_files_entry_is_not_trusted(file: Path, manifest: Path, stamps: bool) -> None:
    status = file.stat()
    file_digest(file, manifest)
    change_the_middle(file)
    if stamps:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert file.stat().st_mtime_ns == status.st_mtime_ns
    assert file_digest(file, manifest) == sha256(file)


def test_a_file_just_written_is_not_remembered(file: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "digests.json"
    file_digest(file, manifest)
    assert not manifest.exists()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', "\0\0", '{"FILE": 1}', '{"FILE": {}}'])
def test_a_damaged_manifest_is_ignored_and_mended(file: Path, manifest: Path, text: str) -> None:
    manifest.parent.mkdir()
    manifest.write_text(text.replace("FILE", str(file)))
    assert file_digest(file, manifest) == sha256(file)
    assert json.loads(manifest.read_text())[str(file)]["sha256"] == sha256(file)
    assert [path.name for path in manifest.parent.iterdir()] == ["digests.json"]


def test_a_manifest_that_cannot_be_written_is_done_without(file: Path) -> None:
    assert file_digest(file, Path("/proc/none/digests.json")) == sha256(file)


def test_a_folders_digest_is_of_names_and_contents(tmp_path: Path, manifest: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for part in ("a", "b"):
        (one / part).mkdir(parents=True)
        (one / part / "config.json").write_text(part)
    shutil.copytree(one, other)

    def digest(folder: Path) -> str:
        return folder_digest(folder, folder.rglob("*.json"), manifest)

    assert digest(one) == digest(other)
    (other / "b" / "config.json").rename(other / "b" / "other.json")
    assert digest(one) != digest(other)
    (other / "b" / "other.json").rename(other / "b" / "config.json")
    time.sleep(TICK)
    (other / "b" / "config.json").write_text("c")
    assert digest(one) != digest(other)

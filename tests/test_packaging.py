"""What is installed is what stands here: the wheel's files, and its page on the index.

Left out: that pip installs it and its commands run, which was tried by hand.
"""

import re
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

from treegrpo import __version__
from treegrpo.config import RECIPES, configuration_file

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "treegrpo"


def build(target: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(build("wheel", tmp_path_factory.mktemp("wheel")))


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return Parser().parsestr(wheel.read(name).decode())


def test_the_wheel_holds_the_package_whole(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    here = {
        path.relative_to(PACKAGE.parent).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == here
    assert {f"treegrpo/recipes/{recipe}.yaml" for recipe in RECIPES} <= names
    assert all(configuration_file(recipe).is_relative_to(PACKAGE) for recipe in RECIPES)


def test_what_is_shipped_is_small(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """With both miniatures and the pictures of the documentation: at most 16 MiB."""
    for file in (Path(wheel.filename or ""), build("sdist", tmp_path)):
        assert file.stat().st_size < 16 * 2**20, file.name


def test_the_page_on_the_index_has_no_link_that_only_works_here(metadata: Message) -> None:
    page, readme = metadata.get_payload(), (ROOT / "README.md").read_text(encoding="utf-8")
    assert isinstance(page, str)
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", page)
    assert len(links) == len(re.findall(r"\]\(", readme)) >= 10
    for picture, link in links:
        assert link.startswith("https://")
        path = re.search(rf"/(raw|blob)/v{re.escape(__version__)}/(.*)", link)
        if path is not None:
            assert path[1] == ("raw" if picture else "blob")
            assert (ROOT / path[2]).exists()
    assert sum(bool(picture) for picture, _ in links) == 2

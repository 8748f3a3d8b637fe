"""What the documentation shows is so: code runs, commands answer as printed, names exist.

Left out: the figures in the documentation, which benchmarks and whole runs gave, and commands that
need what a test has not (a hub's checkpoint, a server).
"""

import ast
import doctest
import json
import pkgutil
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import CommandLine

from treegrpo.config import describe_fields
from treegrpo.config.wording import methods_with
from treegrpo.methods import BUILT_IN
from treegrpo.run_folder import read_lines

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "treegrpo"
# The log of changes names what was.
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
SMALL = (
    "model.device=cpu",
    "rollout.steps=3",
    "rollout.prompts_per_iteration=2",
    "rewards=[{name: 'toy_rewards:brightness'}]",
    "train.iterations=2",
    "evaluation.max_prompts=2",
    "evaluation.images_per_prompt=1",
    "output=run",
    "--overwrite",
)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    """The code blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", read(name), flags=re.DOTALL | re.MULTILINE)


def test_the_library_example_of_the_readme_learns() -> None:
    (example,) = [block for block in blocks("README.md", "python") if block.startswith("import")]
    assert len(example.splitlines()) <= 36
    printed: list[float] = []
    exec(example, {"print": lambda *values: printed.append(float(values[-1]))})
    assert len(printed) >= 3
    # The reward is minus a distance: at least half of the way to the target has been learned.
    assert printed[-1] > 0.5 * printed[0]


def test_the_forward_counts_of_the_guide() -> None:
    failures, tests = doctest.testfile(
        str(ROOT / "docs" / "how-it-works.md"), module_relative=False
    )
    assert tests >= 7
    assert failures == 0


def test_every_benchmark_has_the_quick_form_of_the_readme() -> None:
    assert "make bench ARGS=--quick" in read("README.md")
    for path in (ROOT / "benchmarks").glob("*.py"):
        assert '"--quick"' in path.read_text(encoding="utf-8"), path.name


# --- docs/methods.md ---


def test_the_methods_settings_are_those_of_the_table() -> None:
    page = read("docs/methods.md")
    shared = page[page.index("All seven have") : page.index("The rest, with defaults")]
    own = [
        f"| | {' | '.join(f'`{name}`' for name in BUILT_IN)} |",
        "|---" * (1 + len(BUILT_IN)) + "|",
    ]
    for key, _, _ in describe_fields():
        section, _, name = key.partition(".")
        if section not in ("rollout", "advantage", "objective"):
            continue
        methods = methods_with(key)
        if len(methods) == len(BUILT_IN):
            assert f"`{name}`" in shared or f"`{key}`" in shared, key
        else:
            cells = [f" {methods[method]} " if method in methods else " " for method in BUILT_IN]
            own.append(f"| `{key}` |{'|'.join(cells)}|")
    table = "\n".join(own)
    assert table in page, f"the table must be\n{table}"


def _commands(page: str) -> list[tuple[str, str]]:
    """The `treegrpo` commands that a page shows, and what is printed below each."""
    return [
        (command, answer.strip())
        for block in blocks(page, "console")
        for command, answer in re.findall(r"^\$ treegrpo (.*)\n((?:(?!\$ ).+\n)*)", block, re.M)
    ]


METHODS_COMMANDS = _commands("docs/methods.md")


@pytest.mark.slow
@pytest.mark.parametrize(("command", "answer"), METHODS_COMMANDS, ids=lambda text: text[:60])
def test_commands_of_the_methods_page(
    command: str, answer: str, treegrpo: CommandLine, tiny_checkpoint: Path
) -> None:
    for block in blocks("docs/methods.md", "python"):
        name = re.match(r"# (\w+\.py)\n", block)
        assert name is not None, "its first line names the file"
        Path(name[1]).write_text(block, encoding="utf-8")
    arguments = shlex.split(command)
    if answer:
        assert f"error: {treegrpo.refusal(*arguments)}" == answer
        return
    code, _, err = treegrpo(*arguments, f"model.path={tiny_checkpoint}", *SMALL)
    assert code == 0, err
    records = read_lines(Path("run/metrics.jsonl"))
    assert len(records) == 2
    assert all(record["gradient_norm"] > 0 for record in records)
    code, _, err = treegrpo(
        "plan",
        *arguments[1:],
        f"model.path={tiny_checkpoint}",
        "rollout.steps=3",
        "--json",
        "plan.json",
    )
    assert code == 0, err
    forwards = json.loads(Path("plan.json").read_text(encoding="utf-8"))["work"]["update"]
    assert records[0]["update_forwards"] == 2 * forwards


def test_the_methods_page_shows_all_kinds_of_commands() -> None:
    assert len(METHODS_COMMANDS) >= 7
    assert sum(bool(answer) for _, answer in METHODS_COMMANDS) >= 4


# --- names ---


def _prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path) -> None:
    prose = _prose(page)
    for link in re.findall(r"\]\(([^)#]+)\)", prose):
        assert "://" in link or (page.parent / link).exists(), link
    files = [path.relative_to(ROOT).as_posix() for path in _sources(ROOT)]
    for name in re.findall(r"`(?:python )?([\w/.]+\.py)\b", prose):
        assert any(f"/{path}".endswith(f"/{name}") for path in files), name
    for name in re.findall(r"`(treegrpo(?:\.\w+)+)`", prose):
        pkgutil.resolve_name(name)


def _sources(folder: Path) -> Iterator[Path]:
    for child in folder.iterdir():
        if child.is_dir() and not child.name.startswith((".", "__", "runs", "build", "dist")):
            yield from _sources(child)
        elif child.suffix == ".py":
            yield child


# --- CONTRIBUTING.md ---


def _imports(path: Path) -> Iterator[str]:
    """What a file of the package imports when it runs, as rooms: `treegrpo.ROOM`, `.ROOM.x`."""
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes += node.orelse
        elif isinstance(node, ast.ImportFrom) and node.module == "treegrpo":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("treegrpo."):
            yield str(node.module).split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("treegrpo."))
        else:
            nodes += ast.iter_child_nodes(node)


def test_imports_only_go_down_the_house() -> None:
    (picture,) = blocks("CONTRIBUTING.md", "text")
    floors = [re.findall(r"\w+", line.split("│")[0]) for line in picture.splitlines()]
    floor = {room: number for number, rooms in enumerate(floors) for room in rooms}
    paths = {
        path: path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in _sources(PACKAGE)
    }
    rooms = {room for room in paths.values() if not room.startswith("__")}
    assert rooms == floor.keys()
    for path, room in paths.items():
        for other in _imports(path):
            if other in rooms and room in rooms and other != room:
                assert floor[room] < floor[other], f"{path.name} of {room} imports {other}"


def test_every_header_says_what_is_left_out_and_no_file_is_long() -> None:
    scripts = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "docs").glob("*.py")]
    for file in [*PACKAGE.rglob("*.py"), *scripts]:
        text = file.read_text(encoding="utf-8")
        assert "\nLeft out: " in (ast.get_docstring(ast.parse(text)) or ""), file
        assert len(text.splitlines()) <= 500, file

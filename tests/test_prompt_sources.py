"""What each kind of source gives, and what a wrong one is told."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from treegrpo.prompts import Prompt, PromptError, load_prompts

GENEVAL = """\
{"tag": "counting", "include": [{"class": "cow", "count": 2}], "prompt": "a photo of two cows"}
{"tag": "colors", "include": [], "exclude": ["x"], "prompt": "a photo of a red car"}
"""
# A quotation mark begins a prompt and another stands inside one, as in PartiPrompts.tsv.
PARTI = 'Prompt\tCategory\tNote\n"GIGGLE" in paint\tIllustrations\t\n42\tAbstract\tthe "answer"\n'
DRAWBENCH = '"Prompts","Category"\n"A ""red"" car, parked","Colors"\n"two\nlines","Text"\n'

Write = Callable[[str, str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, content: str) -> str:
        (tmp_path / name).write_bytes(content.encode())
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize(
    ("name", "content", "column", "expected"),
    [
        # A byte order mark, both line endings, a blank line, a duplicate, a line separator inside.
        (
            "list.txt",
            "\ufeffb \r\n\n  a\nb\nc\u2028d",
            "prompt",
            [Prompt("b"), Prompt("a"), Prompt("c\u2028d")],
        ),
        ("no_ending", '"quoted", a\n', "prompt", [Prompt('"quoted", a')]),
        (
            "geneval.jsonl",
            GENEVAL,
            "prompt",
            [
                Prompt(
                    "a photo of two cows",
                    {"tag": "counting", "include": [{"class": "cow", "count": 2}]},
                ),
                Prompt("a photo of a red car", {"tag": "colors", "include": [], "exclude": ["x"]}),
            ],
        ),
        ("strings.jsonl", '"a"\n\n"b\\nc"\n', "prompt", [Prompt("a"), Prompt("b\nc")]),
        ("anime.json", '["a",\n "b", " "]', "prompt", [Prompt("a"), Prompt("b")]),
        # The first line of a text wins, and with it its metadata.
        (
            "train.json",
            '[{"prompt": "a", "rank": [1, 2]}, {"prompt": " a", "rank": []}]',
            "prompt",
            [Prompt("a", {"rank": [1, 2]})],
        ),
        (
            "PartiPrompts.tsv",
            PARTI,
            "prompt",
            [
                Prompt('"GIGGLE" in paint', {"Category": "Illustrations", "Note": ""}),
                Prompt("42", {"Category": "Abstract", "Note": 'the "answer"'}),
            ],
        ),
        (
            "DrawBench.CSV",
            DRAWBENCH,
            "Prompts",
            [
                Prompt('A "red" car, parked', {"Category": "Colors"}),
                Prompt("two\nlines", {"Category": "Text"}),
            ],
        ),
        # The very name comes before the same name in other letters.
        ("both.csv", "Prompt,prompt\nno,yes\n", "prompt", [Prompt("yes", {"Prompt": "no"})]),
    ],
)
def test_a_file_is_read_by_its_name(
    write: Write, name: str, content: str, column: str, expected: list[Prompt]
) -> None:
    assert load_prompts(write(name, content), "train", column) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n  \n", "holds no prompt"),
        (
            "a.jsonl",
            '"a"\n{"prompt": "b"\n',
            "line 2: not JSON: Expecting ',' delimiter, column 15",
        ),
        (
            "a.jsonl",
            '"a"\n{"text": "b", "n": 1}\n',
            "line 2: no column 'prompt'; the columns are text",
        ),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": 7}\n', "line 2: got 7; the prompt must be text"),
        (
            "a.jsonl",
            '"a"\n{"prompt": 1, "prompt": "b"}\n',
            "line 2: the key 'prompt' is given twice",
        ),
        ("a.jsonl", '"a"\n' + "[" * 100_000, "line 2: maximum recursion depth exceeded"),
        ("a.jsonl", '"a"\n{"n": 1' + "0" * 5000 + "}", "line 2: Exceeds the limit"),
        ("a.csv", "prompt,n,prompt\na,1,b\n", "the column 'prompt' is given twice"),
        ("a.jsonl", '"a"\nnull\n', "line 2: got None; the prompt must be text"),
        ("a.jsonl", '"a\\ud83d"\n', "line 1: got 'a\\ud83d', with half of a surrogate pair"),
        (
            "a.json",
            '"a"\n"b"\n',
            "line 2: not JSON: Extra data, column 1 (a file of one JSON value",
        ),
        ("a.json", '{"a": 1}', "holds one JSON dict; must be an array"),
        ("a.json", '["a", ["b"]]', "item 2: got ['b']; the prompt must be text"),
        ("a.csv", "", "holds no prompt"),
        ("a.csv", "prompt,n\n", "holds no prompt"),
        ("a.csv", "prompt\na, b\n", "line 2: got 2 cells; must be 1, as in the first line"),
        ("a.csv", 'prompt\n"a" b\n', "line 2: ',' expected after '\"'"),
        ("a.csv", "Prompts,n\na,1\n", "line 2: no column 'prompt'; the columns are Prompts, n"),
        (
            "a.csv",
            "Prompt,PROMPT\na,b\n",
            "several columns 'prompt'; the columns are Prompt, PROMPT",
        ),
    ],
)
def test_a_wrong_file_is_told_where(write: Write, name: str, content: str, message: str) -> None:
    source = write(name, content)
    with pytest.raises(PromptError) as caught:
        load_prompts(source, "train")
    assert source in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "csv", "tsv"])
def test_a_file_that_is_not_utf8_is_told_where(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"fine\nna\xefve\n")
    with pytest.raises(PromptError, match="is not UTF-8: byte 0xef at offset 7, line 2"):
        load_prompts(str(path), "train")


# "folder/none.txt" has the form of a hub name, but is not looked up there.
@pytest.mark.parametrize("source", ["folder/none.txt", "none", "./none", "none.parquet", "a:b:c:d"])
def test_a_missing_file_is_named(source: str) -> None:
    with pytest.raises(PromptError, match=r"^prompt file \S+ does not exist$"):
        load_prompts(source, "train")


@pytest.mark.parametrize(
    ("source", "module", "package"),
    [("owner/name", "datasets", "datasets"), ("a.parquet", "pyarrow.parquet", "pyarrow")],
)
def test_a_missing_package_is_named(
    write: Write, monkeypatch: pytest.MonkeyPatch, source: str, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    if source == "a.parquet":
        source = write(source, "")
    with pytest.raises(PromptError, match=rf"needs the package {package}.*treegrpo\[datasets\]"):
        load_prompts(source, "train")


# --- tables and datasets ---


@pytest.fixture
def parquet() -> Any:
    return pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", True)
    return library


def table() -> Any:
    """Two prompts with an image, as Hugging Face stores it, and a nested column."""
    import pyarrow

    return pyarrow.table(
        {
            "Prompt": ["a cow", "a car"],
            "image": [{"bytes": b"\x89PNG", "path": None}] * 2,
            "crops": [[b"\x89PNG"], []],
            "include": [[{"class": "cow", "count": 1}], []],
        }
    )


EXPECTED = [
    Prompt("a cow", {"include": [{"class": "cow", "count": 1}]}),
    Prompt("a car", {"include": []}),
]


def test_a_parquet_file_gives_its_columns_without_images(tmp_path: Path, parquet: Any) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(table(), path)
    assert load_prompts(str(path), "train") == EXPECTED
    with pytest.raises(PromptError, match="row 1: no column 'text'; the columns are Prompt, incl"):
        load_prompts(str(path), "train", "text")

    path.write_bytes(b"PAR1")
    with pytest.raises(PromptError, match=r"a\.parquet is no Parquet file: "):
        load_prompts(str(path), "train")


def test_a_saved_dataset_gives_the_same(tmp_path: Path, datasets: Any) -> None:
    train = datasets.Dataset(table()).cast_column("image", datasets.Image())
    train.save_to_disk(tmp_path / "one")
    assert load_prompts(str(tmp_path / "one"), "train") == EXPECTED
    assert load_prompts(f"{tmp_path / 'one'}:train", "train") == EXPECTED

    datasets.DatasetDict(train=train, test=train.select([1])).save_to_disk(tmp_path / "two")
    assert load_prompts(f"{tmp_path / 'two'}:test", "train") == EXPECTED[1:]
    for source in (f"{tmp_path / 'two'}", f"{tmp_path / 'two'}:validation"):
        with pytest.raises(
            PromptError, match=r"names no split; must be one of \S+two:train, \S+:t"
        ):
            load_prompts(source, "train")


def test_a_folder_of_data_files_is_read_as_the_hub_would(
    tmp_path: Path, datasets: Any, parquet: Any
) -> None:
    folder = tmp_path / "downloaded"
    (folder / "data").mkdir(parents=True)
    parquet.write_table(table(), folder / "data" / "train-00000-of-00001.parquet")
    parquet.write_table(table()[1:], folder / "data" / "test-00000-of-00001.parquet")
    assert load_prompts(f"{folder}:train", "train") == EXPECTED
    assert load_prompts(f"{folder}:default:test", "train") == EXPECTED[1:]
    with pytest.raises(PromptError, match=r"names no split; must be one of \S+d:train, \S+d:test"):
        load_prompts(str(folder), "train")
    with pytest.raises(PromptError, match=r"no dataset that can be loaded: .*'other' not found"):
        load_prompts(f"{folder}:other:test", "train")


def test_a_hub_name_is_parsed_and_loaded(datasets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def split_names(place: str, config: str | None) -> list[str]:
        return ["train"] if config is None else ["dev", "test"]

    def load_dataset(place: str, config: str | None, *, split: str) -> Any:
        asked.append((place, config, split))
        return datasets.Dataset(table())

    monkeypatch.setattr(datasets, "get_dataset_split_names", split_names)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("owner/name-1.0", "owner/name:train", "owner/name:config:dev"):
        assert load_prompts(source, "held_out") == EXPECTED
    assert asked == [
        ("owner/name-1.0", None, "train"),
        ("owner/name", None, "train"),
        ("owner/name", "config", "dev"),
    ]
    with pytest.raises(PromptError, match="one of owner/name:config:dev, owner/name:config:test"):
        load_prompts("owner/name:config:train", "train")


def test_an_unreachable_dataset_is_one_error(datasets: Any) -> None:
    with pytest.raises(PromptError, match="owner/name is no file, and no dataset that can be loa"):
        load_prompts("owner/name", "train")

"""Prompts: where they come from, which are held out, and the order in which training draws them.

Left out: embeddings of prompts (`models/text.py`).
"""

import copy
import csv
import hashlib
import io
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from treegrpo import hub
from treegrpo.errors import UserError
from treegrpo.textfile import read_utf8

if TYPE_CHECKING:
    from treegrpo.config import PromptsConfig

Split = Literal["train", "held_out"]

_MINIATURE_FILES: dict[Split, str] = {
    "train": "train_prompts.txt",
    "held_out": "heldout_prompts.txt",
}


class PromptError(UserError):
    """Prompts cannot be read, are none, or are not those that a checkpoint belongs to."""


@dataclass(frozen=True)
class Prompt:
    """A prompt and what its source says about it.

    Attributes:
        text: what the model is given; stripped, never empty.
        metadata: the other columns of the prompt's line, for rewards; {} where there are none.
    """

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)


# A row of a source: where it stands ("line 3"), and a prompt or the columns with one among them.
_Row = tuple[str, object]


def load_prompts(source: str, split: Split, column: str = "prompt") -> list[Prompt]:
    """Prompts of a source, in its order, without blank ones.

    The text is what makes a prompt: of lines with the same text the first is kept, and with it its
    metadata.

    Args:
        source: "miniature" for the embedded list; a file, read by how its name ends; or a Hugging
            Face dataset, which is a hub name or a folder with `:split` or `:config:split` after it
            where there are several.

            =============  ==================================================================
            .jsonl         one JSON string or object per line
            .json          one array of JSON strings or objects
            .csv           comma-separated, quoted as spreadsheets do; the first line names the
                           columns
            .tsv           tab-separated, quotes are text; the first line names the columns
            .parquet       a table; needs `treegrpo[datasets]`, as datasets do
            anything else  one prompt per line
            =============  ==================================================================

            Text files are UTF-8. Of tables and datasets, columns of binary data (images, sound) are
            not read.
        split: which of the embedded lists; the other sources ignore it.
        column: the column with the prompt, in upper or lower case if none has this very name.

    Raises:
        PromptError: the source is missing, unreadable, malformed, has no such column or a prompt
            that is not text, or holds no prompt; the message says where.
    """
    prompts: dict[str, Prompt] = {}
    for place, row in _rows(source, split):
        prompt = _prompt(row, column, f"prompts: {source}, {place}")
        if prompt.text:
            prompts.setdefault(prompt.text, prompt)
    if not prompts:
        raise PromptError(f"prompts: {source} holds no prompt")
    return list(prompts.values())


def load_train_and_held_out(settings: "PromptsConfig") -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts of a run.

    Without a source of their own, held-out prompts are the embedded ones where the miniature's are
    trained on, else a share of the training prompts.

    Raises:
        PromptError: see `load_prompts` and `split_prompts`.
    """
    train_prompts = load_prompts(settings.train, "train", settings.column)
    if settings.held_out is None and settings.train != "miniature":
        return split_prompts(train_prompts, settings.held_out_share)
    source, column = settings.held_out or settings.train, settings.held_out_column
    return train_prompts, load_prompts(source, "held_out", column or settings.column)


def split_prompts(
    prompts: Sequence[Prompt], held_out_share: float
) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts, told apart by a hash of the text.

    A prompt is on the same side in whatever list it stands, and a larger share only adds to the
    held-out side.

    Args:
        prompts: the prompts; both sides keep their order.
        held_out_share: about this share is held out, between 0 and 1.

    Raises:
        PromptError: nothing is left on one side.
    """
    sides: tuple[list[Prompt], list[Prompt]] = ([], [])
    for prompt in prompts:
        digest = hashlib.sha256(prompt.text.encode()).digest()
        sides[int.from_bytes(digest[:8]) < held_out_share * 2**64].append(prompt)
    train, held_out = sides
    if not train or not held_out:
        raise PromptError(
            f"prompts.held_out_share: got {held_out_share}; of {len(prompts)} prompts "
            f"{len(train)} train and {len(held_out)} are held out; must be some of both (or give "
            "prompts.held_out)"
        )
    return train, held_out


def overlap(train: Iterable[Prompt], held_out: Iterable[Prompt]) -> list[str]:
    """Texts that are in both, in the order of `held_out`."""
    trained = {prompt.text for prompt in train}
    return [prompt.text for prompt in held_out if prompt.text in trained]


class PromptSampler:
    """Draws prompts without replacement; when all have been drawn, a new shuffle begins.

    The order of an epoch depends on the number of prompts, the seed and the epoch's number alone,
    so the position in it is all that an exact resume needs.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        """Raises PromptError where `prompts` is empty."""
        if not prompts:
            raise PromptError("prompts: got none; must be at least one")
        self._prompts = tuple(prompts)
        self._seed = seed
        self._start_epoch(0)

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts; a prompt repeats only where an epoch ends among them."""
        drawn: list[Prompt] = []
        while len(drawn) < count:
            if self._position == len(self._order):
                self._start_epoch(self._epoch + 1)
            taken = self._order[self._position :][: count - len(drawn)]
            drawn += [self._prompts[index] for index in taken]
            self._position += len(taken)
        return drawn

    def upcoming(self, count: int) -> list[Prompt]:
        """The distinct prompts among the next `count`, as they will first be drawn; draws none."""
        # A shallow copy is enough: drawing replaces the order, it never changes it in place.
        return list({prompt.text: prompt for prompt in copy.copy(self).next(count)}.values())

    def state_dict(self) -> dict[str, int | str]:
        """What `load_state_dict` needs to continue exactly here; JSON values only."""
        return {
            "seed": self._seed,
            "epoch": self._epoch,
            "position": self._position,
            "prompts": self._fingerprint(),
        }

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Continue where `state_dict` was taken; the state's seed replaces this sampler's.

        Raises:
            PromptError: the state belongs to another prompt list; metadata does not matter.
        """
        if state["prompts"] != self._fingerprint():
            raise PromptError(
                f"the checkpoint was made with other prompts than these {len(self._prompts)}; "
                "resume with the list it was trained on"
            )
        self._seed = int(state["seed"])
        self._start_epoch(int(state["epoch"]))
        self._position = int(state["position"])

    def _start_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._position = 0
        # Only `Random.random` promises the same numbers in later Python versions; shuffle does not.
        generator = random.Random(f"{self._seed}/{epoch}")
        self._order = sorted(range(len(self._prompts)), key=lambda _: generator.random())

    def _fingerprint(self) -> str:
        texts = "\n".join(prompt.text for prompt in self._prompts)
        return hashlib.sha256(texts.encode()).hexdigest()


# --- from a row to a prompt ---


def _prompt(row: object, column: str, place: str) -> Prompt:
    if isinstance(row, Mapping):
        name = _find_column(row, column, place)
        text, metadata = row[name], {key: row[key] for key in row if key != name}
    else:
        text, metadata = row, {}
    if not isinstance(text, str):
        raise PromptError(f"{place}: got {text!r:.80}; the prompt must be text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PromptError(f"{place}: got {text!r:.80}, with half of a surrogate pair") from None
    return Prompt(text.strip(), metadata)


def _find_column(columns: Iterable[str], wanted: str, place: str) -> str:
    columns = list(columns)
    found = [name for name in columns if name == wanted]
    found = found or [name for name in columns if name.lower() == wanted.lower()]
    if len(found) != 1:
        raise PromptError(
            f"{place}: {'several columns' if found else 'no column'} {wanted!r}; the columns are "
            f"{', '.join(columns) or 'none'}"
        )
    return found[0]


# --- sources ---

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# FOLDER-OR-HUB-NAME[[:CONFIG]:SPLIT]
_DATASET = re.compile(r"(?P<place>[^:]+)((:(?P<config>[^:]+))?:(?P<split>[^:]+))?")


def _rows(source: str, split: Split) -> Iterator[_Row]:
    if source == "miniature":
        resource = files("treegrpo.miniature") / _MINIATURE_FILES[split]
        return _text_rows(resource.read_text(encoding="utf-8"), source)
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    match = _DATASET.fullmatch(source)
    if match and not path.is_file() and suffix not in _FILE_SUFFIXES:
        folder = Path(match["place"]).expanduser()
        if folder.is_dir() or _HUB_NAME.fullmatch(match["place"]):
            return _dataset_rows(source, folder, **match.groupdict())
    if suffix == ".parquet" and path.is_file():
        return _parquet_rows(path)
    return _PARSERS.get(suffix, _text_rows)(read_utf8(path, "prompt file", PromptError), source)


def _text_rows(text: str, source: str) -> Iterator[tuple[str, str]]:
    # StringIO ends lines as text files do; str.splitlines would also split at rarer characters
    # such as U+2028 inside a prompt.
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        yield f"line {number}", line


def _json_lines_rows(text: str, source: str) -> Iterator[_Row]:
    for place, line in _text_rows(text, source):
        if not line.strip():
            continue
        try:
            row = json.loads(line.rstrip(), object_pairs_hook=_columns)
        except json.JSONDecodeError as error:
            raise PromptError(
                f"prompts: {source}, {place}: not JSON: {error.msg}, column {error.colno}"
            ) from None
        except (ValueError, RecursionError) as error:  # a key twice, a huge number, a deep nest
            raise PromptError(f"prompts: {source}, {place}: {error}") from None
        yield place, row


def _columns(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The keys of a JSON object, each of which must be given once."""
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is given twice")
    return row


def _json_array_rows(text: str, source: str) -> Iterator[_Row]:
    try:
        rows = json.loads(text, object_pairs_hook=_columns)
    except json.JSONDecodeError as error:
        raise PromptError(
            f"prompts: {source}, line {error.lineno}: not JSON: {error.msg}, column {error.colno} "
            "(a file of one JSON value per line must be named .jsonl)"
        ) from None
    except (ValueError, RecursionError) as error:
        raise PromptError(f"prompts: {source}: {error}") from None
    if not isinstance(rows, list):
        raise PromptError(
            f"prompts: {source} holds one JSON {type(rows).__name__}; must be an array of strings "
            "or objects"
        )
    for number, row in enumerate(rows, 1):
        yield f"item {number}", row


def _csv_rows(text: str, source: str) -> Iterator[_Row]:
    return _separated_rows(csv.reader(io.StringIO(text, newline=""), strict=True), source)


def _tsv_rows(text: str, source: str) -> Iterator[_Row]:
    # Tab-separated values know no quoting (IANA, text/tab-separated-values): a prompt of
    # PartiPrompts begins with a quotation mark of its own.
    lines = io.StringIO(text, newline=None)
    return _separated_rows(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE), source)


def _separated_rows(reader: Any, source: str) -> Iterator[_Row]:
    try:
        columns: list[str] = next((cells for cells in reader if cells), [])
        _check_columns(columns, source)
        for cells in reader:
            place = f"line {reader.line_num}"
            if cells and len(cells) != len(columns):
                raise PromptError(
                    f"prompts: {source}, {place}: got {len(cells)} cells; must be {len(columns)}, "
                    "as in the first line"
                )
            if cells:
                yield place, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise PromptError(f"prompts: {source}, line {reader.line_num}: {error}") from None


_PARSERS = {
    ".jsonl": _json_lines_rows,
    ".json": _json_array_rows,
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
}
# Names that end so are files, even where there is none: a slip must not be looked up on the hub.
_FILE_SUFFIXES = {*_PARSERS, ".parquet", ".txt"}


def _check_columns(columns: Sequence[str], source: str) -> None:
    twice = [name for name in columns if columns.count(name) > 1]
    if twice:
        raise PromptError(f"prompts: {source}: the column {twice[0]!r} is given twice")


def _parquet_rows(path: Path) -> Iterator[_Row]:
    parquet = _import("pyarrow.parquet", str(path))
    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(file.schema_arrow.names, str(path))
            columns = _text_columns(file.schema_arrow)
            tables = [file.read(columns)]
    except PromptError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's own errors are among these
        raise PromptError(f"prompts: {path} is no Parquet file: {error}") from error
    return _arrow_rows(tables)


def _dataset_rows(
    source: str, folder: Path, place: str, config: str | None, split: str | None
) -> Iterator[_Row]:
    datasets = _import("datasets", source)
    problem = None if folder.is_dir() else hub.why_not_there()
    saved = any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            loaded = datasets.load_from_disk(folder)
            if not isinstance(loaded, dict):
                loaded = {str(loaded.split or "train"): loaded}
            splits = list(loaded)
        else:
            place = str(folder) if folder.is_dir() else place
            splits = datasets.get_dataset_split_names(place, config)
        chosen = splits[0] if split is None and len(splits) == 1 else split
        if chosen in splits:
            dataset = (
                loaded[chosen] if saved else datasets.load_dataset(place, config, split=chosen)
            )
    except Exception as error:  # Network, access, format: they have no base class in common.
        raise PromptError(
            f"prompts: {source} is no file, and no dataset that can be loaded: "
            f"{problem or error.__cause__ or error}"
        ) from error
    if chosen not in splits:
        listed = ", ".join(f"{source.removesuffix(f':{split}')}:{name}" for name in splits)
        raise PromptError(f"prompts: {source} names no split; must be one of {listed}")
    dataset = dataset.select_columns(_text_columns(dataset.features.arrow_schema))
    return _arrow_rows(dataset.with_format("arrow").iter(batch_size=1000))


def _arrow_rows(tables: Iterable[Any]) -> Iterator[_Row]:
    rows = (row for table in tables for row in table.to_pylist())
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


def _text_columns(schema: Any) -> list[str]:
    """Names of an Arrow schema's columns that hold no binary data, however deep."""

    def is_binary(kind: Any) -> bool:
        inner = [kind.field(index).type for index in range(kind.num_fields)]
        return any(map(is_binary, inner)) if inner else "binary" in str(kind)

    return [column.name for column in schema if not is_binary(column.type)]


def _import(module: str, source: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError:
        raise PromptError(
            f"prompts: {source} needs the package {module.partition('.')[0]}, which is not "
            "installed; pip install 'treegrpo[datasets]'"
        ) from None

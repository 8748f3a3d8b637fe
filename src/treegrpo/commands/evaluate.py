"""`treegrpo evaluate`: a model beside its base, with progress, a table, a JSON file and a page.

Left out: sampling and scoring (`evaluation/`), what table, JSON and page look like
(`report/comparison.py`).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from treegrpo.commands import arguments
from treegrpo.config import ModelConfig, parse_yaml
from treegrpo.errors import UserError
from treegrpo.models.folder import INDEX_FILE, LORA_FILE, SAMPLING_FILE, read_json
from treegrpo.prompts import load_prompts
from treegrpo.rewards import Reward, RewardError, closing, load_reward
from treegrpo.run_folder import CONFIG_FILE, FAILED_REWARD_FOLDER, MODEL_FOLDER, write_atomically
from treegrpo.textfile import read_utf8

if TYPE_CHECKING:
    from rich.console import Console

    from treegrpo.evaluation.results import Comparison
    from treegrpo.evaluation.sampling import Draws
    from treegrpo.models.policy import Policy
    from treegrpo.report.comparison import Pictures

_SECONDS_PER_WRITE = 5.0  # of the JSON, whose scores grow with every batch


def evaluate(
    model: arguments.Model,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help='What to compare with; "none": nothing.',
            show_default="what an exported model was trained from, else none",
        ),
    ] = None,
    prompts: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="A .txt file with one prompt per line, a .jsonl, .json, .csv, .tsv or .parquet "
            'file, or a dataset; "miniature": its held-out prompts.',
        ),
    ] = "miniature",
    column: arguments.Column = "prompt",
    rewards: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME,...",
            help="The rewards, separated by commas.",
            show_default="composition,composition_accuracy for the miniature's prompts",
        ),
    ] = None,
    reward: Annotated[
        list[str] | None, typer.Option(help="One more reward; may be given several times.")
    ] = None,
    reward_options: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml",
            help="Options of rewards, by name, such as {hpsv2: {path: /models/hps}}.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds of the noises: 0, 1, ...")] = 1,
    images_per_prompt: Annotated[int, typer.Option(min=1, help="Images per prompt and seed.")] = 2,
    max_prompts: arguments.MaxPrompts = None,
    steps: arguments.Steps = None,
    guidance_scale: arguments.GuidanceScale = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Most images sampled at once.")] = 16,
    dtype: arguments.DType = "float32",
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="Also write figures and every prompt's scores here."
        ),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER|FILE.html", help="Also write a web page with the images side by side."
        ),
    ] = None,
) -> None:
    """Measure a model by rewards, beside the model that it was trained from.

    Both draw every prompt from the same noises.
    """
    given = load_prompts(prompts, "held_out", column)[:max_prompts]
    options = _read_rewards(rewards, reward or [], reward_options, prompts)
    section = arguments.model_section(model, dtype, guidance_scale)
    arguments.check_model(model, "MODEL")
    if base is None:
        base = _known_base(model)
    elif base == "none":
        base = None
    else:
        arguments.check_model(base, "--base")
    page = _check_outputs(json_file, page)

    from treegrpo.batch_size import BatchSize
    from treegrpo.console import plain_console
    from treegrpo.evaluation.pair import describe_sampling, open_pair
    from treegrpo.evaluation.results import Comparison
    from treegrpo.evaluation.sampling import Draws, decode_batch_of
    from treegrpo.report import comparison as report
    from treegrpo.rewards import check_prompts
    from treegrpo.versions import versions

    policies = open_pair(section, base, steps=steps)
    loaded = {name: load_reward(name, of) for name, of in options.items()}
    check_prompts(loaded, given)
    settings = {
        "source": prompts,
        "seeds": seeds,
        "images_per_prompt": images_per_prompt,
        "max_batch": max_batch,
        **describe_sampling(policies[-1]),
        "dtype": dtype,
        "reward_options": {name: of for name, of in options.items() if of},
        "versions": versions(),
    }
    comparison = Comparison(model, base, given, list(options), seeds * images_per_prompt, settings)
    decode_batch = decode_batch_of(policies[-1])
    sampled = BatchSize(max_batch, "--max-batch")
    draws = Draws(images_per_prompt, policies[-1].sampling.steps, 0, sampled, decode_batch)
    shown = [] if page is None else report.pictured(len(given))
    pictures: Pictures = {index: {role: [] for role in comparison.roles} for index in shown}
    console = plain_console()
    _fill(comparison, pictures, policies, section, loaded, draws, console, json_file, page)
    console.print(report.table(comparison))
    if json_file is not None:
        console.print(f"wrote {json_file}")
    if page is not None:
        page.parent.mkdir(exist_ok=True)
        report.write_page(page, comparison, pictures)
        console.print(f"wrote {page}")
    if comparison.failures:
        raise RewardError("; ".join(comparison.failures.values()))


# --- what is refused before anything heavy is imported ---


def _read_rewards(
    listed: str | None, single: Sequence[str], options_file: Path | None, prompts: str
) -> dict[str, dict[str, Any]]:
    """Names of the rewards, and their options."""
    fields = [(name.strip(), "--rewards") for name in listed.split(",")] if listed else []
    fields += [(name, "--reward") for name in single]
    if not fields:
        if prompts != "miniature":
            raise UserError("--rewards: must be given, such as --rewards clip_score,aesthetic")
        fields = [(name, "--rewards") for name in ("composition", "composition_accuracy")]
    options: dict[str, dict[str, Any]] = {}
    if options_file is not None:
        text = read_utf8(options_file, "--reward-options:", UserError)
        options = parse_yaml(text, f"--reward-options: {options_file}") or {}
        if not isinstance(options, dict) or not all(isinstance(o, dict) for o in options.values()):
            raise UserError(
                f"--reward-options: {options_file} must hold options by reward, such as "
                "{hpsv2: {path: /models/hps}}"
            )
    names = [name for name, _ in fields]
    for name in options:
        if name not in names:
            raise UserError(
                f"--reward-options: {options_file} has options of {name!r}; the rewards are "
                f"{', '.join(names)}"
            )
    for name, field in fields:
        if names.count(name) > 1:
            raise UserError(f"{field}: {name!r} is given {names.count(name)} times")
        arguments.check_reward_of(field, name, options.get(name))
    return {name: options.get(name, {}) for name in names}


def _known_base(model: str) -> str | None:
    """What an exported model was trained from, as its own folder or its run's says."""
    folder = Path(model).expanduser().absolute()
    run = folder.parent / CONFIG_FILE
    if (folder / LORA_FILE).is_file():
        place = f"base_model in {folder / SAMPLING_FILE}"
        base = read_json(folder / SAMPLING_FILE, "MODEL").get("base_model")
    elif folder.name == MODEL_FOLDER and (folder / INDEX_FILE).is_file() and run.is_file():
        place = f"model.path in {run} (--base names another)"
        try:
            base = yaml.safe_load(read_utf8(run, "configuration file", UserError))["model"]["path"]
        except (yaml.YAMLError, TypeError, KeyError):
            return None  # not the configuration of a run
    else:
        return None
    if not isinstance(base, str):
        return None
    arguments.check_model(base, place)
    return base


def _check_outputs(json_file: Path | None, page: Path | None) -> Path | None:
    """Refuse files that cannot be written; the page's own, where a folder is given."""
    arguments.check_output(json_file, "--json")
    if page is None:
        return None
    if page.suffix.lower() in (".html", ".htm"):
        file = page
        arguments.check_output(file, "--page")
    else:
        if page.exists() and not page.is_dir():
            raise UserError(f"--page: {page} is a file; must be a folder, or a file named .html")
        file = page / "index.html"
        arguments.check_output(file if page.is_dir() else page, "--page")
    if json_file is not None and json_file.resolve() == file.resolve():
        raise UserError(f"--json and --page: both got {json_file}; must be two files")
    return file


# --- the work ---


def _fill(
    comparison: Comparison,
    pictures: Pictures,
    policies: list[Policy],
    section: ModelConfig,
    rewards: Mapping[str, Reward],
    draws: Draws,
    console: Console,
    json_file: Path | None,
    page: Path | None,
) -> None:
    """Sample and score one model after the other; `policies` is empty then.

    Raises:
        RewardError: all rewards have failed.
    """
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from treegrpo.evaluation.pair import score_into
    from treegrpo.evaluation.results import BASE
    from treegrpo.images import middle_frames
    from treegrpo.report.comparison import PICTURED_PAIRS, thumbnail

    folder = next((path.parent for path in (json_file, page) if path is not None), None)
    keep_folder = None if folder is None else folder / FAILED_REWARD_FOLDER
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    failures = 0
    for role in comparison.roles:
        console.print(f"sampling {comparison.base if role == BASE else comparison.model}")
        with (
            closing(rewards),
            _writing(json_file, comparison) as write_now_and_then,
            Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        ):
            task = progress.add_task(role, total=len(comparison.prompts) * comparison.noises)
            # Popped, so that nothing keeps the first model in memory.
            for indices, noises, images in score_into(
                comparison, role, policies.pop(0), section, rewards, draws, keep_folder
            ):
                write_now_and_then()
                if comparison.failures.keys() == rewards.keys():
                    raise RewardError("; ".join(comparison.failures.values()))
                for message in list(comparison.failures.values())[failures:]:
                    console.print(f"error: {message}; going on without it")
                failures = len(comparison.failures)
                wanted = max(0, PICTURED_PAIRS - noises.start)
                for index, row in zip(indices, middle_frames(images), strict=True):
                    if index in pictures:
                        pictures[index][role] += [thumbnail(one) for one in row[:wanted]]
                progress.advance(task, len(indices) * len(noises))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def _writing(json_file: Path | None, comparison: Comparison) -> Iterator[Callable[[], None]]:
    """Yields what writes the file, if it was not written lately.

    Whatever ends the work, all that was scored is left in the file.
    """
    from treegrpo.report.comparison import to_json

    written = time.monotonic()

    def write(pause: float = _SECONDS_PER_WRITE) -> None:
        nonlocal written
        if json_file is not None and time.monotonic() - written >= pause:
            write_atomically(json_file, to_json(comparison))
            written = time.monotonic()

    try:
        yield write
    finally:
        write(pause=0)

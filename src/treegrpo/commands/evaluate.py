"""`treegrpo evaluate`: a model beside its base, with progress, a table, a JSON file and a page.

Left out: sampling and scoring (`evaluation/`), what table, JSON and page look like
(`report/comparison.py`).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treegrpo.commands import arguments
from treegrpo.config import Config, ModelConfig, RewardConfig, load_config, parse_yaml
from treegrpo.errors import Problems, UserError
from treegrpo.miniature import EMBEDDED
from treegrpo.models.folder import LORA_FILE
from treegrpo.prompts import Prompt, load_prompts, load_train_and_held_out
from treegrpo.rewards import (
    Reward,
    RewardError,
    check_prompts,
    closing,
    load_reward,
    try_reward,
)
from treegrpo.run_folder import FAILED_REWARD_FOLDER, write_atomically
from treegrpo.textfile import read_utf8

if TYPE_CHECKING:
    import torch
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
    base_model: arguments.BaseModel = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A .txt file with one prompt per line, a .jsonl, .json, .csv, .tsv or .parquet "
            'file, or a dataset; "miniature": its held-out prompts.',
            show_default="the held-out prompts of the run that the model is of",
        ),
    ] = None,
    column: arguments.Column = "prompt",
    rewards: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME,...",
            help="The rewards, separated by commas; those of the model's run have its options.",
            show_default="those of the run that the model is of",
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
    device: arguments.Device = "auto",
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

    Both draw every prompt from the same noises. MODEL may be a run's folder; prompts and rewards
    are those of the run, if there is one, where they are not given.
    """
    problems = Problems()
    model, run_file = arguments.model_of(model)
    run = _Run.of(run_file)
    given: list[Prompt] = []
    with problems.collecting():
        given = _read_prompts(prompts, column, model, run)[:max_prompts]
    asked = _read_rewards(rewards, reward or [], reward_options, prompts or model, run, problems)
    section, compared = ModelConfig(), None
    with problems.collecting(), arguments.named_as_options():
        section = arguments.model_section(model, dtype=dtype, guidance_scale=guidance_scale)
        arguments.check_sampled(model, base_model)
        if base is None:
            compared = _known_base(model, base_model, run)
    with problems.collecting():
        if base not in (None, "none"):
            arguments.check_model(base, "--base")
            compared = base
    with problems.collecting():
        page = _check_outputs(json_file, page)
    problems.refuse()

    from treegrpo.batch_size import BatchSize
    from treegrpo.console import plain_console
    from treegrpo.device import usable_device
    from treegrpo.evaluation.pair import describe_sampling, open_pair
    from treegrpo.evaluation.results import Comparison
    from treegrpo.evaluation.sampling import Draws, decode_batch_of
    from treegrpo.report import comparison as report
    from treegrpo.versions import versions

    place = usable_device(device, "--device")
    policies: list[Policy] = []
    with problems.collecting(), arguments.named_as_options():
        policies = open_pair(section, compared, device=place, steps=steps, base_model=base_model)
    size = policies[-1].sampling.size if policies else None
    loaded = _load_rewards(asked, given, size, place, problems)
    problems.refuse()
    settings = {
        "source": prompts or (model if run.config is None else f"held-out prompts of {run.file}"),
        "seeds": seeds,
        "images_per_prompt": images_per_prompt,
        "max_batch": max_batch,
        **describe_sampling(policies[-1]),
        "dtype": dtype,
        "reward_options": {name: of.options for name, of in asked.items() if of.options},
        "versions": versions(),
    }
    noises = seeds * images_per_prompt
    comparison = Comparison(model, compared, given, list(asked), noises, settings)
    decode_batch = decode_batch_of(policies[-1])
    sampled = BatchSize(max_batch, "--max-batch")
    draws = Draws(images_per_prompt, policies[-1].sampling.steps, 0, sampled, decode_batch)
    shown = [] if page is None else report.pictured(len(given))
    pictures: Pictures = {index: {role: [] for role in comparison.roles} for index in shown}
    console = plain_console()
    frames = {name: of.frames for name, of in asked.items()}
    _fill(comparison, pictures, policies, section, loaded, frames, draws, console, json_file, page)
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


@dataclass(frozen=True)
class _Run:
    """The run that a model is of, if it is of one.

    Attributes:
        file: its configuration's.
        problem: why that cannot be read.
    """

    file: Path | None = None
    config: Config | None = None
    problem: str = "MODEL is of no run"

    @staticmethod
    def of(file: Path | None) -> _Run:
        if file is None:
            return _Run()
        try:
            return _Run(file, load_config(file, []))
        except UserError as error:
            return _Run(file, None, str(error))


def _read_prompts(source: str | None, column: str, model: str, run: _Run) -> list[Prompt]:
    if source is None and run.config is not None:
        held_out = load_train_and_held_out(run.config.prompts)[1]
        return held_out[: run.config.evaluation.max_prompts]
    if source is None and model not in EMBEDDED:
        raise UserError(f"--prompts: must be given, such as --prompts held_out.txt ({run.problem})")
    return load_prompts(source or "miniature", "held_out", column)


def _read_rewards(
    listed: str | None,
    single: Sequence[str],
    options_file: Path | None,
    source: str,
    run: _Run,
    problems: Problems,
) -> dict[str, RewardConfig]:
    """The rewards by what they are called; those of the run as it has them."""
    of_run = {} if run.config is None else {reward.key: reward for reward in run.config.rewards}
    fields = [(name.strip(), "--rewards") for name in listed.split(",")] if listed else []
    fields += [(name, "--reward") for name in single]
    if not fields:
        own = ("composition", "composition_accuracy") if source in EMBEDDED else ()
        fields = [(name, "--rewards") for name in of_run or own]
    names = [name for name, _ in fields]
    options: dict[str, dict[str, Any]] = {}
    with problems.collecting():
        if not fields:
            raise UserError(
                f"--rewards: must be given, such as --rewards clip_score,aesthetic ({run.problem})"
            )
    with problems.collecting():
        options = _read_options(options_file, names)
    rewards: dict[str, RewardConfig] = {}
    for name, field in fields:
        with problems.collecting():
            if names.count(name) > 1:
                raise UserError(f"{field}: {name!r} is given {names.count(name)} times")
            reward = of_run.get(name) or RewardConfig.model_construct(name=name)
            reward = reward.model_copy(update={"options": options.get(name, reward.options)})
            rewards[name] = reward
            arguments.check_reward_of(field, reward.name, reward.options)
    return rewards


def _read_options(file: Path | None, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    if file is None:
        return {}
    text = read_utf8(file, "--reward-options:", UserError)
    options = parse_yaml(text, f"--reward-options: {file}") or {}
    if not isinstance(options, dict) or not all(isinstance(o, dict) for o in options.values()):
        raise UserError(
            f"--reward-options: {file} must hold options by reward, such as "
            "{hpsv2: {path: /models/hps}}"
        )
    for name in options:
        if name not in names:
            raise UserError(
                f"--reward-options: {file} has options of {name!r}; the rewards are "
                f"{', '.join(names)}"
            )
    return options


def _known_base(model: str, base_model: str | None, run: _Run) -> str | None:
    """What an exported model was trained from, as its own folder or its run's says."""
    folder = Path(model).expanduser()
    if (folder / LORA_FILE).is_file():
        return arguments.base_of_lora(folder, base_model)
    if run.config is None:
        return None
    base = run.config.model.path
    arguments.check_model(base, f"model.path in {run.file} (--base names another)")
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


def _load_rewards(
    asked: Mapping[str, RewardConfig],
    prompts: Sequence[Prompt],
    size: tuple[int, int] | None,
    device: torch.device,
    problems: Problems,
) -> dict[str, Reward]:
    loaded: dict[str, Reward] = {}
    for name, reward in asked.items():
        with problems.collecting():
            made = load_reward(reward.name, reward.options)
            check_prompts({name: made}, prompts)
            try_reward(name, made, prompts[0], size, device)
            loaded[name] = made
    return loaded


def _fill(
    comparison: Comparison,
    pictures: Pictures,
    policies: list[Policy],
    section: ModelConfig,
    rewards: Mapping[str, Reward],
    frames: Mapping[str, int],
    draws: Draws,
    console: Console,
    json_file: Path | None,
    page: Path | None,
) -> None:
    """Sample and score one model after the other; `policies` is empty then.

    Raises:
        RewardError: all rewards have failed.
        NotFiniteError: says of which model something is not finite.
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
        name = comparison.base if role == BASE else comparison.model
        console.print(f"sampling {name}")
        with (
            _telling_of_which(comparison, role),
            closing(rewards),
            _writing(json_file, comparison) as write_now_and_then,
            Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        ):
            task = progress.add_task(role, total=len(comparison.prompts) * comparison.noises)
            # Popped, so that nothing keeps the first model in memory.
            for indices, noises, images in score_into(
                comparison, role, policies.pop(0), section, rewards, draws, keep_folder, frames
            ):
                write_now_and_then()
                if comparison.failures.keys() == rewards.keys():
                    raise RewardError("; ".join(comparison.failures.values()))
                for message in list(comparison.failures.values())[failures:]:
                    console.print(f"going on without a reward that failed: {message}")
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
def _telling_of_which(comparison: Comparison, role: str) -> Iterator[None]:
    """Say of which of two models something is not finite."""
    from treegrpo.evaluation.results import BASE
    from treegrpo.finite import NotFiniteError

    try:
        yield
    except NotFiniteError as error:
        if comparison.base is None:
            raise
        name = comparison.base if role == BASE else comparison.model
        raise NotFiniteError(f"the {role} model ({name}): {error}") from error


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

"""`treegrpo compare`: methods, or settings of one, at equal cost, with a table and a page.

Left out: the comparison itself (`comparison/`).
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from treegrpo.commands.arguments import (
    INTERRUPTED,
    ConfigArguments,
    check_model,
    check_reward_of,
    file_and_changes,
)
from treegrpo.comparison.budget import Budget
from treegrpo.comparison.entries import (
    Shared,
    make_entries,
    read_changes,
    read_grids,
    read_methods,
    read_variants,
)
from treegrpo.comparison.study import Study
from treegrpo.config import ABLATIONS, Config
from treegrpo.errors import UserError
from treegrpo.models.folder import check_trainable, is_diffusion, resolve
from treegrpo.prompts import load_train_and_held_out
from treegrpo.tracking import check_trackers

if TYPE_CHECKING:
    from treegrpo.comparison.running import Results


def compare(
    arguments: ConfigArguments = None,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME,...",
            help="The methods; with --variants or --sweep, the configuration's own.",
            show_default="all built-in ones",
        ),
    ] = None,
    variants: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.yaml | ABLATION",
            help="Compare settings by name, such as {wide: {rollout.branching: 4}}. "
            f"Ablations: {', '.join(ABLATIONS)}.",
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE,VALUE",
            help="Compare the values of a key; given several times, every combination.",
        ),
    ] = None,
    tune: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE,VALUE",
            help="Give each its best value, on a seed that is not reported; given several times, "
            "of every combination.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="N | Nminutes | Niterations",
            help="What every run may spend: a number of forwards, minutes or iterations.",
            show_default="what the configuration's method spends over train.iterations",
        ),
    ] = None,
    backward_cost: Annotated[
        float,
        typer.Option(
            min=0, help="Forwards that a row with gradient, forward and backward, counts as."
        ),
    ] = 2.5,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds that are reported.")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    tuning_seed: Annotated[
        int | None,
        typer.Option(
            min=0, help="The seed to tune on.", show_default="1000 after the first reported one"
        ),
    ] = None,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where all of it goes.")] = Path(
        "runs/compare"
    ),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the comparison in the output folder.")
    ] = False,
) -> None:
    """Compare methods, or settings of one, at equal cost.

    Ctrl-C ends it with exit code 130, and the same command continues it. docs/compare.md says how
    costs are counted and what each method is given.
    """
    study = _study(
        arguments,
        methods,
        variants,
        sweep or [],
        tune or [],
        budget,
        backward_cost,
        range(first_seed, first_seed + seeds),
        tuning_seed,
        output,
    )
    path = study.config(study.entries[0]).model.path
    study = study.for_model(flow=not is_diffusion(path))
    study.check()
    if Path(resolve(path)).is_dir():  # of a hub's checkpoint, what it is shows when it is here
        study.check_folder(overwrite=overwrite)
    _check_job(study.config(study.entries[0]))

    from treegrpo.comparison import page
    from treegrpo.comparison.running import Interrupted, run_study
    from treegrpo.comparison.study import PAGE_FILE, RESULTS_FILE
    from treegrpo.console import plain_console
    from treegrpo.run_folder import write_atomically

    study = _on_model(study)
    study.check_folder(overwrite=overwrite)
    study.prepare_folder(overwrite=overwrite)
    console = plain_console()

    def say(text: str) -> None:
        console.print(text, soft_wrap=True)

    def write(found: Results) -> None:
        write_atomically(study.folder / RESULTS_FILE, page.to_json(study, found))

    try:
        results = run_study(study, say, write)
    except (Interrupted, KeyboardInterrupt):
        say("interrupted; continue with the same command")
        raise typer.Exit(INTERRUPTED) from None
    write_atomically(study.folder / PAGE_FILE, page.page(study, results))
    console.print(page.table(study, results))
    for note in (*page.failures(results), *page.notes(results)):
        say(note)
    say(f"wrote {study.folder / PAGE_FILE}")


def _study(
    arguments: list[str] | None,
    methods: str | None,
    variants: str | None,
    sweep: list[str],
    tune: list[str],
    budget: str | None,
    factor: float,
    seeds: range,
    tuning_seed: int | None,
    output: Path,
) -> Study:
    """What is asked for, of which nothing has been looked at but names and values."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("compare runs in one process; start it without a launcher")
    if not math.isfinite(factor):
        raise UserError(f"--backward-cost: got {factor}; must be finite")
    file, changes = file_and_changes(arguments, otherwise="miniature-paper")
    shared = Shared(file, read_changes(changes))
    sweeps, tunes = read_grids("--sweep", sweep), read_grids("--tune", tune)
    both = {grid.key for grid in sweeps} & {grid.key for grid in tunes}
    if both:
        raise UserError(f"--tune {both.pop()}: is swept; must be another key")
    entries = make_entries(shared, read_methods(methods), read_variants(variants), sweeps)
    return Study.of(
        shared,
        entries,
        seeds=seeds,
        tuning_seed=tuning_seed,
        budget=None if budget is None else Budget.of(budget),
        factor=factor,
        tunes=tunes,
        folder=output.expanduser(),
    )


def _check_job(config: Config) -> None:
    """Refuse what no run could use."""
    check_trackers(config.tracking)
    load_train_and_held_out(config.prompts)
    for index, reward in enumerate(config.rewards):
        check_reward_of(f"rewards.{index}.name", reward.name, reward.options)
    check_model(config.model.path, "model.path")
    check_trainable(config.model.path, in_full=not config.model.lora_rank)


def _on_model(study: Study) -> Study:
    """The comparison with what was published for such a model, which can run it."""
    import torch

    from treegrpo.models.opening import open_policy

    model, device = study.config(study.entries[0]).model, torch.device("cpu")
    schedules = {
        steps: open_policy(model, device=device, steps=steps).schedule(steps)
        for steps in study.steps()
    }
    study = study.for_model(flow=next(iter(schedules.values())).is_flow)
    study.check_model(schedules)
    return study

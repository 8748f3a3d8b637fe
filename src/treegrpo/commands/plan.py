"""`treegrpo plan`: what an iteration of a configuration takes of forwards and of memory.

Nothing is trained and no weight is read.

Left out: how memory is estimated and settings are sought (`memory/`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from treegrpo.commands.arguments import ConfigArguments, check_model, check_output, read_config
from treegrpo.config import Config, ModelConfig, changed, method_of
from treegrpo.console import plain_console
from treegrpo.errors import Problems, UserError
from treegrpo.methods.method import transition_kind
from treegrpo.models.folder import check_trainable, is_diffusion
from treegrpo.plan import PlanError

if TYPE_CHECKING:
    from treegrpo.memory import Advice, Batches, Estimate

_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{ending}": base**power
    for ending, base in (("b", 1000), ("ib", 1024))
    for power, prefix in enumerate("kmgt", start=1)
}


def parse_memory(text: str) -> int:
    """Bytes of a size such as "24GiB", "24 GB" or "24000000000".

    Raises:
        UserError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([A-Za-z]*)", text.strip())
    size = _UNITS.get(match[2].lower()) if match else None
    result = int(float(match[1]) * size) if match and size else 0
    is_forgotten = match is not None and not match[2] and result < 10**6  # "24" is no 24 bytes
    if not result or is_forgotten:
        raise UserError(
            f"--memory: got {text!r}; must be a size such as 24GiB (1024^3 bytes), 24GB (1000^3 "
            "bytes) or a number of bytes, at least a million"
        )
    return result


@dataclass(frozen=True)
class PlanWork:
    """Forwards (rows) that one prompt takes under one of a run's plans.

    Attributes:
        name: what tells the plan from the others, such as "window at 3".
        share: of the iterations that follow it.
        rollout: to sample.
        update: of one pass over the prompt's samples, with gradient.
    """

    name: str
    share: float
    rollout: int
    update: int


@dataclass(frozen=True)
class Work:
    """The work of an iteration.

    A forward is one row through the network; classifier-free guidance makes two rows of it.

    Attributes:
        rollout, update, reference: forwards per prompt, on average over the plans; an update's over
            all its passes, the reference's where there is a KL term.
        rows_per_forward: 2 under classifier-free guidance, else 1.
        prompts, leaves: per iteration, and per prompt.
        updates: optimizer steps.
    """

    plans: tuple[PlanWork, ...]
    rollout: float
    update: float
    reference: float
    rows_per_forward: int
    prompts: int
    leaves: int
    processes: int
    updates: int

    @property
    def images(self) -> int:
        """Decoded and scored per iteration."""
        return self.prompts * self.leaves


def count_work(config: Config, *, guided: bool, processes: int = 1) -> Work:
    """Forwards on average over the random window's distribution, else over the run's iterations.

    Raises:
        PlanError: the window or the leaves do not fit.
    """
    method = method_of(config)
    shares = method.checked_plans(config.train.iterations)
    works = tuple(
        PlanWork(s.name, s.share, s.plan.rollout_forwards, method.update_forwards(s.plan))
        for s in shares
    )
    passes = config.train.inner_epochs
    update = sum(work.share * work.update for work in works)
    return Work(
        works,
        sum(work.share * work.rollout for work in works),
        update * passes,
        update if method.needs_reference else 0.0,
        2 if guided else 1,
        config.rollout.prompts_per_iteration,
        max(share.plan.leaves for share in shares),
        processes,
        passes * config.train.updates_per_iteration,
    )


def plan(
    arguments: ConfigArguments = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory of a device, such as 24GiB, to fit into; without it: what is free here.",
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes (GPUs) that share the prompts.")
    ] = 1,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures here.")
    ] = None,
) -> None:
    """Say what an iteration takes of forwards and of memory, without reading any weight."""
    problems, limit = Problems(), None
    config, faulty = read_config(arguments, problems)
    with problems.collecting():
        limit = None if memory is None else parse_memory(memory)
    with problems.collecting():
        check_model(config.model.path, "model.path", weights=False)
        check_trainable(config.model.path, in_full=not config.model.lora_rank)
    with problems.collecting():
        check_output(json_file, "--json")
    if not faulty & {"rollout", "train"}:
        with problems.collecting(PlanError):
            transition_kind(config.rollout, is_flow=not is_diffusion(config.model.path))
            config.check_shares(processes)
            method_of(config).checked_plans(config.train.iterations)
    problems.refuse()

    from treegrpo.memory import LEAST, Batches, Measurements, automatic, estimate, fitting, suggest

    measurements = Measurements(config.rollout.steps)
    auto, room = LEAST, limit or _free(config.model)
    if room is not None:
        auto = fitting(config, room, processes=processes, measurements=measurements)
    needed = estimate(config, auto, processes=processes, measurements=measurements)
    batches = Batches.of(config, auto)
    work = count_work(config, guided=needed.guided, processes=processes)
    console = plain_console()
    for table in (_work_table(work), _memory_table(needed)):
        console.print(table)
    if config.model.device == "auto" and needed.device == "cpu":
        console.print("there is no GPU here; model.device=cuda plans for one", soft_wrap=True)
    console.print(_sizes(work, needed), soft_wrap=True)
    console.print(_disk(config, needed), soft_wrap=True)
    console.print(_batches(config, batches, room), soft_wrap=True)
    advice = None
    if limit is not None:
        if needed.peak > limit:
            advice = suggest(config, limit, processes=processes, measurements=measurements)
        _print_advice(console, needed, limit, advice)
        if advice is not None and advice.fits and automatic(config):
            better = changed(config, {change.key: change.value for change in advice.changes})
            auto = fitting(better, limit, processes=processes, measurements=measurements)
            console.print(f"then {_batches(better, auto, limit)}", soft_wrap=True)
    if json_file is not None:
        summary = {
            "work": {**asdict(work), "images": work.images},
            "memory": {**asdict(needed), "peak": needed.peak},
            "batches": asdict(batches),
            "limit": limit,
            "fits": None if limit is None else needed.peak <= limit,
            "advice": None if advice is None else asdict(advice),
        }
        json_file.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def _free(model: ModelConfig) -> int | None:
    """Free bytes of the configured device; None: it is not in this machine."""
    from treegrpo.device import free_memory, usable_device

    try:
        return free_memory(usable_device(model.device, "model.device"))
    except UserError:
        return None


# --- printing ---


def _work_table(work: Work) -> Table:
    table = Table(title="forwards of an iteration", title_justify="left")
    table.add_column("")
    for name in ("per prompt", "all prompts", "per process"):
        table.add_column(name, justify="right")
    if work.rows_per_forward == 2:
        table.add_column("with guidance", justify="right")

    def row(name: str, forwards: float) -> None:
        each = [forwards, forwards * work.prompts, forwards * work.prompts / work.processes]
        if work.rows_per_forward == 2:
            each.append(2 * each[2])
        table.add_row(name, *(f"{number:,.1f}".removesuffix(".0") for number in each))

    several = len(work.plans) > 1
    row("rollout, on average" if several else "rollout", work.rollout)
    for plan in work.plans if several else ():
        row(f"  {plan.name} ({plan.share:.1%})", plan.rollout)
    row("update, with gradient", work.update)
    if work.reference:
        row("reference", work.reference)
    return table


def _memory_table(needed: Estimate) -> Table:
    from treegrpo.memory import PARTS

    table = Table(
        title=f"memory on {needed.device}, at each phase's fullest",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    for phase in needed.phases:
        table.add_column(phase.name, justify="right", overflow="fold", min_width=6)
    unit, size = _unit(needed.peak)

    def row(name: str, values: Iterable[int], style: str | None = None) -> None:
        shown = [f"{value / size:,.2f}" if value else "" for value in values]
        if any(shown):
            table.add_row(name, *shown, style=style)

    for part in PARTS:
        row(part, [phase.device.get(part, 0) for phase in needed.phases])
    table.add_section()
    row(f"sum ({unit})", [phase.peak for phase in needed.phases], style="bold")
    row("in the CPU's memory", [sum(phase.host.values()) for phase in needed.phases])
    return table


def _sizes(work: Work, needed: Estimate) -> str:
    share = needed.trained / needed.parameters
    return (
        f"network {needed.parameters:,} parameters, trained {needed.trained:,} ({share:.2%}); "
        f"decoder {needed.decoder:,}; text encoders {needed.encoders:,}\n"
        f"{work.images:,} images an iteration ({work.prompts:,} prompts x {work.leaves:,}), "
        f"{work.updates:,} optimizer step{'s' * (work.updates > 1)}\n"
        f"peak {_shown(needed.peak)} in {needed.fullest.name}"
    )


def _disk(config: Config, needed: Estimate) -> str:
    from treegrpo.memory import most_prompts

    each, limit = needed.disk["embeddings"], config.model.embedding_cache_gib
    text = (
        f"disk: embeddings {_shown(each)} at most ({most_prompts(config):,} prompts), "
        f"checkpoints {_shown(needed.disk['states'])}, model {_shown(needed.disk['model'])}"
    )
    if limit is not None and each > limit * 2**30:
        text += f"; embeddings may be more than model.embedding_cache_gib ({limit:g}) allows"
    return text


def _batches(config: Config, batches: Batches, room: int | None) -> str:
    from treegrpo.memory import automatic

    sizes, auto = asdict(batches), automatic(config)
    text = "batch sizes: " + ", ".join(f"{name} {size}" for name, size in sizes.items())
    if not auto:
        return text
    names = "auto" if len(auto) == len(sizes) else f"auto: {', '.join(auto)}"
    if room is None:
        return f"{text} ({names}: the least; --memory says what a device that is not here has)"
    return f"{text} ({names}, for {_shown(room)})"


def _print_advice(console: Console, needed: Estimate, memory: int, advice: Advice | None) -> None:
    size = _shown(memory)
    if advice is None:
        console.print(f"fits into {size}: {_shown(memory - needed.peak)} left", soft_wrap=True)
        return
    if advice.fits:
        message = "; it does with"
    else:
        message = ", and no settings of the same model and size make it fit"
        message += "; the least is taken with" if advice.changes else ""
    console.print(f"does not fit into {size}{message}", soft_wrap=True)
    table = Table("setting", show_header=True)
    table.add_column("peak", justify="right")
    for change in advice.changes:
        value = str(change.value).lower() if isinstance(change.value, bool) else change.value
        table.add_row(f"{change.key}={value}", _shown(change.peak))
    if advice.changes:
        console.print(table)


def _unit(size: int) -> tuple[str, int]:
    return ("GiB", 2**30) if size >= 2**30 else ("MiB", 2**20)


def _shown(size: int) -> str:
    unit, each = _unit(size)
    return f"{size / each:,.2f} {unit}"

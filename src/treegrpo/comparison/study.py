"""A whole comparison: entries, seeds, budget and grids, and what of it is refused before it begins.

Left out: running it (`running.py`).
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from treegrpo.comparison.budget import Budget, Cost, affordable, cost_of, costs
from treegrpo.comparison.entries import (
    Entry,
    Grid,
    Shared,
    check_changes,
    configure,
)
from treegrpo.config import Config, has_setting, method_of, to_yaml
from treegrpo.errors import UserError
from treegrpo.models.folder import read_json
from treegrpo.plan import PlanError
from treegrpo.run_folder import located
from treegrpo.settings import FREE_ON_RESUME, marked

if TYPE_CHECKING:
    from treegrpo.transition import Schedule

RESULTS_FILE = "comparison.json"
PAGE_FILE = "index.html"
RUNS_FOLDER = "runs"

POINTS = 8
"""About how often a run is measured."""
TUNING_SEED_AFTER = 1000
"""The seed that values are chosen on is so far after the first reported one."""


@dataclass(frozen=True)
class Study:
    """A comparison.

    Attributes:
        seeds: those that are reported.
        tuning_seed: none of them.
        budget: None: what the configuration's own method spends over `train.iterations`.
        factor: what a row with gradient counts in forwards.
        tunes: of each entry whose method has the keys, the best of the grid is taken.
        flow: whether the model is a rectified flow.
    """

    shared: Shared
    entries: tuple[Entry, ...]
    seeds: range
    tuning_seed: int
    factor: float
    folder: Path
    budget: Budget
    tunes: tuple[Grid, ...] = ()
    flow: bool = True

    @staticmethod
    def of(
        shared: Shared,
        entries: tuple[Entry, ...],
        *,
        seeds: range,
        tuning_seed: int | None,
        budget: Budget | None,
        factor: float,
        tunes: tuple[Grid, ...],
        folder: Path,
    ) -> Study:
        """With the default budget and seed to tune on.

        Raises:
            UserError: a key, a value or the seed cannot be used.
        """
        check_changes(shared, entries)
        if tuning_seed is None:
            tuning_seed = seeds.start + max(TUNING_SEED_AFTER, len(seeds))
        if tuning_seed in seeds:
            raise UserError(
                f"--tuning-seed: got {tuning_seed}; must be none of the reported seeds, "
                f"{seeds.start} to {seeds.stop - 1}"
            )
        for grid in tunes:
            if not any(has_setting(entry.method, grid.key) for entry in entries):
                configure(shared, entries[0], grid.changes[:1], flow=True)  # says what is wrong
        if budget is None:
            own = configure(shared, Entry(shared.method, shared.method), flow=True)
            budget = Budget(cost_of(own, factor))
        return Study(shared, entries, seeds, tuning_seed, factor, folder, budget, tunes)

    def grids(self, entry: Entry) -> list[Grid]:
        """Those that are tuned: the keys that its method has."""
        return [grid for grid in self.tunes if has_setting(entry.method, grid.key)]

    def candidates(self, entry: Entry) -> list[tuple[str, ...]]:
        """Every point of its grids; a single one without changes where nothing is tuned."""
        return list(itertools.product(*(grid.changes for grid in self.grids(entry))))

    def config(self, entry: Entry, changes: Sequence[str] = (), seed: int | None = None) -> Config:
        """An entry's configuration, but for what a run's length decides.

        Raises:
            ConfigError: it is none.
        """
        seed = self.seeds.start if seed is None else seed
        return configure(self.shared, entry, [*changes, f"train.seed={seed}"], flow=self.flow)

    def in_turn(self, number: int) -> list[Entry]:
        """The entries, begun with another one each time, so that a machine's drift hits all."""
        turn = number % len(self.entries)
        return [*self.entries[turn:], *self.entries[:turn]]

    def iterations(self, config: Config) -> int | None:
        """How many a run has; None where time decides."""
        if self.budget.unit == "minutes":
            return None
        if self.budget.unit == "iterations":
            return int(self.budget.amount)
        return affordable(config, self.budget.amount, self.factor)

    def check(self) -> None:
        """Refuse values that no run can have, and a budget that is spent before an iteration ends.

        Raises:
            UserError: names the entry and, of a budget, what its iteration costs.
        """
        dearest: tuple[float, Entry, Config, Cost] | None = None
        for entry, config in self._candidates():
            with _naming(entry):
                method_of(config).checked_plans(config.train.iterations)
            for seed in (self.tuning_seed, *self.seeds):
                cost = next(costs(_seeded(config, seed), self.factor))
                if dearest is None or cost.total > dearest[0]:
                    dearest = cost.total, entry, config, cost
        assert dearest is not None
        total, entry, config, cost = dearest
        if self.budget.unit == "forwards" and total > self.budget.amount:
            reference = f"{cost.reference:,} for the reference, " if cost.reference else ""
            raise UserError(
                f"--budget: got {self.budget}; an iteration of {entry.label} costs {total:,.10g} "
                f"({config.rollout.prompts_per_iteration} prompts: {cost.rollout:,} to sample, "
                f"{reference}{cost.factor:g} x {cost.update:,} to update); must be at least that"
            )

    def check_model(self, schedules: Mapping[int, Schedule]) -> None:
        """Refuse methods that the model cannot run.

        Args:
            schedules: of the model, by the number of steps.

        Raises:
            UserError: names the entry and says why.
        """
        for entry, config in self._candidates():
            method, schedule = method_of(config), schedules[config.rollout.steps]
            for share in method.checked_plans(config.train.iterations):
                with _naming(entry):
                    method.transitions(schedule, share.plan)

    def steps(self) -> set[int]:
        """The numbers of denoising steps that entries have."""
        return {config.rollout.steps for _, config in self._candidates()}

    def _candidates(self) -> Iterator[tuple[Entry, Config]]:
        """Every configuration that is tried, with the first seed."""
        for entry in self.entries:
            for changes in self.candidates(entry):
                yield entry, self.config(entry, changes)

    def for_model(self, *, flow: bool) -> Study:
        """The comparison on a flow model or on a diffusion model."""
        return replace(self, flow=flow)

    # --- the folder ---

    def settings(self) -> dict[str, Any]:
        """What decides the numbers, for the record and to tell comparisons apart."""
        return {
            "budget": str(self.budget),
            "backward_cost": self.factor,
            "first_seed": self.seeds.start,
            "seeds": len(self.seeds),
            "tuning_seed": self.tuning_seed if self.tunes else None,
            "tune": {grid.key: list(grid.values) for grid in self.tunes},
            "entries": {entry.label: _deciding(self.config(entry)) for entry in self.entries},
        }

    def check_folder(self, *, overwrite: bool) -> None:
        """Refuse an output folder that holds something else; more seeds may be added.

        Raises:
            UserError: names the settings that differ.
        """
        folder = self.folder
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output: {folder} is a file; must be a folder")
        file = folder / RESULTS_FILE
        recorded = read_json(file, "--output").get("settings") if file.is_file() else None
        if not isinstance(recorded, dict):
            if folder.is_dir() and any(folder.iterdir()):
                raise UserError(
                    f"--output: {folder} is not empty and holds no comparison, so nothing in it is "
                    "replaced; choose another folder"
                )
            return
        if overwrite:
            return
        before = _flat(recorded)
        now = _flat(json.loads(json.dumps(self.settings())))
        differing = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if "seeds" in differing and now["seeds"] > before["seeds"]:
            differing.remove("seeds")  # what was run stays, and is continued
        if differing:
            lines = "\n  ".join(
                f"{key}: was {before.get(key)!r}, now {now.get(key)!r}" for key in differing[:12]
            )
            more = f"\n  and {len(differing) - 12} more" if len(differing) > 12 else ""
            raise UserError(
                f"--output: the comparison in {folder} was made with other settings; keep them to "
                f"continue it, replace it with --overwrite, or choose another folder\n  {lines}"
                + more
            )

    def prepare_folder(self, *, overwrite: bool) -> None:
        """Make the folder, anew with `overwrite`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            for name in (RESULTS_FILE, PAGE_FILE):
                (self.folder / name).unlink(missing_ok=True)
            shutil.rmtree(self.folder / RUNS_FOLDER, ignore_errors=True)


@contextmanager
def _naming(entry: Entry) -> Iterator[None]:
    """Say of which entry a plan is that cannot be."""
    try:
        yield
    except PlanError as error:
        raise UserError(f"{entry.label}: {error}") from None


def _seeded(config: Config, seed: int) -> Config:
    train = config.train.model_copy(update={"seed": seed})
    return config.model_copy(update={"train": train})


def _deciding(config: Config) -> dict[str, Any]:
    """A configuration without what a run's place and memory decide."""
    tree: dict[str, Any] = yaml.safe_load(to_yaml(located(config)))
    for section, *keys in marked(type(config), FREE_ON_RESUME):
        if keys:
            tree[section].pop(keys[0], None)
        else:
            tree.pop(section, None)
    for key in ("seed", "iterations"):
        del tree["train"][key]
    return tree


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat

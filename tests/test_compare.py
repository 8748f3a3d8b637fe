"""`treegrpo compare`: costs, what is chosen and written, and going on where it stopped.

Left out: training itself (test_training.py).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_rewards
from command_line import CommandLine
from tiny_checkpoints import stable_diffusion

from treegrpo.comparison import running
from treegrpo.comparison.budget import Budget, affordable, costs
from treegrpo.comparison.entries import (
    Entry,
    Grid,
    Shared,
    configure,
    make_entries,
    read_grids,
    read_variants,
)
from treegrpo.comparison.outcome import Outcome, Point
from treegrpo.comparison.running import choose
from treegrpo.comparison.study import Study
from treegrpo.comparison.summary import area, frontier, mean_curve, reached, summarise
from treegrpo.config import ABLATIONS, load_config, method_of
from treegrpo.errors import UserError
from treegrpo.methods import BUILT_IN
from treegrpo.run_folder import STATE_FILE, read_lines
from treegrpo.training import loop

SETTINGS = (
    "rollout.steps=3",
    "rollout.prompts_per_iteration=2",
    "train.warmup_iterations=0",
    "rewards=[{name: 'toy_rewards:brightness'}]",
    "evaluation.max_prompts=2",
    "evaluation.images_per_prompt=1",
    "model.device=cpu",
    "tracking=[]",
)
TREE = ("rollout.branching=2", "rollout.window_size=2")
BUDGET = 450
COMMAND = (
    *SETTINGS,
    *TREE,
    "rollout.group_size=4",
    *("--methods", "tree_grpo,flow_grpo"),
    *("--seeds", "2"),
    *("--tune", "train.learning_rate=1e-2,1e-3"),
    *("--budget", str(BUDGET)),
)


def found(folder: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(Path(folder, "comparison.json").read_text())
    return values


def untimed(outcome: dict[str, Any]) -> dict[str, Any]:
    """What repeats exactly."""
    kept = {key: value for key, value in outcome.items() if not key.endswith("seconds")}
    kept = {key: value for key, value in kept.items() if not key.startswith("seconds")}
    kept["curve"] = [{**point, "seconds": 0.0} for point in outcome["curve"]]
    return kept


def outcomes_of(folder: str) -> dict[str, dict[str, Any]]:
    """Of every run, the tuning ones too."""
    files = sorted(Path(folder, "runs").glob("*/*/outcome.json"))
    return {str(file.relative_to(folder)): json.loads(file.read_text()) for file in files}


@pytest.mark.slow
def test_a_comparison_and_the_same_one_interrupted(
    treegrpo: CommandLine, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("compare", f"model.path={tiny_checkpoint}", *COMMAND)
    begun: list[str] = []
    train = loop.train

    def counted(config: Any, **how: Any) -> Any:
        begun.append(f"{config.output}{' again' if how['resume'] else ''}")
        return train(config, **how)

    monkeypatch.setattr(running, "train", counted)
    monkeypatch.setattr(loop, "write_report", lambda *given: None)  # pictures take a third
    code, out, err = treegrpo(*command, "--output", "whole")
    assert code == 0, err
    assert "; the best train.learning_rate is at an end of its grid" in out
    results = found("whole")

    # Values are chosen on a seed that is not reported; methods take turns.
    assert [tuple(Path(name).parts[1:]) for name in begun] == [
        ("runs", "tree_grpo", "tuning-0"),
        ("runs", "flow_grpo", "tuning-0"),
        ("runs", "flow_grpo", "tuning-1"),
        ("runs", "tree_grpo", "tuning-1"),
        ("runs", "tree_grpo", "seed-0"),
        ("runs", "flow_grpo", "seed-0"),
        ("runs", "flow_grpo", "seed-1"),
        ("runs", "tree_grpo", "seed-1"),
    ]
    assert {run["seed"] for run in results["runs"]} == {0, 1}
    assert {tried["seed"] for tried in results["tuning"]} == {1000}
    for choice in results["choices"]:
        mine = [tried for tried in results["tuning"] if tried["entry"] == choice["entry"]]
        best = max(mine, key=lambda tried: tried["curve"][-1]["reward"])
        assert choice["changes"] == best["changes"]
        chosen = [run for run in results["runs"] if run["entry"] == choice["entry"]]
        assert all(run["changes"] == choice["changes"] for run in chosen)

    # The budget is met to within an iteration, and the cost is what the runs' records add up to.
    for name, outcome in outcomes_of("whole").items():
        folder = Path("whole", name).parent
        records = read_lines(folder / "metrics.jsonl")
        spent = [r["rollout_forwards"] + 2.5 * r["update_forwards"] for r in records]
        assert outcome["cost"] == sum(spent)
        assert sum(spent) <= BUDGET < sum(spent) + max(spent)
        assert outcome["iterations"] == len(records)
        assert outcome["curve"][-1]["cost"] == sum(spent)
        assert outcome["curve"][-1]["images"] == len(records) * 2 * 4
        learning_rate = float(outcome["changes"][0].partition("=")[2])
        assert records[0]["learning_rate"] == pytest.approx(learning_rate)
        assert not (folder / STATE_FILE).exists()
        assert (folder / "model").exists() == folder.name.startswith("seed")
    flow = load_config(Path("whole/runs/flow_grpo/seed-0/config.yaml"), [])
    assert (flow.advantage.std, flow.advantage.eps) == ("global", 1e-4)  # as published
    page = Path("whole/index.html").read_text()
    assert page.count("data:image/svg") == 4
    assert page.count("<article>") == 2 and "before training" in page
    assert "flow_grpo was tuned to" in page and "http" not in re.sub(r"xmlns\S+", "", page)

    # The same, stopped in the middle of a run, then continued.
    shutil.copytree("whole", "broken")
    stopped = Path("broken/runs/tree_grpo/seed-1")
    for path in stopped.iterdir():  # but for a file, as if switched off at its very beginning
        if path.name != "config.yaml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    begun.clear()
    brightness, batches = toy_rewards.brightness, 0

    def stopping(images: torch.Tensor, *more: Any) -> torch.Tensor:
        nonlocal batches
        batches += len(images) > 2  # the evaluation of the untrained model has two
        if batches == 1 and len(images) > 2:
            os.kill(os.getpid(), signal.SIGINT)
        return brightness(images, *more)

    monkeypatch.setattr(toy_rewards, "brightness", stopping)
    code, out, err = treegrpo(*command, "--output", "broken")
    assert code == 130, err
    assert "interrupted; continue with the same command" in out
    assert begun == [str(stopped)]
    assert len(read_lines(stopped / "metrics.jsonl")) == 1
    # The run is measured where it stops, which the unbroken one is not.
    assert [r["iteration"] for r in read_lines(stopped / "evaluations.jsonl")] == [0, 1]
    monkeypatch.setattr(toy_rewards, "brightness", brightness)
    begun.clear()
    code, out, err = treegrpo(*command, "--output", "broken")
    assert code == 0, err
    assert begun == [f"{stopped} again"]
    whole = outcomes_of("whole")
    points = whole["runs/tree_grpo/seed-1/outcome.json"]["curve"]
    assert [point["iteration"] for point in points][:3] == [0, 2, 4]
    assert {name: untimed(of) for name, of in outcomes_of("broken").items()} == {
        name: untimed(of) for name, of in whole.items()
    }

    # All of it is there; other settings are refused, and another seed is added.
    begun.clear()
    assert treegrpo(*command, "--output", "broken")[0] == 0
    assert begun == []
    message = treegrpo.refusal(*command, "train.weight_decay=0.1", "--output", "broken")
    assert "train.weight_decay: was 0.0, now 0.1" in message
    message = treegrpo.refusal(*command, "--backward-cost", "3", "--output", "broken")
    assert message.endswith("\n  backward_cost: was 2.5, now 3.0")
    message = treegrpo.refusal(*command, "--seeds", "1", "--output", "broken")
    assert message.endswith("\n  seeds: was 2, now 1")

    def ended(config: Any, **how: Any) -> Any:
        raise UserError(f"would begin {config.output}")

    monkeypatch.setattr(running, "train", ended)
    code, out, _ = treegrpo(*command, "--seeds", "3", "--output", "broken")
    assert code == 0
    assert "tree_grpo, seed 2, failed: would begin broken/runs/tree_grpo/seed-2" in out
    assert outcomes_of("broken").keys() >= whole.keys()


@pytest.mark.slow
def test_a_run_that_diverges_is_told_and_loses_no_other(
    treegrpo: CommandLine, tiny_checkpoint: Path
) -> None:
    command = ("compare", f"model.path={tiny_checkpoint}", *SETTINGS, *TREE, "--seeds", "1")
    sweep = ("--sweep", "train.learning_rate=1e-3,1e30", "--budget", "4iterations")
    code, out, err = treegrpo(*command, *sweep)
    assert code == 0, err
    sound, broken = found("runs/compare")["runs"]
    assert sound["error"] is None and sound["iterations"] == 4
    assert "not finite" in broken["error"]
    assert "learning_rate=1e30 (1 of 1 failed)" in out
    # A value that fails is not chosen, however it is placed.
    tune = ("--tune", "train.learning_rate=1e30,1e-3", "--budget", "2iterations")
    code, out, err = treegrpo(*command, *tune, "--methods", "tree_grpo", "--overwrite")
    assert code == 0, err
    results = found("runs/compare")
    assert results["choices"][0]["changes"] == ["train.learning_rate=1e-3"]
    assert [run["error"] for run in results["runs"]] == [None]


@pytest.mark.slow
def test_a_budget_of_minutes_becomes_iterations(
    treegrpo: CommandLine, tiny_checkpoint: Path
) -> None:
    command = ("compare", f"model.path={tiny_checkpoint}", *SETTINGS, "rollout.group_size=4")
    code, _, err = treegrpo(
        *command, "--seeds", "1", "--methods", "mix_grpo", "--budget", "0.02minutes"
    )
    assert code == 0, err
    config = load_config(Path("runs/compare/runs/mix_grpo/seed-0/config.yaml"), [])
    pilot = read_lines(Path("runs/compare/runs/mix_grpo/pilot-of-seed-0/metrics.jsonl"))
    pace = sorted(record["seconds"] for record in pilot)[1]
    assert config.train.iterations == max(1, int(1.2 / pace))
    assert config.train.time_limit_minutes == 0.02


@pytest.mark.slow
def test_a_diffusion_model_is_compared_by_its_own_step(
    treegrpo: CommandLine, tmp_path: Path
) -> None:
    stable_diffusion.CASES[0].build(tmp_path / "model")
    settings = (*SETTINGS, "rollout.group_size=2", "--seeds", "1", "--budget", "1iterations")
    command = ("compare", "model.path=model", *settings, "--methods", "dance_grpo,branch_grpo")
    for _ in range(2):  # again: what was published for such a model is no other setting
        code, _, err = treegrpo(*command)
        assert code == 0, err
    for method, eta in (("dance_grpo", 1.0), ("branch_grpo", 0.7)):
        rollout = found("runs/compare")["settings"]["entries"][method]["rollout"]
        assert (rollout["transition"] or "ddim", rollout["noise_level"]) == ("ddim", eta)
    message = treegrpo.refusal(*command, "rollout.transition=flow_sde", "--overwrite")
    assert message.startswith("dance_grpo: rollout.transition: got flow_sde, which is for flow mod")


# --- cost ---


@pytest.mark.parametrize("method", BUILT_IN)
def test_as_many_iterations_as_the_budget_allows(method: str) -> None:
    config = load_config(None, [f"rollout.method={method}", "train.inner_epochs=2"])
    made = method_of(config)
    each = [
        16 * (made.plan(i).rollout_forwards + 3 * 2 * made.plan(i).update_forwards)
        for i in range(8)
    ]
    assert [cost.total for cost in islice(costs(config, 3.0), 8)] == each
    assert affordable(config, sum(each), 3.0) == 8
    assert affordable(config, sum(each) - 1, 3.0) == 7


def test_the_reference_counts_where_there_is_one() -> None:
    config = load_config(None, ["objective.kl_weight=0.1"])
    first = next(costs(config, 2.5))
    assert first.reference == first.update == 16 * 13
    assert first.total == first.rollout + 3.5 * first.update


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("300000", Budget(300000)),
        ("3e5 forwards", Budget(300000)),
        ("300,000", Budget(300000)),
        ("1.5minutes", Budget(1.5, "minutes")),
        ("80iterations", Budget(80, "iterations")),
    ],
)
def test_budgets(text: str, budget: Budget) -> None:
    assert Budget.of(text) == budget


# --- entries ---


def test_what_was_published_stands_between_the_file_and_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"

    def advantage(method: str, *changes: str) -> tuple[str, float]:
        section = configure(Shared(file, changes), Entry("", method), flow=True).advantage
        return section.std, section.eps

    file.write_text("advantage: {eps: 0.5}\n")  # of tree_grpo
    assert advantage("flow_grpo") == ("global", 1e-4)
    assert advantage("tree_grpo") == ("group", 0.5)
    assert advantage("flow_grpo", "advantage.std=none") == ("none", 1e-4)
    file.write_text("rollout: {branching: 3, noise_level: 0.9}\nadvantage: {ddof: 0}\n")
    branch = configure(Shared(file), Entry("", "branch_grpo"), flow=True)
    assert branch.rollout.noise_level == 0.3 and branch.advantage.ddof == 1
    assert method_of(branch).plan(0).leaves == 16  # of two children, not of the tree's three
    file.write_text("rollout: {method: flow_grpo}\nadvantage: {eps: 0.5}\n")
    assert advantage("flow_grpo") == ("global", 0.5)


def test_what_was_published_suits_the_model() -> None:
    def rollout(method: str, flow: bool) -> tuple[str | None, float]:
        section = configure(Shared(), Entry("", method), flow=flow).rollout
        return section.transition, section.noise_level

    assert rollout("dance_grpo", True) == ("dance_sde", 0.3)
    assert rollout("dance_grpo", False) == ("ddim", 1.0)
    assert rollout("ddpo", True) == rollout("ddpo", False) == ("ddim", 1.0)


def test_entries_are_methods_by_variants_by_sweeps() -> None:
    sweeps = read_grids("--sweep", ["rollout.steps=5,6", "train.learning_rate=1e-4,2e-4"])
    variants = {"wide": ("rollout.window_size=2",), "narrow": ("rollout.window_size=1",)}
    entries = make_entries(Shared(), ["tree_grpo", "mix_grpo"], variants, sweeps)
    assert len(entries) == 16
    assert entries[0].label == "tree_grpo wide steps=5 learning_rate=1e-4"
    assert [e.method for e in make_entries(Shared(), [], {}, [])] == list(BUILT_IN)
    (alone,) = make_entries(Shared(), [], {"a": ('rollout.method="ddpo"',)}, [])
    assert (alone.label, alone.method) == ("a", "ddpo")
    (grid,) = read_grids("--sweep", ["rollout.split_steps=[0,2],[1]"])
    assert grid.values == ("[0,2]", "[1]")


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_can_be_run(name: str) -> None:
    entries = make_entries(Shared(), [], read_variants(name), [])
    configs = [configure(Shared(), entry, flow=True) for entry in entries]
    assert len({str(config) for config in configs}) == len(entries) >= 3
    for config in configs:
        method_of(config).checked_plans(10)


# --- figures ---


def point(cost: float, reward: float, accuracy: float | None = None) -> Point:
    return Point(0, cost, 0, 0.0, reward, accuracy, {})


def outcome(entry: str, seed: int, *curve: Point, error: str | None = None) -> Outcome:
    cost = curve[-1].cost if curve else 0.0
    return Outcome(entry, seed, (), error, 1, cost, 10, 10, 0, 0, 1.0, 0.5, 1.0, 0.0, curve)


def test_areas_and_costs_are_interpolated() -> None:
    curve = [point(0, 0.0), point(10, 1.0), point(20, 3.0)]
    assert area(curve, 10) == 0.5
    assert area(curve, 15) == pytest.approx((5 + (1 + 2) / 2 * 5) / 15)
    assert reached(curve, 0.5) == 5
    assert reached(curve, 2.0) == 15
    assert reached(curve, -1.0) == 0
    assert frontier([(1, 0.1), (2, 0.5), (3, 0.4), (4, 0.6)]) == [(1, 0.1), (2, 0.5), (4, 0.6)]


def test_the_weakest_is_that_of_the_same_seed_and_failures_do_not_count() -> None:
    runs = [
        outcome("a", 0, point(0, 0.0), point(10, 1.0)),
        outcome("b", 0, point(0, 0.0), point(20, 4.0)),
        outcome("a", 1, point(0, 0.0), point(10, 2.0)),
        outcome("b", 1, point(0, 0.0), point(20, 1.0)),
        outcome("c", 0, error="diverged"),
    ]
    first, second, third = summarise(["a", "b", "c"], runs)
    assert first.catch_up and second.catch_up and first.reward and first.area
    assert first.catch_up.mean == (10 + 5) / 2  # to 1 with seed 0, to 1 with seed 1
    assert second.catch_up.mean == (5 + 20) / 2
    assert first.reward.mean == 1.5 and first.reward.std == pytest.approx(0.5**0.5)
    assert first.area.mean == 0.75  # over the 10 that all have spent
    assert first.measured_factor and first.measured_factor.mean == 2.0
    assert (third.runs, third.failed, third.reward) == (1, 1, None)
    ends = mean_curve(runs[1::2], lambda p: p.cost)
    assert (ends[-1].x, ends[-1].figure(lambda p: p.reward).mean) == (20, 2.5)


def test_the_best_is_chosen_by_accuracy_where_there_is_one() -> None:
    grid = Grid("train.learning_rate", ("1e-4", "4e-4", "2e-4"))
    study = Study(
        Shared(), (Entry("a", "tree_grpo"),), range(1), 9, 2.5, Path(), Budget(1), (grid,)
    )

    def chosen(*ends: Point) -> tuple[Sequence[str] | None, tuple[str, ...]]:
        tried = [
            Outcome("a", 9, (change,), curve=(end,))
            for change, end in zip(grid.changes, ends, strict=True)
        ]
        choice = choose(study, study.entries[0], tried)
        return choice.changes, choice.at_an_end

    def best(value: str) -> tuple[str]:
        return (f"train.learning_rate={value}",)

    assert chosen(point(0, 9, 0.1), point(0, 1, 0.2), point(0, 2, 0.3)) == (best("2e-4"), ())
    assert chosen(point(0, 1), point(0, 3), point(0, 2)) == (best("4e-4"), (grid.key,))


# --- what is refused ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "tree_gro"], '--methods: got "tree_gro"; must be one of'),
        (["--methods", "ddpo,ddpo"], "--methods: ddpo is given 2 times; must be once"),
        (["--sweep", "rollout.branchng=2,3"], 'rollout.branchng: unknown key; did you mean "bra'),
        (
            ["--sweep", "rollout.branching=2,3", "--methods", "tree_grpo,flow_grpo"],
            "rollout.branching: flow_grpo has no such setting; tree_grpo",
        ),
        (["--tune", "train.learning_rte=1,2"], "train.learning_rte: unknown key; did you mean"),
        (["--tune", "train.learning_rate=1"], "--tune train.learning_rate: got 1; must be at lea"),
        (["--tune", "train.seed=1,2"], "--tune train.seed: is decided by the comparison; use --f"),
        (["--sweep", "model.path=a,b"], "--sweep model.path: a comparison is on one model, and"),
        (["--sweep", "rollout.trees=0,1"], "rollout.trees: got 0; must be at least 1"),
        (["--tune", "rollout.trees=1,900"], "rollout.max_leaves: got 512; a prompt would have"),
        (["rollout.window_sise=3"], 'rollout.window_sise: unknown key; did you mean "window_siz'),
        (["output=elsewhere"], "output: is decided by the comparison; use --output"),
        (["--tuning-seed", "2"], "--tuning-seed: got 2; must be none of the reported seeds, 0 to"),
        (["--backward-cost", "inf"], "--backward-cost: got inf; must be finite"),
        (["--budget", "3hours"], "--budget: got '3hours'; must be a number of forwards"),
        (
            ["--budget", "15000"],
            "--budget: got 15,000 forwards; an iteration of flow_grpo costs 15,120 (16 prompts: "
            "4,320 to sample, 2.5 x 4,320 to update); must be at least that",
        ),
        (
            ["--variants", "no.yaml"],
            "--variants: got no.yaml; must be a file or one of the ablations back",
        ),
        (["--output", "other"], "--output: other is not empty and holds no comparison, so nothing"),
        (
            ["--methods", "flow_grpo", "rollout.transition=ddim"],
            "flow_grpo: step 9: a ddim transition from sigma 0.1 to 0 at noise level 0.7 has",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(
    arguments: list[str], message: str, treegrpo: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("other").mkdir()
    Path("other/thesis.tex").touch()
    assert treegrpo.refusal("compare", *arguments).startswith(message)
    assert not Path("runs").exists()

"""Tails that skip steps, in a run: what the check measures, and when it warns.

Left out: the tail's levels and counts (test_plan.py), its solver (test_transition.py).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import CommandLine

from treegrpo.config import load_config
from treegrpo.run_folder import read_lines
from treegrpo.training.build import build
from treegrpo.training.loop import iterate
from treegrpo.training.metrics import Stopwatch
from treegrpo.training.tails import TailCheck

SETTINGS = (
    "rollout.steps=5",
    "rollout.branching=2",
    "rollout.window_size=2",
    "rollout.window_schedule=fixed",
    "rollout.prompts_per_iteration=2",
    "rewards=[{name: jpeg_compressibility}]",
    "train.iterations=3",
    "evaluation.every=0",
    "evaluation.max_prompts=1",
    "evaluation.images_per_prompt=1",
)


@pytest.mark.parametrize("method", ["tree_grpo", "tree_endpoint", "mix_grpo"])
def test_the_agreement_is_with_what_whole_tails_would_have_given(
    method: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Against the run without `tail_steps`, whose forest is the same up to the window's end."""

    def run_with(*changes: str) -> tuple[dict[str, float], torch.Tensor, torch.Tensor]:
        leaving = ("rollout.branching=2",) if method == "mix_grpo" else ()
        settings = [s for s in (*SETTINGS, *changes) if s not in leaving]
        output = f"output={tmp_path / str(len(changes))}"
        config = load_config(
            None, [f"model.path={tiny_checkpoint}", output, f"rollout.method={method}", *settings]
        )
        run = build(config)
        prompts = run.sampler.upcoming(2)
        batch = run.collector.collect(prompts, run.method.plan(0), 0, Stopwatch(run.policy.device))
        credit = run.method.credit(run.collector.scores(batch), batch.forest)
        return iterate(run), credit.leaves, batch.forest.levels[-1].children

    whole, expected, frontier = run_with()
    fast, actual, same = run_with("rollout.tail_steps=1")
    assert torch.equal(frontier, same)
    assert "tail_agreement" not in whole
    assert not torch.equal(expected, actual)
    correlation = torch.corrcoef(torch.stack([expected[0], actual[0]]))[0, 1].item()
    assert fast["tail_agreement"] == pytest.approx(correlation, abs=1e-4)
    leaves = actual.shape[1]
    assert whole["rollout_forwards"] - fast["rollout_forwards"] == 2 * leaves * 2
    assert fast["seconds_tail_check"] > 0


def test_a_tail_that_ranks_otherwise_is_warned_about_once(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    treegrpo: CommandLine,
) -> None:
    monkeypatch.setattr(TailCheck, "_agreement", lambda *arguments: 0.5)
    code, out, err = treegrpo(
        "train",
        f"model.path={tiny_checkpoint}",
        f"output={tmp_path / 'run'}",
        *SETTINGS,
        "rollout.tail_steps=1",
        "rollout.tail_check_every=1",
        "train.iterations=5",
    )
    assert code == 0, err
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert all(record["tail_agreement"] == 0.5 for record in records)
    assert (out + err).count("tail_agreement is 0.50 over the last 3 checks") == 1


def test_a_tail_that_could_skip_nothing_is_refused(treegrpo: CommandLine) -> None:
    assert treegrpo.refusal("train", "rollout.tail_steps=7") == (
        "rollout.tail_steps: got 7; must be less than the steps after the earliest window (7: "
        "rollout.steps - rollout.window_size), or null for all of them"
    )
    assert treegrpo.refusal(
        "train", "rollout.window_schedule=fixed", "rollout.window_start=4", "rollout.tail_steps=3"
    ) == (
        "rollout.tail_steps: got 3; must be less than the steps after the earliest window (3: "
        "rollout.steps - rollout.window_size - rollout.window_start), or null for all of them"
    )


def test_foretold_work_is_that_of_the_shortened_tails(
    tiny_checkpoint: Path, treegrpo: CommandLine, tmp_path: Path
) -> None:
    settings = (f"model.path={tiny_checkpoint}", *SETTINGS, "rollout.tail_steps=1")
    code, out, err = treegrpo("plan", *settings, "--json", str(tmp_path / "plan.json"))
    assert code == 0, out + err
    work = json.loads((tmp_path / "plan.json").read_text())["work"]
    assert work["rollout"] == 1 + 2 + 4  # a node at steps 0 and 1, and four leaves' one step

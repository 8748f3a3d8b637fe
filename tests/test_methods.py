"""Methods: chosen by name, the user's own among them, each with its settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import CommandLine

from treegrpo.advantage import depth_normalized
from treegrpo.config import load_config, method_of
from treegrpo.methods import BUILT_IN, Scores
from treegrpo.plan import PlanError, RolloutPlan
from treegrpo.rollout import Rollout
from treegrpo.run_folder import read_lines
from treegrpo.transition import flow_schedule

SMALL = (
    "rollout.steps=3",
    "rollout.prompts_per_iteration=2",
    "rewards=[{name: 'toy_rewards:brightness'}]",
    "train.iterations=3",
    "train.learning_rate=1e-3",
    "evaluation.max_prompts=2",
    "evaluation.images_per_prompt=1",
    "model.device=cpu",
    "output=run",
)


@pytest.fixture(autouse=True)
def _own_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)


def trained(treegrpo: CommandLine, *arguments: str) -> list[dict[str, float]]:
    """The records of a run by the command line."""
    code, _, err = treegrpo("train", *SMALL, *arguments)
    assert code == 0, err
    return read_lines(Path("run/metrics.jsonl"))


def test_a_method_with_its_own_credit_and_setting(
    treegrpo: CommandLine, tiny_checkpoint: Path
) -> None:
    arguments = (
        f"model.path={tiny_checkpoint}",
        "rollout.method=own_methods:BestLeaves",
        "rollout.branching=2",
        "rollout.window_size=2",
    )
    few = trained(treegrpo, *arguments, "rollout.best=1")
    many = trained(treegrpo, *arguments, "rollout.best=3", "output=run", "--overwrite")
    assert len(few) == len(many) == 3
    assert few[0]["reward"] == many[0]["reward"]  # the same samples
    assert few[0]["loss"] == pytest.approx(-1 / 4)  # of the leaves one in four is worth 1
    assert many[0]["loss"] == pytest.approx(-3 / 4)
    assert "best: 3" in Path("run/config.yaml").read_text()
    assert "own_methods:BestLeaves" in Path("run/model/README.md").read_text()
    message = treegrpo.refusal("train", *SMALL, *arguments, "rollout.best=0")
    assert message == "rollout.best: got 0; must be at least 1"


def test_an_objective_without_ratios(treegrpo: CommandLine, tiny_checkpoint: Path) -> None:
    arguments = (
        f"model.path={tiny_checkpoint}",
        "rollout.method=own_methods:ForwardProcess",
        "rollout.group_size=4",
        "train.micro_batch=3",
    )
    records = trained(treegrpo, *arguments)
    assert len(records) == 3
    for record in records:
        assert record["rollout_forwards"] == 2 * 4 * 3
        assert record["update_forwards"] == 2 * 4
        assert record["gradient_norm"] > 0
        assert record["matching_error"] > 0
        assert "ratio_error" not in record and "window_start" not in record
    code, _, err = treegrpo("plan", *SMALL, *arguments, "--json", "plan.json")
    assert code == 0, err
    assert json.loads(Path("plan.json").read_text())["work"]["update"] == 4
    # The clipped objective's settings are none of this one's.
    message = treegrpo.refusal("train", *SMALL, *arguments, "objective.clip_low=1e-3")
    assert message.startswith("objective.clip_low: own_methods:ForwardProcess has no such setting")


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_plan_without_edges_is_refused_where_they_are_needed(
    command: str, treegrpo: CommandLine
) -> None:
    changes = (
        "rollout.method=flow_grpo",
        "rollout.steps=1",
        "rollout.deterministic_final_step=true",
    )
    message = treegrpo.refusal(command, *changes)
    assert message.startswith("rollout.method: flow_grpo learns from stochastic steps")
    assert "torch" not in message and "run" not in {path.name for path in Path().iterdir()}


@pytest.mark.parametrize("name", BUILT_IN)
def test_plans_are_those_that_iterations_follow(name: str) -> None:
    overrides = [f"rollout.method={name}", "rollout.steps=5"]
    for schedule in ("random", "shifting", "fixed") if name in ("tree_grpo", "mix_grpo") else ("",):
        changes = (
            [f"rollout.window_schedule={schedule}", "rollout.shift_every=2"] if schedule else []
        )
        method = method_of(load_config(None, overrides + changes))
        shares = method.checked_plans(12)
        assert sum(share.share for share in shares) == pytest.approx(1)
        followed = [method.plan(iteration) for iteration in range(12)]
        assert {*followed} <= {share.plan for share in shares}
        if schedule == "shifting":
            for share in shares:
                assert followed.count(share.plan) == 12 * share.share


def test_the_windows_draw_follows_the_seed() -> None:
    def starts(seed: int) -> list[RolloutPlan]:
        method = method_of(load_config(None, [f"train.seed={seed}"]))
        return [method.plan(iteration) for iteration in range(20)]

    assert starts(0) == starts(0) != starts(1)


def test_branch_grpo_normalises_as_it_is_told() -> None:
    changes = ["rollout.method=branch_grpo", "rollout.steps=3", "rollout.branching=2"]
    changes += ["rollout.split_steps=[0, 1]", "advantage.advantage_clip=null"]
    rewards = torch.tensor([[0.0, 1.0, 3.0, 8.0]])

    def edges(*more: str) -> tuple[torch.Tensor, ...]:
        method = method_of(load_config(None, [*changes, *more]))
        plan = method.plan(0)
        forest = Rollout(
            plan, flow_schedule([1, 0.6, 0.3, 0.0]), torch.zeros(1, 4, 1), (), 0, "mean"
        )
        scores = Scores([rewards], [1.0], [rewards])
        leaves = method.leaf_advantages(scores)
        credit = method.credit(scores, forest)
        settings = method.advantage
        expected = depth_normalized(leaves, plan, ddof=settings.ddof, eps=settings.eps)
        assert all(map(torch.equal, credit.edges, expected.levels))
        return credit.edges

    usual, unbiased = edges("advantage.ddof=0"), edges()
    # Over a depth's two nodes, the unbiased deviation is larger by the square root of 2.
    torch.testing.assert_close(unbiased[0], usual[0] / 2**0.5)
    assert edges("advantage.eps=1.0")[0].abs().max() < 0.8 * usual[0].abs().max()


@pytest.mark.parametrize(
    ("steps", "splits"), [(20, [0, 3, 6, 9]), (10, [0, 2, 3, 5]), (4, [0, 1, 2]), (1, [0])]
)
def test_branch_grpo_splits_at_the_published_shares_of_the_steps(
    steps: int, splits: list[int]
) -> None:
    (share,) = method_of(
        load_config(None, ["rollout.method=branch_grpo", f"rollout.steps={steps}"])
    ).checked_plans(7)
    assert share.name == ""  # there is no window to tell of
    assert [step for step, k in enumerate(share.plan.branching) if k > 1] == splits
    assert share.plan.leaves == 2 ** len(splits)


def test_leaves_beyond_the_limit_are_refused() -> None:
    method = method_of(load_config(None, []))
    small = method.rollout.model_copy(update={"max_leaves": 26})
    with pytest.raises(PlanError, match="3 x 3 x 3 = 27 leaves"):
        type(method)(small, method.advantage, method.objective).checked_plans(1)


@pytest.mark.parametrize(
    ("error", "told"),
    [(0.0, ""), (9e-5, ""), (2e-4, "2.0e-04, more than objective.clip_low (0.0001)")],
)
def test_rounding_that_alone_would_clip_is_warned_about(error: float, told: str) -> None:
    warnings = method_of(load_config(None, [])).check_first_update({"ratio_error": error})
    assert len(warnings) == bool(told)
    assert all(told in warning for warning in warnings)

"""`treegrpo plan`: against real runs, against PyTorch's profiler, and through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import CommandLine
from tiny_checkpoints import edited
from torch import Tensor

from treegrpo.commands.plan import count_work, parse_memory
from treegrpo.config import Config, load_config
from treegrpo.memory import Measurements, PeakBytes, count_states, estimate, suggest
from treegrpo.models.folder import ModelError
from treegrpo.plan import RolloutPlan, flow_grpo, mix_grpo, tree_grpo
from treegrpo.rollout import rollout
from treegrpo.training.build import build
from treegrpo.training.loop import iterate
from treegrpo.transition import flow_schedule, transitions

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SMALL = (
    "model.device=cpu",
    "rollout.steps=4",
    "rollout.branching=2",
    "rollout.window_size=2",
    "rollout.window_schedule=fixed",
    "rollout.prompts_per_iteration=4",
    "rollout.max_batch=512",
    "rollout.decode_batch=512",
    "train.micro_batch=4",
    "rewards=[{name: jpeg_compressibility}]",
)


def configuration(checkpoint: Path, *changes: str) -> Config:
    return load_config(None, [*SMALL, f"model.path={checkpoint}", *changes])


@pytest.fixture(scope="module")
def measured() -> Measurements:
    """What is measured once for all configurations of `SMALL`."""
    return Measurements(steps=4)


def bytes_of(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.slow
def test_predictions_are_near_what_the_profiler_measures() -> None:
    """The benchmark's shortest part: the miniature and a tiny Stable Diffusion 3.5."""
    run = subprocess.run(
        [sys.executable, str(BENCHMARKS / "memory.py"), "--quick"],
        capture_output=True,
        text=True,
        check=True,
    )
    results = json.loads(run.stdout.splitlines()[-1])
    assert len(results) == 2
    for phases in results.values():
        iteration = {"rollout", "decode", "update", "optimizer"}
        assert phases.keys() == {"encode", "evaluation", *iteration}
        for figures in phases.values():
            assert 0.8 < figures["ratio_beside_weights"] < 1.2
            assert figures["measured"] > 2**20


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("model.lora_rank=4", "train.ema_decay=null"),
        ("objective.kl_weight=0.1", "train.updates_per_iteration=2", "train.inner_epochs=2"),
        ("model.lora_rank=4", "objective.kl_weight=0.1", "model.guidance_scale=2"),
    ],
    ids=["full", "lora", "full, kl", "lora, kl, guided"],
)
def test_weights_optimizer_and_forwards_are_those_of_a_run(
    changes: tuple[str, ...], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = configuration(tiny_checkpoint, f"output={tmp_path}", *changes)
    needed = estimate(config)
    parts = needed.phase("optimizer").device
    run = build(config)
    metrics = iterate(run)

    network = list(run.policy.network.parameters())
    trained = [parameter for parameter in network if parameter.requires_grad]
    assert needed.trained == sum(p.numel() for p in trained)
    assert parts["network"] + parts.get("adapters", 0) == bytes_of(network)
    assert (parts.get("adapters", 0) > 0) == bool(config.model.lora_rank)
    assert parts["decoder"] == bytes_of(list(run.policy.vae.parameters()))
    state = [v for s in run.learner.optimizer.state.values() for v in s.values()]
    assert parts["optimizer"] == bytes_of(state)
    average = [] if run.learner.average is None else run.learner.average.shadow_params
    assert parts.get("average", 0) == bytes_of(average)
    reference = [] if run.learner.reference is None else list(run.learner.reference.parameters())
    assert parts.get("reference", 0) == bytes_of(reference)
    assert parts["gradients"] == bytes_of(trained)

    work = count_work(config, guided=needed.guided)
    assert work.rows_per_forward == (2 if config.model.guidance_scale == 2 else 1)
    assert work.prompts * work.rollout == metrics["rollout_forwards"]
    assert work.prompts * work.update == metrics["update_forwards"]
    assert work.images == 4 * 4


@pytest.mark.parametrize("keep_means", [False, True])
@pytest.mark.parametrize(
    "plan",
    [
        tree_grpo(5, branching=3, window_size=2, window_start=0),
        tree_grpo(5, branching=2, window_size=2, window_start=1, trees=2),
        tree_grpo(5, branching=2, window_size=2, window_start=3),
        mix_grpo(5, group_size=4, window_size=2, window_start=1),
        flow_grpo(5, group_size=4),
        RolloutPlan(1, (2, 1, 2, 1), (True, False, True, False)),
    ],
    ids=["first steps", "middle", "last steps", "mix_grpo", "flow_grpo", "split"],
)
def test_kept_states_are_those_of_a_rollout(plan: RolloutPlan, keep_means: bool) -> None:
    schedule = flow_schedule([1 - step / plan.steps for step in range(plan.steps + 1)])
    forest = rollout(
        lambda x, step, prompt_index: x,
        torch.randn(1, plan.roots, 3),
        plan,
        schedule,
        transitions(schedule, plan.stochastic),
        keep_means=keep_means,
    )
    tensors = [forest.leaves]
    for level in forest.levels:
        tensors += [level.nodes, level.children, *([] if level.mean is None else [level.mean])]
    shared = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    states = count_states(plan, keep_means=keep_means)
    assert states.kept == sum(storage.nbytes() for storage in shared.values()) // (3 * 4)
    assert states.copied == sum(tensor.numel() for tensor in tensors) // 3
    assert len(states.by_step) == plan.steps


@pytest.mark.slow
def test_only_the_micro_batch_decides_the_updates_activations(
    tiny_checkpoint: Path, measured: Measurements
) -> None:
    def activations(*changes: str) -> int:
        config = configuration(tiny_checkpoint, *changes)
        return estimate(config, measurements=measured).phase("update").device["activations"]

    least = activations()
    assert activations("rollout.prompts_per_iteration=16") == least
    # More prompts and one more level: more leaves, as many rows at a time.
    assert activations("rollout.window_size=3", "rollout.max_batch=2") == least
    assert 1.5 * least < activations("train.micro_batch=8") < 2.5 * least
    assert activations("model.gradient_checkpointing=true") < 0.9 * least


def test_the_rollout_does_not_grow_with_the_leaves_beyond_max_batch(
    tiny_checkpoint: Path, measured: Measurements
) -> None:
    def phases(window: int) -> tuple[int, int]:
        config = configuration(
            tiny_checkpoint, f"rollout.window_size={window}", "rollout.max_batch=2"
        )
        parts = estimate(config, measurements=measured).phase("rollout").device
        return parts["activations"], parts["states"]

    (few, few_states), (many, many_states) = phases(2), phases(4)
    assert many == few
    assert many_states > 3 * few_states


def test_offload_moves_states_to_the_host(tiny_checkpoint: Path) -> None:
    kept = estimate(configuration(tiny_checkpoint, "model.device=cuda")).phase("update")
    config = configuration(tiny_checkpoint, "model.device=cuda", "rollout.offload=true")
    moved = estimate(config).phase("update")
    assert kept.host == {}
    assert moved.host["states"] == kept.device["states"]
    assert moved.device["states"] < kept.device["states"]
    assert moved.device["activations"] == kept.device["activations"]


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.7, 0.4, 0.2])
def test_suggested_settings_fit_and_none_is_superfluous(
    share: float, tiny_checkpoint: Path, measured: Measurements
) -> None:
    changes = ["train.micro_batch=32", "rollout.prompts_per_iteration=16"]
    config = configuration(tiny_checkpoint, *changes)
    limit = int(share * estimate(config, measurements=measured).peak)
    advice = suggest(config, limit, measurements=measured)
    assert advice.fits
    settings = [f"{change.key}={change.value}" for change in advice.changes]
    changed = configuration(tiny_checkpoint, *changes, *settings)
    assert estimate(changed).peak == advice.changes[-1].peak <= limit
    for setting in settings:
        others = [other for other in settings if other != setting]
        lacking = configuration(tiny_checkpoint, *changes, *others)
        assert estimate(lacking, measurements=measured).peak > limit


@pytest.mark.slow
def test_what_nothing_makes_fit_is_said(tiny_checkpoint: Path, measured: Measurements) -> None:
    advice = suggest(configuration(tiny_checkpoint), 1000, measurements=measured)
    assert not advice.fits
    assert advice.changes


def test_training_all_of_quantised_weights_is_not_planned(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    # As of a hub's checkpoint, whose configuration is known late.
    packed = {"quantization_config": {"quant_method": "fbgemm_fp8"}}
    folder = edited(tiny_checkpoint, tmp_path / "packed", {"transformer/config.json": packed})
    with pytest.raises(ModelError, match=r"^model\.lora_rank: got 0, which trains all weights"):
        estimate(configuration(folder))


def test_peak_bytes_counts_what_is_alive() -> None:
    with PeakBytes() as count:
        first = torch.zeros(1000)
        second = first.view(10, 100) + 1  # a view takes nothing
        del first
        third = second * 2
        del second, third
    assert (count.live, count.peak) == (0, 8000)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("24 gb", 24 * 10**9),
        ("0.5KiB", 512),
        ("24000000", 24_000_000),
        ("7B", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_memory(text) == size


def plan_json(treegrpo: CommandLine, *arguments: str) -> tuple[str, dict[str, Any]]:
    """What `treegrpo plan` prints, and what it writes."""
    code, out, err = treegrpo("plan", *arguments, "--json", "plan.json")
    assert (code, err) == (0, "")
    data: dict[str, Any] = json.loads(Path("plan.json").read_text())
    return out, data


def test_the_command_needs_configurations_alone(
    tiny_checkpoint: Path, treegrpo: CommandLine
) -> None:
    folder = Path("configurations")
    for file in tiny_checkpoint.rglob("*.json"):
        part = file.relative_to(tiny_checkpoint)
        if part.parts[0].startswith("tokenizer"):
            continue
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        (folder / part).write_bytes(file.read_bytes())
    out, data = plan_json(treegrpo, *SMALL, f"model.path={folder}", "--processes", "2")
    needed = estimate(configuration(tiny_checkpoint), processes=2)
    assert data["memory"]["peak"] == needed.peak
    assert data["memory"]["parameters"] == needed.parameters
    assert (data["work"]["images"], data["work"]["prompts"]) == (16, 4)
    assert (data["limit"], data["fits"], data["advice"]) == (None, None, None)
    assert f"network {needed.parameters:,} parameters" in out
    for phase in needed.phases:
        assert phase.name in out
    # Training does need the weights, and says so.
    refusal = treegrpo.refusal("train", *SMALL, f"model.path={folder}")
    assert "the checkpoint is incomplete" in refusal


@pytest.mark.slow
def test_the_command_says_whether_it_fits(tiny_checkpoint: Path, treegrpo: CommandLine) -> None:
    arguments = (*SMALL, f"model.path={tiny_checkpoint}")
    out, data = plan_json(treegrpo, *arguments, "--memory", "24GiB")
    assert "fits into 24.00 GiB" in out
    assert (data["limit"], data["fits"], data["advice"]) == (24 * 2**30, True, None)
    limit = int(0.6 * data["memory"]["peak"])
    out, data = plan_json(treegrpo, *arguments, "--memory", str(limit))
    assert "does not fit" in out
    assert (data["fits"], data["advice"]["fits"]) == (False, True)
    first = data["advice"]["changes"][0]
    assert f"{first['key']}=" in out
    out, _ = plan_json(treegrpo, *arguments, "--memory", "1KiB")
    assert "no settings of the same model and size make it fit" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "24 apples"], "--memory: got '24 apples'; must be a size such as 24GiB"),
        (["--memory", "0GiB"], "--memory: got '0GiB'; must be"),
        (["--memory", "24"], "--memory: got '24'; must be"),
        (["a.yaml", "b.yaml"], "got 2 configuration files"),
        (["model.path=./none"], "model.path: no folder ./none; must be"),
        (["--json", "no/such.json"], "--json: no folder no "),
        (["--processes", "3"], "rollout.prompts_per_iteration: got 16; must be a multiple of 3"),
        (["rollout.window_size=11"], "rollout.window_size: got 11"),
        (["model.height=33"], "model.height: got 33"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    arguments: list[str], message: str, treegrpo: CommandLine
) -> None:
    assert treegrpo.refusal("plan", *arguments).startswith(message)

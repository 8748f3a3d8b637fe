"""Training from end to end on a tiny model: the command line, exact resume, interruptions."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_rewards
from command_line import CommandLine
from diffusers import SD3Transformer2DModel

from treegrpo import checkpoint, cli
from treegrpo.config import Config, ModelConfig, load_config, method_of, to_yaml
from treegrpo.errors import UserError
from treegrpo.models.folder import ModelError
from treegrpo.models.opening import load_policy
from treegrpo.prompts import PromptError
from treegrpo.rewards import RewardError
from treegrpo.run_folder import (
    STATE_FILE,
    RunError,
    append_line,
    check_run_folder,
    prepare_folder,
    read_lines,
)
from treegrpo.training.build import Run, build
from treegrpo.training.learner import Learner
from treegrpo.training.loop import iterate, train
from treegrpo.training.metrics import SilentRewards

STEPS = 4
REWARD = "toy_rewards:brightness"
BASE = (
    f"rollout.steps={STEPS}",
    "rollout.prompts_per_iteration=2",
    "train.learning_rate=1e-3",
    "train.learning_rate_schedule=constant",
    "train.warmup_iterations=0",
    "train.ema_decay=null",
    "train.save_every=0",
    "evaluation.max_prompts=2",
    "evaluation.images_per_prompt=1",
    "model.device=cpu",
)
OF_METHOD = {
    "tree_grpo": ("rollout.branching=2", "rollout.window_size=2"),
    "branch_grpo": ("rollout.branching=2",),
    "mix_grpo": ("rollout.group_size=4", "rollout.window_size=2"),
    **dict.fromkeys(("flow_grpo", "dance_grpo", "ddpo"), ("rollout.group_size=4",)),
}
TOY = (f"rewards=[{{name: '{REWARD}'}}]",)
METRICS = {
    "iteration",
    "reward",
    "reward_std",
    "reward_std_within_group",
    "groups_without_signal",
    "accuracy",
    "ratio_error",
    "ratio_mean",
    "ratio_min",
    "ratio_max",
    "clip_fraction",
    "kl",
    "loss",
    "gradient_norm",
    "effective_sample_size",
    "window_start",
    "rollout_forwards",
    "update_forwards",
    "learning_rate",
    "seconds",
    "seconds_rollout",
    "seconds_decode",
    "seconds_reward",
    "seconds_update",
}
# `record | TIMES` leaves what a repetition must give exactly.
TIMES = {name: 0.0 for name in METRICS if name.startswith("seconds")}
TESTS = Path(__file__).parent  # where toy_rewards is
PHASES = [
    "encoding prompts",
    "reading weights",
    "evaluation of 2 prompts",
    *("rollout", "decode", "reward", "update"),
]


def settings_of(tiny_checkpoint: Path, output: Path, *changes: str) -> list[str]:
    named = [change for change in changes if change.startswith("rollout.method=")]
    own = OF_METHOD[named[-1].partition("=")[2] if named else "tree_grpo"]
    paths = (f"model.path={tiny_checkpoint}", f"output={output}")
    return [*BASE, *own, *TOY, *paths, *changes]


@pytest.fixture
def configure(tiny_checkpoint: Path, tmp_path: Path) -> Callable[..., Config]:
    """Changes to the tests' base settings, to a configuration that writes to `tmp_path/run`."""

    def build(*changes: str) -> Config:
        return load_config(None, settings_of(tiny_checkpoint, tmp_path / "run", *changes))

    return build


def iterated(config: Config, count: int) -> tuple[Run, list[dict[str, float]]]:
    run = build(config)
    return run, [iterate(run) for _ in range(count)]


def weights_of(run: Run) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in run.learner.parameters]


def equal(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- through the command line ---


@pytest.fixture(scope="module")
def run(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three iterations with a trained and a watched reward."""
    folder = tmp_path_factory.mktemp("training") / "run"
    changes = [
        *BASE,
        *OF_METHOD["tree_grpo"],
        f"rewards=[{{name: '{REWARD}'}}, {{name: composition_accuracy, weight: 0}}]",
        f"model.path={tiny_checkpoint}",
        f"output={folder}",
        "train.iterations=3",
        "evaluation.every=2",
    ]
    result = subprocess.run(
        [sys.executable, "-m", "treegrpo", "train", *changes],
        capture_output=True,
        text=True,
        cwd=TESTS,
        env=os.environ | {"COLUMNS": "80"},
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    lines = [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in result.stdout.splitlines()]
    # What a large model is busy with before its first iteration is done, each phase once.
    phases = [line for line in lines[: _line(lines, "iteration 1/3")] if line in PHASES]
    assert phases == PHASES
    for number in (1, 2, 3):
        found = lines[_line(lines, f"iteration {number}/3")]
        assert re.search(r"  reward 0\.\d+  accuracy \d+%  [\d.]+ s  left [\d.]+ s$", found)
    for number in (0, 2, 3):  # when they happen
        place = _line(lines, f"evaluation {number}/3  {REWARD} 0.")
        assert place > (_line(lines, f"iteration {number}/3") if number else 0)
    assert _line(lines, "evaluation 2/3") < _line(lines, "iteration 3/3")
    assert max(map(len, lines)) <= 80
    assert "trained model" in result.stdout
    return folder


def _line(lines: list[str], beginning: str) -> int:
    """Where the first line that begins so is."""
    return next(number for number, line in enumerate(lines) if line.startswith(beginning))


def test_a_run_leaves_everything_about_it(run: Path) -> None:
    config = load_config(run / "config.yaml", [])
    assert config.output == run
    assert config.train.iterations == 3
    assert json.loads((run / "versions.json").read_text())["torch"] == version("torch")
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    for picture in ("before_after.png", "curve.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    records = read_lines(run / "metrics.jsonl")
    assert [record["iteration"] for record in records] == [0, 1, 2]
    for record in records:
        assert record.keys() >= METRICS
        plan = method_of(config).plan(int(record["iteration"]))
        assert record["rollout_forwards"] == 2 * plan.rollout_forwards
        assert record["update_forwards"] == 2 * plan.update_forwards
        assert record["ratio_error"] < 1e-5
        assert record["gradient_norm"] > 0
        stages = sum(record[f"seconds_{stage}"] for stage in ("rollout", "reward", "update"))
        assert 0 < stages <= record["seconds"]
    evaluations = read_lines(run / "evaluations.jsonl")
    assert [record["iteration"] for record in evaluations] == [0, 2, 3]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["iterations"] == 3
    assert not summary["interrupted"]
    for kind in ("rollout_forwards", "update_forwards"):
        assert summary[kind] == sum(record[kind] for record in records)


def exported_weights(model: Path) -> list[torch.Tensor]:
    """As diffusers alone loads them."""
    return list(SD3Transformer2DModel.from_pretrained(model / "transformer").parameters())


def test_the_trained_model_is_the_checkpoints(run: Path, tiny_checkpoint: Path) -> None:
    exported = exported_weights(run / "model")
    assert equal(exported, checkpoint.load_state(run)["parameters"])
    assert not equal(exported, exported_weights(tiny_checkpoint))


def test_the_trained_model_is_sampled_and_evaluated(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def treegrpo(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["treegrpo", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 0

    model, picture, figures = str(run / "model"), tmp_path / "grid.png", tmp_path / "figures.json"
    treegrpo("sample", model, "--prompt", "a red circle", "--count", "2", "--out", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    arguments = ["--max-prompts", "2", "--images-per-prompt", "1", "--json", str(figures)]
    rewards = ["--reward", REWARD, "--reward", "composition_accuracy"]
    treegrpo("evaluate", model, *rewards, *arguments)
    # The same prompts and noises as the run's own last evaluation.
    last = read_lines(run / "evaluations.jsonl")[-1]
    for name, figure in json.loads(figures.read_text())["rewards"].items():
        assert figure["mean"] == pytest.approx(last[name], rel=1e-6)
        assert figure["standard_error"] == pytest.approx(last[f"{name}_standard_error"], rel=1e-6)


def test_other_settings_do_not_resume_a_run(run: Path) -> None:
    before = read_lines(run / "metrics.jsonl")
    changed = load_config(run / "config.yaml", ["train.learning_rate=0.5", "rollout.branching=3"])
    with pytest.raises(RunError) as caught:
        train(changed, resume=True)
    assert "train.learning_rate: was 0.001, now 0.5" in str(caught.value)
    assert "rollout.branching: was 2, now 3" in str(caught.value)
    with pytest.raises(RunError, match="already holds a run"):
        train(load_config(run / "config.yaml", []))
    assert read_lines(run / "metrics.jsonl") == before
    linear = ["train.iterations=9", "train.learning_rate_schedule=linear"]
    with pytest.raises(RunError, match=r"train\.iterations: was 3, now 9"):
        train(load_config(run / "config.yaml", linear), resume=True)
    # What changes neither the result nor its meaning may differ.
    free = [
        *("train.iterations=9", "train.micro_batch=1", "rollout.max_batch=3"),
        *("rollout.offload=true", "rollout.decode_batch=2", "model.gradient_checkpointing=true"),
    ]
    check_run_folder(load_config(run / "config.yaml", free), resume=True, overwrite=False)


@pytest.mark.slow
def test_control_c_ends_a_run_that_can_go_on(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    changes = settings_of(tiny_checkpoint, folder, "train.iterations=100000")
    command = [sys.executable, "-m", "treegrpo", "train", *changes]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=TESTS,
    ) as process:
        assert process.stdout is not None
        assert any("iteration 1/" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=600)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "stopping after this iteration" in output
    assert "--resume" in output
    done = checkpoint.load_state(folder)["iteration"]
    assert done == len(read_lines(folder / "metrics.jsonl")) > 0
    assert (folder / "model" / "model_index.json").is_file()
    result = train(
        load_config(folder / "config.yaml", [f"train.iterations={done + 1}"]), resume=True
    )
    assert result.iterations == done + 1


def press_control_c(times: int = 1) -> None:
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("where", ["sampling", "saving", "updating"])
def test_the_second_control_c_ends_a_run_at_once_and_harms_nothing(
    configure: Callable[..., Config],
    treegrpo: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    changes = ("train.iterations=4", "train.updates_per_iteration=2", "train.save_every=2")
    expected = weights_of(iterated(configure(*changes), 4)[0])
    config = configure(*changes)
    Path("run.yaml").write_text(to_yaml(config), encoding="utf-8")
    calls: list[str] = []

    def pressing(name: str, at: int, times: int, function: Callable[..., Any]) -> Any:
        """The function, at whose n-th call someone presses Ctrl-C."""

        def called(*arguments: Any, **settings: Any) -> Any:
            answer = function(*arguments, **settings)
            calls.append(name)
            if calls.count(name) == at:
                press_control_c(times)
            return answer

        return called

    with monkeypatch.context() as patch:
        # The trial on gray pictures asks the reward, the evaluation, and then each iteration.
        if where == "sampling":  # of the fourth
            brightness = pressing("reward", 6, 2, toy_rewards.brightness)
            patch.setattr(toy_rewards, "brightness", brightness)
        elif where == "saving":  # after the first one, in which the first press was
            brightness = pressing("reward", 3, 1, toy_rewards.brightness)
            patch.setattr(toy_rewards, "brightness", brightness)
            patch.setattr(torch, "save", pressing("save", 1, 2, torch.save))
        else:  # between the fourth one's two steps: the weights are those of no iteration
            patch.setattr(Learner, "_step", pressing("step", 7, 2, Learner._step))
        code, out, err = treegrpo("train", "run.yaml")
    assert (code, err) == (130, "")
    done = {"sampling": 3, "saving": 1, "updating": 2}[where]
    iterations = "1 iteration" if done == 1 else f"{done} iterations"
    assert f"stopped at once; the state after {iterations} is saved: continue with" in out
    assert ("stopping once this is written" in out) == (where == "saving")
    assert not list(config.output.glob("*.partial"))
    assert checkpoint.load_state(config.output)["iteration"] == done
    train(config, resume=True)
    assert equal(checkpoint.load_state(config.output)["parameters"], expected)


def test_control_c_while_a_run_is_prepared_ends_it(
    configure: Callable[..., Config], treegrpo: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("run.yaml").write_text(to_yaml(configure()), encoding="utf-8")

    def pressed(*arguments: Any, **settings: Any) -> None:
        press_control_c()
        time.sleep(30)  # which the signal ends, as soon as it arrives

    monkeypatch.setattr("treegrpo.training.build.load_weights", pressed)
    code, _, err = treegrpo("train", "run.yaml")
    assert (code, err) == (130, "")


def test_an_interrupted_write_leaves_the_earlier_state(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure()
    config.output.mkdir()
    checkpoint.save_state(config.output, {"iteration": 1})
    write = torch.save

    def interrupted(state: dict[str, Any], path: Path) -> None:
        write(state, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_state(config.output, {"iteration": 2})
    assert checkpoint.load_state(config.output)["iteration"] == 1
    assert not list(config.output.glob("*.partial"))


def test_a_reward_without_signal_is_spoken_of(
    configure: Callable[..., Config],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained, watched = "toy_rewards:constant", "toy_rewards:by_prompt"
    monkeypatch.setattr(
        toy_rewards, "constant", lambda images, *_: torch.full((len(images),), 0.25), raising=False
    )
    monkeypatch.setattr(
        toy_rewards,
        "by_prompt",
        lambda images, prompts, _: [float(len(prompt)) for prompt in prompts],
        raising=False,
    )
    both = f"[{{name: '{trained}'}}, {{name: '{REWARD}'}}, {{name: '{watched}', weight: WEIGHT}}]"
    run = build(configure(f"rewards={both.replace('WEIGHT', '0')}"))
    for count in range(5):
        iterate(run)
        assert len(run.warnings) == (count >= 2)  # once
    (warning,) = run.warnings
    assert warning.startswith(
        "for 3 iterations, the reward 'toy_rewards:constant' has given all pictures of a prompt "
        "the same (0.2500): nothing can be learned from it."
    )
    assert "rollout.noise_level" in warning
    silent = SilentRewards(["x"])
    one_group = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    assert not any(silent.warnings({"x": one_group}) for _ in range(9))
    train(configure(f"rewards={both.replace('WEIGHT', '1')}", "train.iterations=3"))
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(told) == 2
    assert re.search(r"'toy_rewards:by_prompt' .* the same \(between \d+\.\d+ and \d+\.", told[1])


# --- every way of training ---

ALL_STEPS = ("rollout.noise_level=0.5", "rollout.deterministic_final_step=true")


@pytest.mark.parametrize(
    "changes",
    [
        ("rollout.method=tree_grpo", "rollout.trees=2"),
        ("rollout.method=flow_grpo",),
        ("rollout.method=dance_grpo",),
        ("rollout.method=mix_grpo",),
        ("rollout.method=branch_grpo", "rollout.split_steps=[0, 2]"),
        ("rollout.method=ddpo",),
        ("rollout.transition=dance_sde",),
        ("rollout.transition=cps",),
        ("rollout.method=flow_grpo", "rollout.transition=cps", *ALL_STEPS),
        ("objective.guard=true",),
        ("objective.log_prob_reduction=sum",),
        ("model.guidance_scale=3.0",),
        ("model.lora_rank=2",),
        ("advantage.std=global", "advantage.backup=sibling"),
        ("model.dtype=bfloat16",),
    ],
    ids=" ".join,
)
def test_first_update_reproduces_what_the_rollout_sampled(
    configure: Callable[..., Config], changes: tuple[str, ...]
) -> None:
    config = configure(*changes)
    run, (metrics,) = iterated(config, 1)
    # bfloat16 is exact here too, because both passes see batches of the same shape.
    assert metrics["ratio_error"] < 1e-5
    assert metrics["gradient_norm"] > 0
    plan = method_of(config).plan(int(metrics["iteration"]))
    assert metrics["rollout_forwards"] == 2 * plan.rollout_forwards
    assert metrics["update_forwards"] == 2 * plan.update_forwards
    assert all(parameter.isfinite().all() for parameter in run.learner.parameters)


def test_work_is_counted_over_all_updates(configure: Callable[..., Config]) -> None:
    changes = ("train.inner_epochs=3", "train.updates_per_iteration=2", "train.ema_decay=0.5")
    config = configure(*changes)
    run, (metrics,) = iterated(config, 1)
    plan = method_of(config).plan(int(metrics["iteration"]))
    assert metrics["update_forwards"] == 3 * 2 * plan.update_forwards
    # The first update is on the sampling policy; the later ones are not.
    assert metrics["ratio_error"] < 1e-5
    assert metrics["ratio_min"] < 1 - 1e-5 or metrics["ratio_max"] > 1 + 1e-5
    assert 0 < metrics["clip_fraction"] < 1
    assert run.learner.average is not None
    assert run.learner.average.optimization_step == 6


@pytest.mark.parametrize(
    "changes",
    [
        ("train.micro_batch=1",),
        ("train.micro_batch=3", "rollout.max_batch=5", "rollout.decode_batch=2"),
        ("rollout.prompts_per_batch=1",),
        ("rollout.offload=true", "rollout.max_batch=3"),
        ("model.gradient_checkpointing=true",),
        ("model.embedding_cache=null",),
        ("objective.reference_on_cpu=true",),
    ],
    ids=" ".join,
)
def test_some_settings_change_time_and_memory_only(
    changes: tuple[str, ...], configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pictures of 256 levels would turn a difference in the last bit into one of a level.
    monkeypatch.setattr("treegrpo.training.collector.as_pictures", lambda images: images)

    def gradients(*changes: str) -> torch.Tensor:
        # With the terms that keep more than the states.
        extras = ("objective.guard=true", "objective.kl_weight=0.1")
        run = build(configure(*extras, *changes))
        monkeypatch.setattr(run.learner.optimizer, "zero_grad", lambda: None)
        iterate(run)
        return torch.cat([p.grad.flatten() for p in run.learner.parameters if p.grad is not None])

    whole = gradients("train.micro_batch=64", "rollout.max_batch=64")
    assert whole.norm() > 1e-3
    assert (gradients(*changes) - whole).norm() < 1e-4 * whole.norm()


@pytest.mark.parametrize("lora", [0, 2])
def test_divergence_is_from_the_initial_model(configure: Callable[..., Config], lora: int) -> None:
    config = configure(f"model.lora_rank={lora}", "objective.kl_weight=0.1")
    run, metrics = iterated(config, 2)
    assert metrics[0]["kl"] == 0
    assert metrics[1]["kl"] > 1e-6
    config.output.mkdir()
    run.save()
    # A resumed run measures from the initial model too, not from where it goes on.
    resumed = build(config, resume=True)
    resumed.restore()
    assert iterate(resumed) | TIMES == iterate(run) | TIMES
    assert equal(weights_of(run), weights_of(resumed))


def test_every_iteration_draws_new_noises(configure: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("a red circle\n")
    prompts = (f"prompts.train={tmp_path / 'prompt.txt'}", "prompts.held_out=miniature")
    changes = (*prompts, "train.learning_rate=1e-30")
    _, (first, second) = iterated(configure(*changes, "rollout.window_schedule=fixed"), 2)
    assert first["reward"] != second["reward"]


# --- resuming ---


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("train.ema_decay=0.9", "train.warmup_iterations=3", "train.updates_per_iteration=2"),
        ("model.lora_rank=2",),
    ],
    ids=["full", "average and warmup", "LoRA"],
)
def test_a_resumed_run_is_the_unbroken_one(
    configure: Callable[..., Config], tmp_path: Path, changes: tuple[str, ...]
) -> None:
    outputs = [f"output={tmp_path / name}" for name in ("unbroken", "broken")]
    # Looking at the model on the way must not change it.
    unbroken = train(configure(*changes, outputs[0], "train.iterations=4", "evaluation.every=1"))
    train(configure(*changes, outputs[1], "train.iterations=2"))
    # As if the run had been killed after it had logged one more iteration.
    append_line(tmp_path / "broken" / "metrics.jsonl", {"iteration": 2})
    resumed = train(
        configure(*changes, outputs[1], "train.iterations=4", "evaluation.every=1"), resume=True
    )

    assert (resumed.before, resumed.after) == (unbroken.before, unbroken.after)
    assert resumed.rollout_forwards == unbroken.rollout_forwards
    states = [checkpoint.load_state(tmp_path / name) for name in ("unbroken", "broken")]
    assert equal(states[0]["parameters"], states[1]["parameters"])
    if "train.ema_decay=0.9" in changes:
        averages = [state["average"]["shadow_params"] for state in states]
        assert equal(*averages)
        assert not equal(averages[0], states[0]["parameters"])
        assert equal(exported_weights(tmp_path / "broken" / "model"), averages[0])
    logs = [
        [record | TIMES for record in read_lines(tmp_path / name / "metrics.jsonl")]
        for name in ("unbroken", "broken")
    ]
    assert [record["iteration"] for record in logs[0]] == [0, 1, 2, 3]
    assert logs[0] == logs[1]
    # The broken run was looked at before and after its first part, and as often as told since then.
    looks = [
        [record | TIMES for record in read_lines(tmp_path / name / "evaluations.jsonl")]
        for name in ("unbroken", "broken")
    ]
    assert [record["iteration"] for record in looks[0]] == [0, 1, 2, 3, 4]
    assert looks[1] == [looks[0][0], *looks[0][2:]]


def test_a_server_may_come_back_elsewhere(configure: Callable[..., Config]) -> None:
    def with_server(address: str, **options: object) -> Config:
        reward = {"name": address, "label": "style", "options": options}
        return configure(f"rewards=[{json.dumps(reward)}]")

    config = with_server("http://a:1", give_up_after_seconds=1)
    prepare_folder(config, resume=False, overwrite=False)
    (config.output / STATE_FILE).touch()
    moved = with_server("http://b:2", give_up_after_seconds=900, token_env="TOKEN")
    check_run_folder(moved, resume=True, overwrite=False)
    other = configure("rewards=[{name: jpeg_compressibility, label: style}]")
    with pytest.raises(RunError, match="was made with other settings"):
        check_run_folder(other, resume=True, overwrite=False)


def test_what_cannot_be_resumed_is_refused_before_any_work(
    configure: Callable[..., Config], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue circle\n")
    sources = (f"prompts.train={prompts}", "prompts.held_out=miniature")
    config = configure(*sources, "train.iterations=1")
    train(config)
    state = (config.output / "checkpoint.pt").read_bytes()
    prompts.write_text("a red circle\na green circle\n")
    with pytest.raises(PromptError, match="was made with other prompts than these 2"):
        build(config, resume=True)
    for damaged in (state[:1000], b""):
        (config.output / "checkpoint.pt").write_bytes(damaged)
        with pytest.raises(RunError, match=r"checkpoint\.pt is damaged and cannot be resumed from"):
            build(config, resume=True)
    # A line that a crash cut short is no record.
    with (config.output / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 7, "rew')
    assert read_lines(config.output / "metrics.jsonl")[-1]["iteration"] == 0


def test_a_run_is_not_resumed_upon_exchanged_files(
    configure: Callable[..., Config], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    weights, folder = tmp_path / "reward.bin", tmp_path / "heads"
    weights.write_bytes(b"0" * 5_000_000)
    folder.mkdir()
    (folder / "head.bin").write_bytes(b"1")
    reward = {
        "name": "toy_rewards:Keeps",
        "options": {"file": str(weights), "heads_path": str(folder), "text": str(tmp_path)},
    }
    config = configure(
        f"model.path={model}",
        f"rewards=[{json.dumps(reward)}]",
        "model.lora_rank=2",
        "train.iterations=1",
    )
    train(config)
    recorded = (config.output / "dependencies.json").read_text()
    build(config, resume=True)

    def refused(*names: str) -> None:
        with pytest.raises(RunError, match="began with other files") as caught:
            build(config, resume=True)
        assert str(caught.value).splitlines()[1:] == [f"  {name}: changed" for name in names]

    # In the middle of a file, with size and time as they were.
    for name, path in {
        "model.path, transformer": model / "transformer" / "diffusion_pytorch_model.safetensors",
        "model.path, vae": model / "vae" / "diffusion_pytorch_model.safetensors",
        "rewards.0.options.file": weights,
        "rewards.0.options.heads_path": folder / "head.bin",
    }.items():
        before, times = path.read_bytes(), path.stat()
        middle = len(before) // 2
        path.write_bytes(before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :])
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        refused(name)
        path.write_bytes(before)
    assert train(config, resume=True).iterations == 1
    assert (config.output / "dependencies.json").read_text() == recorded
    # What other versions have not recorded is not compared.
    (config.output / "dependencies.json").unlink()
    build(config, resume=True)


def test_an_evaluation_that_failed_is_made_up_for(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure("train.iterations=2", "evaluation.every=1")
    brightness, calls = toy_rewards.brightness, []

    def failing(images: torch.Tensor, prompts: list[str], metadata: object) -> torch.Tensor:
        calls.append(len(images))
        if len(calls) == 3:  # the evaluation after the first iteration
            raise ConnectionError("gone")
        return brightness(images, prompts, metadata)

    with monkeypatch.context() as patch:
        patch.setattr("toy_rewards.brightness", failing)
        with pytest.raises(RewardError):
            train(config)
    train(config, resume=True)
    records = read_lines(config.output / "evaluations.jsonl")
    assert [record["iteration"] for record in records] == [0, 1, 2]


def test_a_gradient_that_is_not_finite_is_not_followed(configure: Callable[..., Config]) -> None:
    run = build(configure())
    before = weights_of(run)
    run.progress.iteration = 1  # where nobody looks at the first ratio
    network: Any = run.policy.network
    network.proj_out.register_forward_hook(
        lambda module, inputs, output: output * torch.nan if torch.is_grad_enabled() else output
    )
    with pytest.raises(UserError, match="the gradient of iteration 1 is not finite"):
        iterate(run)
    assert equal(weights_of(run), before)


def test_a_run_whose_reward_fails_goes_on_as_if_it_had_not(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Under the linear schedule, a run of another length would have learned at other rates.
    config = configure("train.iterations=3", "train.learning_rate_schedule=linear")
    unbroken, expected = iterated(config, 3)
    rates = [record["learning_rate"] for record in expected]
    assert rates == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
    calls: list[int] = []

    brightness = toy_rewards.brightness

    def failing(images: torch.Tensor, prompts: list[str], metadata: object) -> torch.Tensor:
        calls.append(len(images))
        if len(calls) == 4:  # after the evaluation before training and two iterations
            raise ConnectionError("the reward's server is gone")
        return brightness(images, prompts, metadata)

    with monkeypatch.context() as patch:
        patch.setattr("toy_rewards.brightness", failing)
        with pytest.raises(RewardError) as caught:
            train(config)
    for word in (REWARD, "ConnectionError", "the reward's server is gone"):
        assert word in str(caught.value)
    (kept,) = (config.output / "failed_reward").glob("*.npz")
    assert str(kept) in str(caught.value)

    assert train(config, resume=True).iterations == 3
    state = checkpoint.load_state(config.output)
    assert equal(state["parameters"], weights_of(unbroken))
    records = read_lines(config.output / "metrics.jsonl")
    for record, other in zip(records, expected, strict=True):
        # Only `train` knows the untrained model's rewards, by which it normalizes.
        assert record.keys() - other.keys() == {f"reward_normalized/{REWARD}"}
        assert {name: record[name] for name in other} | TIMES == other | TIMES


def test_a_reward_that_is_not_a_number_is_refused(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build(configure())
    before = weights_of(run)
    monkeypatch.setitem(
        run.rewards, REWARD, lambda images, *_: torch.full((len(images),), torch.nan)
    )
    with pytest.raises(RewardError, match=f"{REWARD}' returned nan for the prompt '"):
        iterate(run)
    assert equal(weights_of(run), before)


def test_an_interrupted_update_is_repeated(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected = iterated(configure(), 1)
    run = build(configure())
    with monkeypatch.context() as patch:
        patch.setattr(run.engine, "backward", _out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            iterate(run)
    assert iterate(run) | TIMES == expected[0] | TIMES


def _out_of_memory(*arguments: object, **options: object) -> None:
    raise RuntimeError("out of memory")


def test_a_model_that_does_not_reproduce_itself_is_not_updated(
    configure: Callable[..., Config],
) -> None:
    run = build(configure())
    before = weights_of(run)
    run.policy.network.register_forward_hook(
        lambda module, inputs, outputs: (torch.nn.functional.dropout(outputs[0], 0.1),)
    )
    with pytest.raises(UserError, match=r"the first update's ratio is off 1 by .*dropout"):
        iterate(run)
    assert equal(weights_of(run), before)


def test_exported_lora_weights_know_their_base_model(
    configure: Callable[..., Config],
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tiny_checkpoint.parent)
    changes = (f"model.path=./{tiny_checkpoint.name}", "model.lora_rank=2")
    run, _ = iterated(configure(*changes), 1)
    run.export(tmp_path / "lora")
    monkeypatch.chdir(tmp_path)
    model = ModelConfig(path="lora", embedding_cache=None)
    assert load_policy(model, device=torch.device("cpu")).sampling.steps == STEPS
    # Training them as if they were a whole model would export neither.
    with pytest.raises(ModelError, match=r"model\.path: lora holds LoRA weights"):
        build(configure("model.path=lora"))


# --- disks ---


def test_a_run_that_would_not_fit_is_refused_first(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure()
    usage = shutil.disk_usage(config.output.parent)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RunError, match=r"output: .* has 1 MiB free, but .* need about \d+ MiB"):
        train(config)
    assert not (config.output / "metrics.jsonl").exists()


@pytest.mark.parametrize("average", ["null", "0.5"])
def test_what_a_checkpoint_takes_is_known_before(
    configure: Callable[..., Config], average: str
) -> None:
    config = configure(f"train.ema_decay={average}")
    run, _ = iterated(config, 1)  # from then on the optimizer has moments
    config.output.mkdir()
    run.save()
    # Beside the tensors, a file says what they are.
    written = (config.output / STATE_FILE).stat().st_size
    assert 0.7 * written < run.learner.state_bytes() < written


def test_a_full_disk_leaves_the_earlier_checkpoint(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure("train.save_every=1", "train.iterations=3")
    write = torch.save

    def full_after_half(state: dict[str, Any], path: Path) -> None:
        if state["iteration"] < 2:
            return write(state, path)
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    message = r"No space left on device; an earlier checkpoint .* is unharmed"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_after_half)
        with pytest.raises(RunError, match=message):
            train(config)
    assert checkpoint.load_state(config.output)["iteration"] == 1
    assert not list(config.output.glob("*.partial"))
    assert train(config, resume=True).iterations == 3


# --- learning ---


def test_training_raises_the_reward(configure: Callable[..., Config]) -> None:
    config = configure(
        "rollout.branching=4",
        "rollout.prompts_per_iteration=4",
        "train.learning_rate=3e-3",
        "evaluation.max_prompts=16",
    )
    run = build(config)
    before = run.measure().scores[REWARD]
    for _ in range(8):
        iterate(run)
    # The same prompts and noises, so the difference is the training's.
    gain = run.measure().scores[REWARD] - before
    assert gain.mean() > 10 * gain.std() / len(gain) ** 0.5

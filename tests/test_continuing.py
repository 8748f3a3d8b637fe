"""Going on: a run by its folder, a longer one, LoRA weights to start from, what rewards remember.

Left out: that a resumed run is the unbroken one otherwise (`test_training.py`).
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import CommandLine
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from treegrpo import checkpoint
from treegrpo.config import load_config
from treegrpo.run_folder import read_lines
from treegrpo.training.build import build
from treegrpo.training.loop import iterate

REWARD = "toy_rewards:brightness"
TIMES = re.compile("seconds")


def settings(model: Path, *changes: str, output: str = "run", reward: str = REWARD) -> list[str]:
    return [
        f"model.path={model}",
        "model.device=cpu",
        "rollout.steps=3",
        "rollout.branching=2",
        "rollout.window_size=2",
        "rollout.prompts_per_iteration=2",
        "train.learning_rate=1e-3",
        "train.warmup_iterations=0",
        "train.ema_decay=null",
        "train.save_every=0",
        "train.iterations=2",
        "evaluation.max_prompts=2",
        "evaluation.images_per_prompt=1",
        "tracking=[]",
        f"rewards=[{{name: '{reward}'}}]",
        f"output={output}",
        *changes,
    ]


def records(folder: str, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    lines = read_lines(Path(folder) / name)
    return [{k: v for k, v in line.items() if not TIMES.match(k)} for line in lines]


def parameters(folder: str) -> torch.Tensor:
    state = checkpoint.load_state(Path(folder))["parameters"]
    return torch.cat([parameter.flatten() for parameter in state])


@pytest.fixture(autouse=True)
def _modules_from_here(treegrpo: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])


# --- a run by its folder ---


def test_a_run_goes_on_by_its_folder_and_longer(
    treegrpo: CommandLine, tiny_checkpoint: Path
) -> None:
    Path("prompts.txt").write_text("\n".join(f"a number {n}" for n in range(40)))
    own = ("train.learning_rate_schedule=linear", "prompts.train=prompts.txt")
    assert treegrpo("train", *settings(tiny_checkpoint, *own))[0] == 0
    # From another folder, after it was moved.
    Path("elsewhere").mkdir()
    Path("run").rename("elsewhere/moved")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir("elsewhere")
        assert "already holds a run" in treegrpo.refusal("train", "moved")
        code, out, err = treegrpo("train", "moved", "--resume", "train.iterations=4")
        assert code == 0, err
        message = treegrpo.refusal("train", "moved", "--resume", "train.iterations=3")
    told = (
        "warning: train.iterations was 2, now 4: the learning rate falls linearly to zero at "
        "iteration 4 from now on, and goes on at 0.0005 (in the last iteration it was 0.0005)"
    )
    assert told in out
    assert message.startswith("train.iterations: got 3; must be at least 4, which the run in moved")
    rates = [record["learning_rate"] for record in records("elsewhere/moved")]
    assert rates == pytest.approx([1e-3, 0.5e-3, 0.5e-3, 0.25e-3])
    config = Path("elsewhere/moved/config.yaml").read_text()
    assert "# changed at iteration 2: train.iterations was 2, now 4" in config
    assert "output: moved" in config


def test_a_longer_run_at_a_constant_rate_is_the_unbroken_one(
    treegrpo: CommandLine, tiny_checkpoint: Path
) -> None:
    constant = "train.learning_rate_schedule=constant"
    for output, count in (("unbroken", 3), ("broken", 2)):
        changes = (constant, f"train.iterations={count}")
        treegrpo("train", *settings(tiny_checkpoint, *changes, output=output))
    code, out, err = treegrpo("train", "broken", "--resume", "train.iterations=3")
    assert code == 0, err
    assert "now 3: the learning rate goes on at 0.001 (in the last" in out
    assert records("broken") == records("unbroken")
    assert torch.equal(parameters("broken"), parameters("unbroken"))


def test_a_folder_without_a_run_is_no_configuration(treegrpo: CommandLine) -> None:
    Path("empty").mkdir()
    message = treegrpo.refusal("train", "empty", "--resume")
    assert message == "configuration file empty is a folder; must be a file"


# --- LoRA weights to start from ---


@pytest.fixture
def lora(treegrpo: CommandLine, tiny_checkpoint: Path) -> Path:
    """What a run of LoRA weights of rank 2 exported."""
    code, _, err = treegrpo("train", *settings(tiny_checkpoint, "model.lora_rank=2", output="lora"))
    assert code == 0, err
    return Path("lora/model")


FILE = "pytorch_lora_weights.safetensors"


def test_training_starts_from_lora_weights(
    treegrpo: CommandLine, tiny_checkpoint: Path, lora: Path
) -> None:
    # As another trainer scales them: by an alpha that is not the rank.
    weights = load_file(lora / FILE)
    layers = {name.removeprefix("transformer.").partition(".lora_")[0] for name in weights}
    adapter = LoraConfig(r=2, lora_alpha=1, target_modules=sorted(layers)).to_dict()
    adapter["target_modules"] = sorted(layers)
    packed = json.dumps({f"transformer.{k}": v for k, v in adapter.items()}, default=str)
    scaled = {name: 2 * w if ".lora_B." in name else w for name, w in weights.items()}
    save_file(scaled, "scaled.safetensors", {"format": "pt", "lora_adapter_metadata": packed})
    last = records("lora", "evaluations.jsonl")[-1]
    for start, output in ((lora, "folder"), (lora / FILE, "file"), ("scaled.safetensors", "alpha")):
        changes = ("model.lora_rank=2", f"model.lora_path={start}", "objective.kl_weight=0.1")
        arguments = settings(tiny_checkpoint, *changes, output=output)
        code, _, err = treegrpo("train", *arguments)
        assert code == 0, err
        # It draws what the other run drew last, and is held to that.
        first = records(output, "evaluations.jsonl")[0]
        assert first[REWARD] == pytest.approx(last[REWARD], abs=1e-6)
        kl = [record["kl"] for record in records(output)]
        assert kl[0] == 0 and kl[1] > 0
        assert not torch.equal(parameters(output), parameters("lora"))
    # A resumed run is held to the same weights.
    constant = "train.learning_rate_schedule=constant"
    for output, count in (("unbroken", 3), ("broken", 2)):
        more = (*changes, constant, f"train.iterations={count}")
        treegrpo("train", *settings(tiny_checkpoint, *more, output=output))
    assert treegrpo("train", "broken", "--resume", "train.iterations=3")[0] == 0
    assert records("broken") == records("unbroken")
    save_file(weights, "scaled.safetensors")
    message = treegrpo.refusal("train", "broken", "--resume", "train.iterations=4")
    assert "\n  model.lora_path: changed" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("model.lora_rank=0",), 'model.lora_path: got "start"; must be null where lora_rank is 0'),
        (
            ("model.lora_rank=4",),
            f"model.lora_rank: got 4; must be that of start/{FILE} (model.lora_path), which has 2 ",
        ),
        (
            ("model.lora_rank=2", "model.lora_targets=[attn.to_q]"),
            f"model.lora_targets: got ['attn.to_q'], which leaves out, of those that start/{FILE} ",
        ),
        (
            ("model.lora_rank=2", "model.lora_targets=[to_q, to_k, to_v, proj_out]"),
            "model.lora_targets: got ['to_q', 'to_k', 'to_v', 'proj_out'], ",
        ),
        (
            ("model.lora_rank=2", "model.lora_path=none"),
            "model.lora_path: got none; must be a safetensors file of LoRA weights, or a folder",
        ),
        (
            ("model.lora_rank=2", "model.lora_path=other"),
            "model.lora_path: 2 of the 2 tensors in other/",
        ),
    ],
)
def test_lora_weights_of_other_ranks_and_layers_are_refused(
    changes: tuple[str, ...],
    message: str,
    treegrpo: CommandLine,
    tiny_checkpoint: Path,
    lora: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(lora, "start")
    Path("other").mkdir()
    halves = {f"unet.x.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}
    save_file(halves, f"other/{FILE}")
    monkeypatch.setattr("treegrpo.training.build.load_weights", None)  # calling it would fail
    own = settings(tiny_checkpoint, "model.lora_path=start", *changes)
    assert treegrpo.refusal("train", *own).startswith(message)


# --- what rewards remember ---

REMEMBERS = """
import torch

class Novelty:
    '''Brightness by its distance from the running mean of all before.'''
    def __init__(self):
        self.mean, self.seen = torch.zeros(()), {"calls": 0}

    def __call__(self, images, prompts, metadata):
        brightness = images.mean((1, 2, 3))
        scores = brightness - self.mean + 1e-3 * self.seen["calls"]
        self.mean += 0.2 * (brightness.mean() - self.mean)
        self.seen["calls"] += 1
        return scores

    def state_dict(self):
        return {"mean": self.mean, "seen": self.seen}

    def load_state_dict(self, state):
        self.mean, self.seen = state["mean"], state["seen"]

class Module(torch.nn.Module):
    '''The same, as a module whose weights would fill the disk.'''
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1000, 1000))
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, images, prompts, metadata):
        brightness = images.mean((1, 2, 3))
        scores = brightness - self.mean
        self.mean += 0.2 * (brightness.mean() - self.mean)
        return scores

class Odd(Novelty):
    def state_dict(self):
        return {"function": test}

def test():
    pass

class Broken(Novelty):
    def state_dict(self):
        return self.nothing

class Fails(Novelty):
    fails = False

    def __call__(self, images, prompts, metadata):
        scores = super().__call__(images, prompts, metadata)
        if self.fails and self.seen["calls"] == 3:
            raise ConnectionError("gone")
        return scores
"""


@pytest.fixture
def remembering(tmp_path: Path) -> str:
    name = f"remembering_{re.sub(r'[^a-z0-9]', '', tmp_path.name)}"
    Path(f"{name}.py").write_text(REMEMBERS)
    return name


CONSTANT = "train.learning_rate_schedule=constant"


@pytest.mark.parametrize("reward", ["Novelty", "Module"])
def test_what_a_reward_remembers_comes_back_exactly(
    reward: str, treegrpo: CommandLine, tiny_checkpoint: Path, remembering: str
) -> None:
    name = f"{remembering}:{reward}"
    # Looking at the model on the way is no part of it.
    for output, *changes in (
        ("unbroken", "train.iterations=4", "evaluation.every=1"),
        ("broken", "train.iterations=2"),
    ):
        own = settings(tiny_checkpoint, CONSTANT, *changes, output=output, reward=name)
        assert treegrpo("train", *own)[0] == 0
    kept = checkpoint.load_state(Path("broken"))["rewards"]
    if reward == "Novelty":
        assert [state[name]["seen"] for state in kept] == [{"calls": 2}]
    else:
        assert [list(state[name]) for state in kept] == [["mean"]]
    assert treegrpo("train", "broken", "--resume", "train.iterations=4")[0] == 0
    assert records("broken") == records("unbroken")
    assert torch.equal(parameters("broken"), parameters("unbroken"))
    states = [checkpoint.load_state(Path(f))["rewards"][0][name] for f in ("broken", "unbroken")]
    assert states[0]["mean"] == states[1]["mean"] != 0


def test_a_failed_iteration_is_forgotten_by_rewards(
    treegrpo: CommandLine, tiny_checkpoint: Path, remembering: str
) -> None:
    name = f"{remembering}:Fails"
    changes = (CONSTANT, "train.iterations=4")
    treegrpo("train", *settings(tiny_checkpoint, *changes, output="unbroken", reward=name))
    sys.modules[remembering].Fails.fails = True
    own = settings(tiny_checkpoint, *changes, output="broken", reward=name)
    code, _, err = treegrpo("train", *own)
    assert code == 2
    assert "raised ConnectionError" in err and f'{remembering}.py", line ' in err
    assert "in __call__" in err and "treegrpo/" not in err.replace("treegrpo/runs", "")
    sys.modules[remembering].Fails.fails = False
    assert treegrpo("train", "broken", "--resume")[0] == 0
    assert records("broken") == records("unbroken")


def test_a_repeated_iteration_finds_rewards_as_they_were(
    tiny_checkpoint: Path, remembering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = settings(tiny_checkpoint, reward=f"{remembering}:Novelty")
    unbroken, run = (build(load_config(None, own)) for _ in range(2))
    expected = iterate(unbroken)
    with monkeypatch.context() as patch:
        patch.setattr(run.learner, "update", None)  # after the rewards were asked
        with pytest.raises(TypeError):
            iterate(run)
    found = iterate(run)
    for record in (found, expected):
        for name in [name for name in record if TIMES.match(name)]:
            del record[name]
    assert found == expected


def test_what_cannot_be_kept_is_refused_before_the_model_is_read(
    treegrpo: CommandLine,
    tiny_checkpoint: Path,
    remembering: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("treegrpo.training.build.load_weights", None)  # calling it would fail
    message = treegrpo.refusal("train", *settings(tiny_checkpoint, reward=f"{remembering}:Odd"))
    assert message.startswith(f"reward '{remembering}:Odd': its state cannot be kept")
    assert message.endswith("; state_dict must give tensors, numbers, texts, lists and dicts")
    message = treegrpo.refusal("train", *settings(tiny_checkpoint, reward=f"{remembering}:Broken"))
    assert "its state_dict raised AttributeError: " in message
    assert f'{remembering}.py", line ' in message and "return self.nothing" in message

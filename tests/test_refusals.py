"""What a start refuses: all of it together, soon, and with the place in the user's own code.

Left out: single mistakes (`test_cli.py`, `test_config.py`), failures during a run
(`test_training.py`, `test_remote_training.py`).
"""

from __future__ import annotations

import json
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from command_line import CommandLine
from safetensors.torch import save_file

from treegrpo import hub
from treegrpo.models.policy import Policy
from treegrpo.rewards import http
from treegrpo.training import build

REWARDS = """
import torch

asked = []

def good(images, prompts, metadata):
    asked.append((tuple(images.shape), images.unique().tolist(), prompts, metadata))
    return images.mean((1, 2, 3))

def helper(values):
    return values["logits"]

def raises(images, prompts, metadata):
    return helper({})

def in_torch(images, prompts, metadata):
    return torch.nn.Conv2d(1, 1, 1)(images)

def flat(images, prompts, metadata):
    return images.mean()

def squeezed(images, prompts, metadata):
    return images.flatten(1).mean(1, keepdim=True)

def nan(images, prompts, metadata):
    return images.mean((1, 2, 3)) / 0 * 0

def reads_metadata(images, prompts, metadata):
    return [one["wieght"] for one in metadata]

class Makes:
    def __init__(self):
        self.model = helper({})

    def __call__(self, images, prompts, metadata):
        return [0.0] * len(images)

class Checks(Makes):
    def __init__(self):
        pass

    def check(self, prompts, metadata):
        helper({})
"""


@pytest.fixture
def module(treegrpo: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of rewards in the current folder, with prompts beside it."""
    name = f"rewards_of_{re.sub(r'[^a-z0-9]', '', tmp_path.name)}"
    (tmp_path / f"{name}.py").write_text(REWARDS)
    lines = [json.dumps({"prompt": f"no {number}", "weight": 0.5}) for number in range(30)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(sys, "path", [*sys.path])
    return name


def settings(model: Path, *rewards: str) -> tuple[str, ...]:
    named = json.dumps([{"name": name} for name in rewards])
    return (
        "train",
        f"model.path={model}",
        "model.device=cpu",
        "prompts.train=prompts.jsonl",
        f"rewards={named}",
        "output=run",
    )


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_weights(*arguments: object, **settings: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(build, "load_weights", load_weights)


@contextmanager
def closed_port() -> Iterator[int]:
    """A port that nobody listens on, nor can while it is held."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The hub's address, at which nobody answers; nothing has been downloaded before."""
    with closed_port() as port:
        address = f"http://127.0.0.1:{port}"
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        hub.why_not_there.cache_clear()
        yield address
        hub.why_not_there.cache_clear()


# --- all together ---


def test_problems_of_every_kind_are_told_in_one_start(
    treegrpo: CommandLine, monkeypatch: pytest.MonkeyPatch, no_hub: str
) -> None:
    monkeypatch.setattr(http, "FIRST_ANSWER_SECONDS", 0.2)
    Path("file").touch()
    with closed_port() as port:
        rewards = json.dumps([{"name": "compositon"}, {"name": f"http://127.0.0.1:{port}"}])
        message = treegrpo.refusal(
            *("train", "model.path=owner/name", "model.dtype=float16", "train.iterations=ten"),
            *("prompts.train=none.txt", f"rewards={rewards}", "rewards.7.weight=1", "output=file"),
        )
    head, *problems = message.split("\n  ")
    assert head == "there are 8 problems:"
    for problem, expected in zip(
        problems,
        [
            "rewards.7: no such element; must be 0 to 1",
            'model.dtype: got "float16"',
            'train.iterations: got "ten"',
            "prompt file none.txt does not exist",
            "model.path: 'owner/name' is no local folder and cannot be downloaded",
            "rewards.0.name: reward 'compositon' is unknown",
            f"rewards.1.name: reward 'http://127.0.0.1:{port}': reward server ",
            "output: file is a file; must be a folder",
        ],
        strict=True,
    ):
        assert problem.startswith(expected)


def test_a_wrong_key_brings_no_problems_that_are_none(treegrpo: CommandLine) -> None:
    """What takes a wrong key's place is not looked at: neither its plan nor its folder."""
    plan = ("rollout.method=mix_grpo", "rollout.window_size=99", "output=run")
    assert "window" in treegrpo.refusal("train", *plan)
    message = treegrpo.refusal("train", *plan, "rollout.steps=ten")
    assert message == 'rollout.steps: got "ten"; must be an integer'
    for name in ("config.yaml", "versions.json", "metrics.jsonl"):
        Path("runs/miniature").mkdir(parents=True, exist_ok=True)
        Path("runs/miniature", name).touch()
    assert "already holds a run" in treegrpo.refusal("train")
    Path("mine.yaml").write_text("output: [1]")
    assert treegrpo.refusal("train", "mine.yaml").startswith("output: got [1]; must be a path")


def test_plan_tells_its_problems_together(treegrpo: CommandLine) -> None:
    message = treegrpo.refusal(
        "plan", "model.path=./none", "--memory", "24", "--json", "no/such.json", "rollout.trees=0"
    )
    for start in ("rollout.trees: got 0", "--memory: got '24'", "model.path: no", "--json: no"):
        assert f"\n  {start}" in message


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.path=owner/name",),
        ("rewards=[{name: clip_score}]",),
        ("rewards=[{name: hpsv2}]", "model.path=owner/name"),
    ],
)
def test_without_a_connection_the_hub_is_not_waited_for(
    overrides: tuple[str, ...],
    treegrpo: CommandLine,
    no_hub: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # nor for anything heavy
    begin = time.monotonic()
    message = treegrpo.refusal("train", *overrides, "output=run")
    assert time.monotonic() - begin < 10  # its client would try for 23 s
    assert f"cannot be downloaded from the hub ({no_hub} does not answer: ConnectError" in message
    assert message.count("hf download ") == max(1, len(overrides))


# --- the user's own code ---


def test_rewards_are_tried_on_gray_pictures_of_the_models_size(
    module: str, treegrpo: CommandLine, tiny_checkpoint: Path, no_weights: None
) -> None:
    with pytest.raises(AssertionError, match="weights were read"):
        treegrpo(*settings(tiny_checkpoint, f"{module}:good"), "model.height=48")
    (asked,) = sys.modules[module].asked
    shape, levels, prompts, metadata = asked
    assert shape == (2, 3, 48, 32)
    assert levels == [pytest.approx(127 / 255)]
    assert prompts == ["no 0", "no 0"] and metadata == [{"weight": 0.5}] * 2


@pytest.mark.parametrize(
    ("reward", "words", "frames"),
    [
        ("raises", ["raised KeyError", "'no 0'", ": 'logits'"], ["in raises", "in helper"]),
        ("in_torch", ["raised RuntimeError", "channels"], ["in in_torch"]),
        ("flat", ["float32 of shape [] ", "expected real numbers of shape [2]"], []),
        ("squeezed", ["float32 of shape [2, 1] "], []),
        ("nan", ["returned nan for the prompt 'no 0'"], []),
        ("reads_metadata", ["raised KeyError", ": 'wieght'"], ["in reads_metadata"]),
        ("Makes", ["cannot be made with the options {}: KeyError"], ["in __init__", "in helper"]),
        ("Checks", ["check of the prompts raised KeyError"], ["in check", "in helper"]),
    ],
)
def test_a_fault_in_a_reward_is_told_with_its_place(
    reward: str,
    words: list[str],
    frames: list[str],
    module: str,
    treegrpo: CommandLine,
    tiny_checkpoint: Path,
    no_weights: None,
) -> None:
    name = f"{module}:{reward}"
    message = treegrpo.refusal(*settings(tiny_checkpoint, name))
    head, *trace = message.splitlines()
    assert head.startswith(f"reward '{name}'")
    for word in words:
        assert word in head
    assert ("tried on 2 gray pictures" in head) == (reward not in ("Makes", "Checks"))
    places = [line.strip() for line in trace if line.startswith("  File ")]
    assert all("treegrpo/" not in place for place in places)
    lines = REWARDS.splitlines()
    for frame, place in zip(frames, places, strict=False):
        found = re.fullmatch(rf'File ".*/{module}\.py", line (\d+), ({frame})', place)
        assert found, place
        shown = trace[trace.index(f"  {place}") + 1].strip()
        assert lines[int(found[1]) - 1].strip() == shown
    assert len(places) >= len(frames)
    assert any("/torch/" in place for place in places) == (reward == "in_torch")


def test_faults_of_several_rewards_and_the_model_are_told_together(
    module: str, treegrpo: CommandLine, tiny_checkpoint: Path, no_weights: None
) -> None:
    named = (f"{module}:raises", f"{module}:flat", f"{module}:Makes")
    message = treegrpo.refusal(*settings(tiny_checkpoint, *named), "model.height=30")
    assert message.startswith("there are 4 problems:\n")
    for start in (*(f"reward '{name}'" for name in named), "model.height: got 30"):
        assert f"\n  {start}" in message


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def f(:\n", ["SyntaxError", 'mine.py", line 1', "def f(:"]),
        ("import json\nx = json.nothing\n", ["AttributeError", 'mine.py", line 2', "json.nothing"]),
    ],
)
def test_a_module_that_cannot_be_imported_is_told_with_its_place(
    source: str, words: list[str], treegrpo: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("mine.py").write_text(source)
    monkeypatch.setattr(sys, "path", [*sys.path])
    message = treegrpo.refusal("train", "rewards=[{name: 'mine:f'}]", "output=run")
    for word in words:
        assert word in message
    assert "importlib" not in message and "treegrpo/" not in message


def test_evaluate_tries_rewards_too(
    module: str,
    treegrpo: CommandLine,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("treegrpo.evaluation.pair.load_weights", None)  # calling it would fail
    message = treegrpo.refusal(
        *("evaluate", str(tiny_checkpoint), "--prompts", "prompts.jsonl"),
        *("--rewards", f"{module}:raises,{module}:flat"),
    )
    assert message.startswith("there are 2 problems:\n")
    assert "in helper" in message and "tried on 2 gray pictures" in message


# --- servers ---


def test_a_server_must_answer_soon_before_a_run(
    treegrpo: CommandLine, monkeypatch: pytest.MonkeyPatch, module: str, tiny_checkpoint: Path
) -> None:
    monkeypatch.setattr(http, "FIRST_ANSWER_SECONDS", 0.5)
    with closed_port() as port:
        address = f"http://127.0.0.1:{port}"
        begin = time.monotonic()
        message = treegrpo.refusal(*settings(tiny_checkpoint, address))
    assert time.monotonic() - begin < 10  # give_up_after_seconds is 600
    assert f"reward server {address} did not answer for " in message


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


# --- sample ---


def test_samples_have_the_size_that_is_asked_for(
    treegrpo: CommandLine, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled: list[dict[str, object]] = []

    def call_settings(policy: Policy) -> dict[str, object]:
        return {**policy.call_settings(), "device": str(policy.device)}

    def keep(policy: Policy, texts: list[str], draws: object) -> torch.Tensor:
        sampled.append(call_settings(policy))
        return torch.zeros(len(texts), 1, 3, *policy.sampling.size)

    monkeypatch.setattr("treegrpo.evaluation.sampling.sample", keep)
    own = ("sample", str(tiny_checkpoint), "--prompt", "a cat", "--count", "1")
    more = ("--height", "48", "--width", "16", "--negative-prompt", "blue", "--device", "cpu")
    assert treegrpo(*own, *more, "--guidance-scale", "2")[0] == 0
    (settings,) = sampled
    expected = {"height": 48, "width": 16, "negative_prompt": "blue", "device": "cpu"}
    assert settings.items() >= expected.items()
    message = treegrpo.refusal(*own, "--height", "30")
    assert message.startswith("--height: got 30; must be a multiple of ")
    assert treegrpo.refusal(*own, "--device", "gpu").startswith("--device: got 'gpu'; must be")


def test_single_files_are_refused_with_the_way_to_a_folder(
    treegrpo: CommandLine, tiny_checkpoint: Path
) -> None:
    Path("model.safetensors").write_bytes(b"nothing")
    message = treegrpo.refusal("sample", "model.safetensors", "--prompt", "a cat")
    assert message.startswith("MODEL: model.safetensors is a file; must be a diffusers folder")
    assert "P.from_single_file('model.safetensors').save_pretrained('FOLDER')" in message
    save_file({"transformer.x.lora_A.weight": torch.zeros(2, 2)}, "lora.safetensors")
    message = treegrpo.refusal("sample", "lora.safetensors", "--prompt", "a cat")
    assert "pytorch_lora_weights.safetensors" in message and "--base-model" in message
    assert "from_single_file" not in message

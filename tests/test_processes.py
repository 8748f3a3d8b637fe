"""Two processes on the CPU train as one does, and end together whatever ends one of them.

Each launch starts Python three times, so a failure, its continuation and an interruption are one
story: the first launch fails in its second iteration, the second one repeats that iteration and is
interrupted in it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel

from treegrpo import checkpoint
from treegrpo.config import load_config
from treegrpo.run_folder import read_lines
from treegrpo.training.loop import train

pytestmark = pytest.mark.slow
PATIENCE = 300.0  # seconds; reached only where processes wait for each other in vain
PROMPTS, LEAVES = 4, 4
REWARDS = """
import json, os, signal
from pathlib import Path
import torch
from diffusers import SD3Transformer2DModel

asked = 0
forward = SD3Transformer2DModel.forward

def forward_in_little_memory(self, hidden_states, *others, **settings):
    '''The second process must take one node after the other where the first takes two.'''
    if torch.is_grad_enabled() and len(hidden_states) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return forward(self, hidden_states, *others, **settings)

if os.environ.get("RANK") == "1":
    SD3Transformer2DModel.forward = forward_in_little_memory

def evaluating(prompts):
    '''Whether these are held-out prompts, one image of each, and not a prompt's group.'''
    return len(set(prompts)) == len(prompts)

def order(images, prompts, metadata):
    '''Which of its prompt's samples an image is: a signal that rounding does not change.'''
    return torch.zeros(len(images)) if evaluating(prompts) else torch.arange(len(images)) % 4

def brightness(images, prompts, metadata):
    '''Keeps a record; when the second process asks for the n-th time, something happens.'''
    global asked
    scores = images.mean((1, 2, 3))
    if len(images) == 2 and not evaluating(prompts):  # the gray pictures before the model is read
        return scores
    rank = os.environ.get("RANK", "0")
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    name = f"{rank}-evaluation.jsonl" if evaluating(prompts) else f"{rank}.jsonl"
    with Path(os.environ["RECORD"], name).open("a") as file:
        print(json.dumps([world, prompts, scores.tolist()]), file=file)
    if evaluating(prompts):
        return scores
    asked += 1
    if rank == "1" and asked == int(os.environ["WHEN"]):
        if os.environ["WHAT"] == "failure":
            raise ConnectionError("the second process's server is gone")
        os.kill(os.getpid(), signal.SIGINT)
    return scores
"""


def settings_of(tiny_checkpoint: Path, output: Path, iterations: int) -> list[str]:
    return [
        "rollout.steps=4",
        "rollout.branching=2",
        "rollout.window_size=2",
        f"rollout.prompts_per_iteration={PROMPTS}",
        # Each prompt alone: rows of a batch are rounded differently in batches of other sizes.
        "rollout.prompts_per_batch=1",
        "rewards=[{name: 'toys:order'}, {name: 'toys:brightness', label: brightness, weight: 0}]",
        "train.learning_rate=1e-3",
        "train.learning_rate_schedule=constant",
        "train.warmup_iterations=0",
        "train.micro_batch=2",
        "train.save_every=0",
        f"train.iterations={iterations}",
        "evaluation.max_prompts=3",
        "evaluation.images_per_prompt=1",
        "model.device=cpu",
        f"model.path={tiny_checkpoint}",
        f"output={output}",
    ]


@dataclass
class Samples:
    """What one process scored: of how many it was one, prompts, brightness [prompts, LEAVES]."""

    world: set[int]
    prompts: list[str]
    brightness: np.ndarray[Any, Any]


def samples_in(file: Path) -> Samples:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(prompts == prompts[:1] * LEAVES for _, prompts, _ in lines)
    return Samples(
        {world for world, _, _ in lines},
        [prompts[0] for _, prompts, _ in lines],
        np.array([scores for _, _, scores in lines]),
    )


def launch(folder: Path, record: str, what: str, when: int, *arguments: str) -> tuple[int, str]:
    """Two processes of `treegrpo train`: the launcher's exit code, and all they said."""
    (folder / record).mkdir()
    events = {"RECORD": record, "WHAT": what, "WHEN": str(when)}
    launcher_command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with subprocess.Popen(
        [sys.executable, *launcher_command, "-m", "treegrpo", "train", *arguments],
        cwd=folder,
        env=os.environ | events | {"ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as launcher:
        try:
            output, _ = launcher.communicate(timeout=PATIENCE)
        finally:
            if launcher.returncode is None:
                os.killpg(launcher.pid, signal.SIGKILL)  # the processes too
    return launcher.returncode, output


@pytest.fixture(scope="module")
def story(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run `two` of two processes, and the run `one` of this process."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "toys.py").write_text(REWARDS)
    arguments = settings_of(tiny_checkpoint, folder / "two", 2)
    code, output = launch(folder, "failing", "failure", PROMPTS // 2 + 1, *arguments)
    assert code != 0
    assert "error:" in output and "the second process's server is gone" in output
    assert checkpoint.load_state(folder / "two")["iteration"] == 1

    # Without the interruption there would be no end.
    arguments = settings_of(tiny_checkpoint, folder / "two", 100_000)
    code, output = launch(folder, "resumed", "interruption", 1, *arguments, "--resume")
    assert code != 0
    assert re.search(r"exitcode +: 130", output), output
    assert "interrupted; what was trained is saved" in output

    with pytest.MonkeyPatch.context() as patch:
        (folder / "alone").mkdir()
        patch.setenv("RECORD", str(folder / "alone"))
        patch.syspath_prepend(folder)
        train(load_config(None, settings_of(tiny_checkpoint, folder / "one", 2)))
    return folder


def test_samples_do_not_depend_on_the_number_of_processes(story: Path) -> None:
    alone = samples_in(story / "alone" / "0.jsonl")
    assert len(alone.prompts) == 2 * PROMPTS
    for rank in (0, 1):
        records = [samples_in(story / name / f"{rank}.jsonl") for name in ("failing", "resumed")]
        assert records[0].world == records[1].world == {2}
        # The first iteration from the first launch, the second from the second.
        prompts = [prompt for record in records for prompt in record.prompts[: PROMPTS // 2]]
        assert prompts == alone.prompts[rank::2]
        brightness = np.concatenate([record.brightness[: PROMPTS // 2] for record in records])
        # One pixel rounded the other way is 1e-6 of brightness; a prompt's samples differ by 3e-3.
        np.testing.assert_allclose(brightness, alone.brightness[rank::2], rtol=0, atol=1e-5)
        assert brightness.std(1).min() > 1e-4


def test_gradients_are_those_of_all_prompts(story: Path, tiny_checkpoint: Path) -> None:
    def flat(tensors: Any) -> torch.Tensor:
        return torch.cat([tensor.detach().flatten() for tensor in tensors])

    one, two = (checkpoint.load_state(story / name) for name in ("one", "two"))
    moments = [
        flat(moment["exp_avg"] for moment in state["optimizer"]["state"].values())
        for state in (one, two)
    ]
    assert (moments[1] - moments[0]).norm() < 1e-5 * moments[0].norm()
    first, second = flat(one["parameters"]), flat(two["parameters"])
    untrained = SD3Transformer2DModel.from_pretrained(tiny_checkpoint / "transformer")
    # AdamW divides by the gradient's size: where that is small, rounding counts for more.
    assert (second - first).norm() < 1e-4 * (first - flat(untrained.parameters())).norm()
    exported = SD3Transformer2DModel.from_pretrained(story / "two" / "model" / "transformer")
    average = flat(two["average"]["shadow_params"])
    assert torch.equal(flat(exported.parameters()), average)


def evaluations_of(story: Path, name: str) -> list[dict[str, float]]:
    return read_lines(story / name / "evaluations.jsonl")


def test_each_held_out_prompt_is_evaluated_by_one_process(story: Path) -> None:
    def evaluated(record: str, rank: int) -> tuple[list[list[str]], list[list[float]]]:
        lines = (story / record / f"{rank}-evaluation.jsonl").read_text().splitlines()
        _, prompts, scores = zip(*map(json.loads, lines), strict=True)
        return list(prompts), list(scores)

    prompts, scores = evaluated("alone", 0)
    assert [len(each) for each in prompts] == [3, 3]  # before and after
    # The resumed run evaluates the untrained model again, then the trained one.
    shares = [evaluated("resumed", rank) for rank in (0, 1)]
    for number in (0, 1):
        assert [*shares[0][0][number], *shares[1][0][number]] == prompts[number]
        assert len(shares[0][0][number]) == 1
        together = [*shares[0][1][number], *shares[1][1][number]]
        assert together == pytest.approx(scores[number], abs=1e-5)
    for one, two in zip(*(evaluations_of(story, name) for name in ("one", "two")), strict=True):
        for key in one.keys() - {"seconds"}:
            assert two[key] == pytest.approx(one[key], abs=1e-5), key


def test_one_process_writes_what_all_did(story: Path) -> None:
    one, two = (read_lines(story / name / "metrics.jsonl") for name in ("one", "two"))
    assert [record["iteration"] for record in two] == [0, 1]
    for record, expected in zip(two, one, strict=True):
        assert record.keys() == expected.keys()
        for name, value in expected.items():
            if not name.startswith(("seconds", "reward_normalized")):
                assert record[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert [record["iteration"] for record in evaluations_of(story, "two")] == [0, 2]
    boards = list((story / "two" / "tensorboard").glob("events.out.tfevents.*"))
    assert len(boards) == 2  # one per launch
    summaries = [json.loads((story / name / "summary.json").read_text()) for name in ("one", "two")]
    for key in ("iterations", "rollout_forwards", "update_forwards"):
        assert summaries[0][key] == summaries[1][key]
    for name, value in summaries[0]["after"].items():
        assert summaries[1]["after"][name] == pytest.approx(value, abs=1e-5)

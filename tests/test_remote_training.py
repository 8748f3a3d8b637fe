"""Training by a reward server in another process: as by the same reward here, even if it dies."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import CommandLine
from diffusers import SD3Transformer2DModel

from treegrpo import checkpoint, cli, run_folder
from treegrpo.config import load_config
from treegrpo.rewards import http
from treegrpo.run_folder import read_lines
from treegrpo.training.build import build
from treegrpo.training.loop import iterate

pytestmark = pytest.mark.slow
PROMPTS, ITERATIONS = 4, 3
PATIENCE = 120.0  # seconds; reached only where a test fails
# What the metrics of two runs of the same course may differ in.
TIMES = re.compile("seconds")
MORTAL = """
import os, signal
from treegrpo.rewards.composition import composition

class Mortal:
    '''The same reward, from a server that dies with a request in its hands.'''
    def __init__(self, answers: int):
        self.left = answers
    def __call__(self, images, prompts, metadata):
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1
        return composition(images, prompts, metadata)
"""
# The gray pictures, the evaluation before training, the first iteration, and one of the second
# iteration's batches.
ANSWERS = 2 + PROMPTS + 1


@pytest.fixture(autouse=True)
def _here_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(http, "LONGEST_WAIT", 0.5)


class Server:
    """`treegrpo serve-reward` in another process, on one port, whoever serves there."""

    def __init__(self, folder: Path) -> None:
        (folder / "mortal.py").write_text(MORTAL)
        self.folder = folder
        self.port = 0
        self.process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def serve(self, *arguments: str) -> None:
        self.stop()
        command = [sys.executable, "-m", "treegrpo", "serve-reward", *arguments]
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port), "--device", "cpu"],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        started = self.process.stdout.readline()
        address = re.search(r" at http://127\.0\.0\.1:(\d+) on cpu\n", started)
        assert address is not None, started
        self.port = int(address[1])

    def serve_until_it_dies(self) -> None:
        self.serve("mortal:Mortal", "--option", f"answers={ANSWERS}")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()

    @contextmanager
    def replaced_once_dead(self) -> Iterator[None]:
        """Inside, the same reward is served again on the same port soon after the server died."""
        dead = self.process
        assert dead is not None

        def replace() -> None:
            assert dead.wait() < 0  # by a signal
            self.serve("composition")

        thread = threading.Thread(target=replace)
        thread.start()
        try:
            yield
        finally:
            dead.kill()
            thread.join()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


def settings_of(output: Path, reward: str, **options: float) -> list[str]:
    return [
        "model.path=miniature",
        "rollout.steps=4",
        "rollout.branching=2",
        "rollout.window_size=2",
        f"rollout.prompts_per_iteration={PROMPTS}",
        "rollout.prompts_per_batch=1",
        f"rewards=[{{name: '{reward}', label: composition, options: {options}}}]",
        "train.learning_rate=1e-3",
        "train.warmup_iterations=0",
        "train.save_every=0",
        f"train.iterations={ITERATIONS}",
        "evaluation.max_prompts=2",
        "evaluation.images_per_prompt=2",
        "model.device=cpu",
        f"output={output}",
    ]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that scores its images itself."""
    output = tmp_path_factory.mktemp("here") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["treegrpo", "train", *settings_of(output, "composition")])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 0
    return output


def assert_same_course(run: Path, expected: Path) -> None:
    """Every reward, every other figure and every weight, to the last bit."""

    def figures(folder: Path, name: str) -> list[dict[str, Any]]:
        records = read_lines(folder / name)
        return [{k: v for k, v in one.items() if not TIMES.match(k)} for one in records]

    for name in (run_folder.METRICS_FILE, run_folder.EVALUATIONS_FILE):
        assert figures(run, name) == figures(expected, name)
    records = figures(run, run_folder.METRICS_FILE)
    assert len(records) == ITERATIONS
    assert all(record["reward_std_within_group/composition"] > 0 for record in records)
    states = [checkpoint.load_state(folder) for folder in (run, expected)]
    assert equal(states[0]["parameters"], states[1]["parameters"])
    assert equal(*(exported_weights(folder) for folder in (run, expected)))


def equal(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def exported_weights(run: Path) -> list[torch.Tensor]:
    return list(SD3Transformer2DModel.from_pretrained(run / "model" / "transformer").parameters())


def test_scored_elsewhere_is_scored_here(
    server: Server, expected: Path, tmp_path: Path, treegrpo: CommandLine
) -> None:
    server.serve("composition")
    # Requests that hold less than a batch of prompts, too.
    code, *_ = treegrpo("train", *settings_of(tmp_path / "run", server.url, batch_size=3))
    assert code == 0
    assert_same_course(tmp_path / "run", expected)


def test_a_run_outlives_its_server(
    server: Server,
    expected: Path,
    tmp_path: Path,
    treegrpo: CommandLine,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.serve_until_it_dies()
    with caplog.at_level(logging.WARNING), server.replaced_once_dead():
        code, *_ = treegrpo("train", *settings_of(tmp_path / "run", server.url))
    assert code == 0
    outage = [message for message in caplog.messages if server.url in message]
    assert "does not answer, retrying for up to 600 s" in outage[0]
    assert "answers again after" in outage[-1]
    assert_same_course(tmp_path / "run", expected)


def test_a_run_whose_server_is_gone_can_go_on_later(
    server: Server, expected: Path, tmp_path: Path, treegrpo: CommandLine
) -> None:
    server.serve_until_it_dies()
    arguments = ["train", *settings_of(tmp_path / "run", server.url, give_up_after_seconds=0.3)]
    code, _, err = treegrpo(*arguments)
    assert code == 2
    assert "Traceback" not in err
    problem = f"reward server {server.url} did not answer for "
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert "reward 'composition' raised ServerError" in line and problem in line
    assert checkpoint.load_state(tmp_path / "run")["iteration"] == 1
    assert not (tmp_path / "run" / "model").exists()

    server.serve("composition")
    code, *_ = treegrpo(*arguments, "--resume")
    assert code == 0
    assert_same_course(tmp_path / "run", expected)


def test_a_batch_is_sampled_while_the_one_before_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build(load_config(None, settings_of(tmp_path / "run", "composition")))
    begun = [threading.Event() for _ in range(PROMPTS)]
    sample, scored = run.collector._grow, iter(range(PROMPTS))

    def rollout(prompts: Any, numbers: Sequence[int], plan: Any, iteration: int) -> Any:
        begun[numbers[0]].set()
        return sample(prompts, numbers, plan, iteration)

    class Slow:
        concurrent = True

        def __call__(self, images: torch.Tensor, prompts: list[str], metadata: Any) -> Any:
            following = next(scored) + 1
            assert following == PROMPTS or begun[following].wait(PATIENCE)
            return images.mean((1, 2, 3))

    monkeypatch.setattr(run.collector, "_grow", rollout)
    monkeypatch.setitem(run.rewards, "composition", Slow())
    assert iterate(run)["groups_without_signal"] == 0

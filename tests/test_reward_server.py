"""The reward server: what it refuses, in which order it works, and how it stops."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from command_line import CommandLine
from PIL import Image
from reward_servers import (
    PATIENCE,
    gray,
    serving,
)

from treegrpo.errors import UserError
from treegrpo.rewards import protocol
from treegrpo.rewards import server as reward_server
from treegrpo.rewards.http import ServerError
from treegrpo.rewards.protocol import to_png
from treegrpo.rewards.remote import Remote
from treegrpo.rewards.server import RewardServer

pytestmark = pytest.mark.usefixtures("quick_retries")


def test_server_calls_its_reward_one_batch_at_a_time() -> None:
    free = threading.Lock()

    def alone(images: torch.Tensor, prompts: list[str], metadata: object) -> torch.Tensor:
        assert free.acquire(blocking=False)
        threading.Event().wait(0.01)
        free.release()
        return images.mean((1, 2, 3))

    images, prompts = gray(12)
    with serving(alone) as server:
        Remote(server.url, batch_size=1, concurrency=6)(images, prompts, None)


class Held:
    """Scores 0 once it is released; `calls` are the prompts that it was asked about."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.asked, self.released = threading.Event(), threading.Event()

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata: object) -> list[float]:
        self.calls.append(prompts)
        self.asked.set()
        assert self.released.wait(PATIENCE)
        return [0.0] * len(prompts)


# Of the larger one the server has not taken everything from the connection when it waits its turn.
@pytest.mark.parametrize("size", [4, 500])
def test_server_does_not_work_for_clients_that_left(size: int) -> None:
    images = torch.rand(1, 3, size, size)
    reward = Held()
    with serving(reward) as server, ThreadPoolExecutor(1) as pool:
        patient = pool.submit(Remote(server.url), images, ["first"], None)
        assert reward.asked.wait(PATIENCE)
        hasty = Remote(server.url, timeout_seconds=0.2, give_up_after_seconds=0)
        with pytest.raises(ServerError, match="ReadTimeout"):
            hasty(images, ["left"], None)
        hasty._endpoint._client.close()
        reward.released.set()
        assert patient.result(PATIENCE) == [0.0]
        Remote(server.url)(images, ["last"], None)
    assert reward.calls == [["first"], ["last"]]


def test_a_stopping_server_finishes_its_batch_and_turns_away_what_waits() -> None:
    images, prompts = gray(1)
    reward = Held()
    with serving(reward) as server, ThreadPoolExecutor(2) as pool:
        begun = pool.submit(Remote(server.url), images, prompts, None)
        assert reward.asked.wait(PATIENCE)
        waiting = pool.submit(Remote(server.url, give_up_after_seconds=0), images, ["late"], None)
        while not server._turn._waiters:
            assert not waiting.done()
        server.should_exit = True
        reward.released.set()
        assert begun.result(PATIENCE) == [0.0]
        with pytest.raises(ServerError, match="HTTP 503: the server is stopping"):
            waiting.result(PATIENCE)
    assert reward.calls == [prompts]


def png(size: tuple[int, int] = (4, 4), mode: str = "RGB") -> str:
    return to_png(np.asarray(Image.new(mode, size)))


@pytest.fixture(scope="module")
def strict_server() -> Iterator[RewardServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "MAX_PIXELS", 2 * 30 * 30)
        patch.setattr(reward_server, "MAX_BODY_BYTES", 9000)
        with serving(max_batch=3) as server:
            yield server


@pytest.mark.parametrize(
    ("changes", "status", "reason"),
    [
        ({"version": 2}, 400, "version: got 2; must be 1"),
        ({"images": []}, 400, "images: must be a list of at least one"),
        ({"images": [png()] * 4, "prompts": ["a"] * 4}, 400, "images: got 4; must be at most 3"),
        ({"images": ["!", png()]}, 400, "images.0: is no PNG in base64"),
        ({"images": [png(), png()[:40]]}, 400, "images.1: is no PNG in base64"),
        ({"images": [png(), 7]}, 400, "images.1: is no PNG in base64"),
        ({"images": [png(), png(mode="L")]}, 400, "images.1: has the mode L; must be RGB"),
        ({"images": [png(), png((4, 5))]}, 400, "images.1: is 4x5; must be 4x4"),
        ({"images": [png((40, 40))] * 2}, 413, "images.0: is 40x40; 2 such images have more"),
        ({"prompts": ["a"]}, 400, "prompts: must be a list of 2 strings"),
        ({"prompts": ["a", 1]}, 400, "prompts: must be a list of 2 strings"),
        ({"metadata": [{}]}, 400, "metadata: must be null or a list of 2 objects"),
        ({"prompts": ["a", "b" * 20000]}, 413, "must be at most 9000 (send fewer images"),
    ],
)
def test_server_says_what_is_wrong_with_a_request(
    changes: dict[str, Any], status: int, reason: str, strict_server: RewardServer
) -> None:
    request = {"version": 1, "images": [png()] * 2, "prompts": ["a", "b"], "metadata": None}
    with httpx2.Client(base_url=strict_server.url) as client:
        answer = client.post("/score", json={**request, **changes})
        assert answer.status_code == status
        assert reason in answer.json()["error"]
        # The connection and the server are as good as before.
        assert client.post("/score", json=request).json() == {"scores": [0.0, 0.0]}


def test_server_speaks_http() -> None:
    with serving() as server, httpx2.Client(base_url=server.url) as client:
        assert client.get("/health").json() == {"version": 1, "name": "a reward", "checks": False}
        (connection,) = server.server_state.connections
        accepted = connection.transport.get_extra_info("socket")
        # Otherwise every answer waits 40 ms between its headers and its body.
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert client.get("/").status_code == 404
        assert client.post("/score", content=b"{").status_code == 400
        assert client.post("/score", content=iter([b"{}"])).status_code == 411
        assert client.put("/score").status_code == 501


def answer_to(server: RewardServer, request: bytes) -> bytes:
    """All that the server says to these bytes."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        connection.sendall(request)
        connection.settimeout(PATIENCE)
        return b"".join(iter(lambda: connection.recv(2**16), b""))


@pytest.mark.parametrize("begun", [b"", b"{"])
def test_server_gives_up_who_falls_silent(begun: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_server, "IDLE_SECONDS", 0.1)
    with serving() as server:
        head = b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n"
        answer = answer_to(server, head + begun)
    assert answer.startswith(b"HTTP/1.1 408 ") and b"nothing came for 0.1 s" in answer


def test_a_request_is_one_harmless_line_of_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    with serving() as server:
        answer_to(server, b"GET /%1b[31m%0aforged HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    lines = [line for line in capfd.readouterr().out.splitlines() if "forged" in line]
    assert [re.sub(r"^[\d:]{8} |\d\.\d\d s", "", line) for line in lines] == [
        "127.0.0.1 GET /?[31m forged 404, 0 images, : there are only GET /health, POST /score and "
        "POST /check"
    ]


def test_server_survives_its_reward(capfd: pytest.CaptureFixture[str]) -> None:
    def moody(images: torch.Tensor, prompts: list[str], metadata: object) -> list[float]:
        if prompts == ["bad"]:
            raise KeyError("mood")
        return [float("nan") if prompt == "odd" else 1.0 for prompt in prompts]

    images, _ = gray(1)
    with serving(moody) as server:
        remote = Remote(server.url)
        with pytest.raises(ServerError, match="'a reward' raised KeyError for 1 prompts") as caught:
            remote(images, ["bad"], None)
        assert "images were not kept" not in str(caught.value)
        with pytest.raises(ServerError, match="returned nan for the prompt 'odd'"):
            remote(images, ["odd"], None)
        assert remote(images, ["good"], None) == [1.0]
    out, err = capfd.readouterr()
    lines = [line for line in out.splitlines() if "POST /score" in line]
    assert [re.sub(r".*POST /score (\d+), (\d) images.*", r"\1 \2", line) for line in lines] == (
        ["500 1"] * 10 + ["200 1"]
    )
    assert 'raise KeyError("mood")' in err


SLOW_REWARD = """
import pathlib, time
class Slow:
    def __init__(self, factor: float = 1.0):
        self.factor = factor
    def __call__(self, images, prompts, metadata):
        pathlib.Path("begun").touch()
        while not pathlib.Path("go").exists():
            time.sleep(0.01)
        return self.factor * images.mean((1, 2, 3))
"""


@contextmanager
def slow_server(folder: Path, farewell: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that serves `SLOW_REWARD`, and its address."""
    (folder / "slow.py").write_text(SLOW_REWARD)
    code = f"""
from treegrpo.rewards import server
server.FAREWELL_SECONDS = {farewell}
server.serve("slow:Slow", {{"factor": 2.0}}, port=0, token_env="SERVER_TOKEN", device="cpu")
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            started = process.stdout.readline()
            address = re.fullmatch(r"serving slow:Slow at (http://\S+) on cpu\n", started)
            assert address is not None, started
            yield process, address[1]
        finally:
            process.kill()


def test_a_process_serves_and_finishes_what_it_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVER_TOKEN", "hunter2")
    with slow_server(tmp_path, farewell=30) as (process, url), ThreadPoolExecutor(1) as pool:
        remote = Remote(url, token_env="SERVER_TOKEN", give_up_after_seconds=0)
        remote.check([], None)
        answer = pool.submit(remote, *gray(3), None)
        while not (tmp_path / "begun").exists():
            assert not answer.done() and process.poll() is None
        process.send_signal(signal.SIGTERM)
        (tmp_path / "go").touch()
        np.testing.assert_allclose(answer.result(PATIENCE), 256 / 255, rtol=1e-6)
        assert process.stdout is not None
        rest = process.stdout.read()
        assert process.wait(PATIENCE) == 0
        assert rest.endswith("stopped\n") and "hunter" not in rest


@pytest.mark.parametrize(
    ("signals", "farewell", "end"),
    [
        ((signal.SIGINT, signal.SIGTERM), 30, signal.SIGTERM),
        ((signal.SIGINT,), 0.3, signal.SIGALRM),
    ],
    ids=["told twice", "once too long"],
)
def test_a_process_does_not_wait_for_its_batch_without_end(
    signals: tuple[signal.Signals, ...],
    farewell: float,
    end: signal.Signals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SERVER_TOKEN", "hunter2")
    with slow_server(tmp_path, farewell) as (process, url), ThreadPoolExecutor(1) as pool:
        remote = Remote(url, token_env="SERVER_TOKEN", give_up_after_seconds=0)
        answer = pool.submit(remote, *gray(3), None)
        while not (tmp_path / "begun").exists():
            assert not answer.done() and process.poll() is None
        for number in signals:
            process.send_signal(number)
            time.sleep(0.1)  # signals that come at once are one
        assert process.wait(PATIENCE) == -end
        with pytest.raises(ServerError, match="did not answer"):
            answer.result(PATIENCE)


def test_the_server_without_its_libraries_says_what_to_install(
    treegrpo: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "treegrpo.rewards.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert treegrpo.refusal("serve-reward", "composition") == (
        "the reward server cannot be imported (import of uvicorn halted; None in sys.modules); "
        "install it with pip install 'treegrpo[serve]'"
    )


def test_an_address_in_use_is_refused_before_the_reward_is_loaded() -> None:
    with serving() as server, pytest.raises(UserError, match="--host and --port: cannot listen on"):
        reward_server.serve("no_such:reward", {}, port=int(server.url.rpartition(":")[2]))

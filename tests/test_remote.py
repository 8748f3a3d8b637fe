"""Rewards behind HTTP, against real servers: what they score, and how they bear failure."""

from __future__ import annotations

import json
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from PIL import Image

from treegrpo.errors import UserError
from treegrpo.miniature.scenes import all_compositions, place, render
from treegrpo.rewards import RewardError, http, load_reward, protocol, score
from treegrpo.rewards import server as reward_server
from treegrpo.rewards.composition import composition
from treegrpo.rewards.http import ServerError
from treegrpo.rewards.protocol import to_png
from treegrpo.rewards.remote import Remote
from treegrpo.rewards.server import RewardServer
from treegrpo.rewards.vlm_judge import VLMJudge, parse_score

PATIENCE = 120.0  # seconds; reached only where a test fails


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(http, "LONGEST_WAIT", 0.02)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def brightness(images: torch.Tensor, prompts: list[str], metadata: object) -> torch.Tensor:
    return images.mean((1, 2, 3))


@contextmanager
def serving(reward: Any = brightness, port: int = 0, **settings: Any) -> Iterator[RewardServer]:
    with socket.create_server(("127.0.0.1", port)) as listener:
        server = RewardServer(listener, "a reward", reward, **settings)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield server
        finally:
            server.should_exit = True
            thread.join()


Behavior = Callable[["ScriptedHandler", Any], None]


class ScriptedHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Scripted

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append((self.path, dict(self.headers), body))
        self.server.behaviors[min(number, len(self.server.behaviors) - 1)](self, body)

    do_GET = BaseHTTPRequestHandler.send_error  # never asked

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


class Scripted(ThreadingHTTPServer):
    """Answers the n-th request with the n-th behavior, and all later ones with the last."""

    def __init__(self, *behaviors: Behavior) -> None:
        super().__init__(("127.0.0.1", 0), ScriptedHandler)
        self.behaviors = behaviors
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.lock = threading.Lock()
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def scripted(*behaviors: Behavior) -> Iterator[Scripted]:
    server = Scripted(*behaviors)
    with running(server):
        try:
            yield server
        finally:
            server.released.set()


def says(content: object, status: int = 200, **headers: str) -> Behavior:
    def answer(handler: ScriptedHandler, body: Any) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def zeros(handler: ScriptedHandler, body: Any) -> None:
    says({"scores": [0.0] * len(body["images"])})(handler, body)


def hangs(handler: ScriptedHandler, body: Any) -> None:
    handler.server.released.wait(PATIENCE)
    handler.close_connection = True


def hangs_up(handler: ScriptedHandler, body: Any) -> None:
    handler.close_connection = True


def breaks_off(handler: ScriptedHandler, body: Any) -> None:
    handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{"scores": [0')
    handler.close_connection = True


def gray(count: int) -> tuple[torch.Tensor, list[str]]:
    return torch.full((count, 3, 4, 4), 0.5), [f"prompt {number}" for number in range(count)]


def quantized(images: torch.Tensor) -> torch.Tensor:
    return (images * 255).round() / 255


# --- scores ---


def test_server_sees_the_same_images_prompts_and_metadata() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 12, 20), generator=generator) / 255
    images[0, 0].view(-1)[:] = torch.arange(240) / 255
    images[1, 0].view(-1)[:] = torch.arange(16, 256) / 255
    numbers = torch.randn(8, generator=generator) * 10.0 ** torch.arange(-4, 4)
    prompts = [f"prompt {number}, zwölf 圆" for number in range(8)]
    metadata = [{"number": number, "nested": {"words": ["a", None]}} for number in range(8)]
    seen: dict[str, Any] = {}

    def recorder(images: torch.Tensor, prompts: list[str], metadata: Any) -> torch.Tensor:
        assert images.is_contiguous()
        seen.update(zip(prompts, zip(images, metadata, strict=True), strict=True))
        return numbers[[one["number"] for one in metadata]]

    with serving(recorder) as server:
        remote = Remote(server.url, batch_size=3)
        scores = score("remote", remote, images, prompts, metadata, None)
    assert torch.equal(scores, numbers)
    assert torch.equal(torch.stack([seen[prompt][0] for prompt in prompts]), images)
    assert [seen[prompt][1] for prompt in prompts] == metadata


def test_composition_scores_the_same_on_either_side() -> None:
    rng = np.random.default_rng(0)
    shown = [all_compositions()[i] for i in rng.choice(len(all_compositions()), 60)]
    pictures = np.stack([render(place(one, rng)) for one in shown])
    pictures = pictures + rng.normal(scale=0.08, size=pictures.shape)
    images = quantized(torch.from_numpy(pictures).float().clamp(0, 1))
    prompts = [one.prompt for one in shown]
    here = score("composition", composition, images, prompts, None, None)
    assert 0 < here.mean() < 1
    with serving(composition) as server:
        there = score("remote", Remote(server.url, batch_size=7), images, prompts, None, None)
    assert torch.equal(here, there)


def test_metadata_that_cannot_be_sent_is_refused_before_a_run() -> None:
    remote = Remote("http://127.0.0.1:1")
    for odd in (float("nan"), {1, 2}, np.int64(3)):
        with pytest.raises(UserError, match="metadata of the prompt 'b' cannot be sent as JSON"):
            remote.check(["a", "b"], [{"fine": 1}, {"odd": odd}])


def test_a_served_reward_refuses_prompts_before_a_run_too() -> None:
    class Quoted:
        def check(self, prompts: list[str], metadata: list[dict[str, Any]] | None) -> None:
            for prompt, entry in zip(prompts, metadata or [{}] * len(prompts), strict=True):
                if '"' not in prompt and "text" not in entry:
                    raise UserError(f"{prompt!r} asks for no text")

        def __call__(self, images: torch.Tensor, prompts: list[str], metadata: Any) -> Any:
            self.check(prompts, metadata)
            return torch.zeros(len(images))

    with serving(Quoted()) as server:
        remote = Remote(server.url)
        remote.check(['a "word"', "a sign"], [{}, {"text": "word"}])
        with pytest.raises(UserError, match=f"reward server {server.url}: 'a sign' asks for no te"):
            remote.check(['a "word"', "a sign"], None)
        # Should one come all the same, asking again would be in vain.
        with pytest.raises(ServerError, match=r"HTTP 422: .*'prompt 0' asks for no text"):
            remote(*gray(1), None)


def test_an_address_is_a_reward() -> None:
    images, prompts = gray(2)
    with serving() as server:
        reward = load_reward(server.url, {"batch_size": 1})
        np.testing.assert_allclose(reward(images, prompts, None), 128 / 255, rtol=1e-6)


# --- several requests at once ---


def test_requests_overlap_up_to_the_limit() -> None:
    together = threading.Barrier(4)
    lock = threading.Lock()
    counts = {"now": 0, "most": 0}

    def answer(handler: ScriptedHandler, body: Any) -> None:
        with lock:
            counts["now"] += 1
            counts["most"] = max(counts.values())
        together.wait(PATIENCE)  # passes only if four requests are under way
        with lock:
            counts["now"] -= 1
        says({"scores": [float(prompt.split()[1]) for prompt in body["prompts"]]})(handler, body)

    images, prompts = gray(15)
    with scripted(answer) as server:
        scores = Remote(server.url, batch_size=2, concurrency=4)(images, prompts, None)
    assert scores == list(range(15))
    assert counts["most"] == 4
    assert [len(body["prompts"]) for _, _, body in server.requests].count(2) == 7


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


# --- failures that pass ---


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (says({"error": "loading"}, 503), 1),
        (says(b"<html>bad gateway</html>", 502), 1),
        (says(b"", 504), 1),
        (says({"error": "out of memory"}, 500), 1),
        (says({"error": "slower"}, 429), 0),  # rate limits are everyday
        (says(b"overloaded", 529), 1),
        (says({"error": {"code": 503, "message": "no model is free"}}), 1),
        (hangs, 1),
        (hangs_up, 1),
        (breaks_off, 1),
    ],
    ids=["503", "502", "504", "500", "429", "529", "503 in 200", "hangs", "hangs up", "breaks off"],
)
def test_passing_faults_are_waited_out(
    fault: Behavior, said: int, caplog: pytest.LogCaptureFixture
) -> None:
    images, prompts = gray(1)
    with scripted(fault, fault, zeros) as server:
        remote = Remote(server.url, timeout_seconds=0.2 if fault is hangs else PATIENCE)
        assert remote(images, prompts, None) == [0.0]
    assert len(server.requests) == 3
    assert server.requests[0][2] == server.requests[2][2]
    waits = [r.message for r in caplog.records if "does not answer" in r.message]
    assert len(waits) == said
    assert sum("answers again" in record.message for record in caplog.records) == said


def test_waits_double_up_to_a_limit_and_heed_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_WAIT", 0.5)
    monkeypatch.setattr(http, "LONGEST_WAIT", 3.0)
    waits: list[float] = []
    busy = says({"error": "busy"}, 503)
    with scripted(busy, busy, busy, says(b"", 503, Retry_After="7"), busy, zeros) as server:
        remote = Remote(server.url)
        monkeypatch.setattr(remote._endpoint._closed, "wait", waits.append)
        remote(*gray(1), None)
    assert waits == [0.5, 1.0, 2.0, 7.0, 3.0]


# All that the protocol asks of a server; the documentation shows it.
MINIMAL_SERVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    def answer(self, content):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def do_GET(self):
        self.answer({"version": 1, "name": "prompt length"})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer({"scores": [len(prompt) for prompt in request["prompts"]]})

server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@contextmanager
def minimal_server(port: int) -> Iterator[int]:
    command = [sys.executable, "-c", MINIMAL_SERVER, str(port)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.kill()


def test_a_killed_server_that_comes_back_goes_on_answering(
    caplog: pytest.LogCaptureFixture,
) -> None:
    images, prompts = gray(40)
    with minimal_server(0) as port:
        remote = Remote(f"http://127.0.0.1:{port}", batch_size=4, give_up_after_seconds=PATIENCE)
        remote.check(prompts, None)
        expected = remote(images, prompts, None)
        assert expected == [len(prompt) for prompt in prompts]
    waiting = threading.Event()
    handler = logging.Handler()
    handler.emit = lambda record: waiting.set()  # type: ignore[method-assign]
    logger = logging.getLogger(http.__name__)
    logger.addHandler(handler)
    try:
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(remote, images, prompts, None)
            assert waiting.wait(PATIENCE)  # it has noticed that the server is gone
            with minimal_server(port):
                assert answer.result(PATIENCE) == expected
    finally:
        logger.removeHandler(handler)
    assert "does not answer, retrying for up to 120 s" in caplog.text
    # Four requests waited, one outage was announced.
    assert caplog.text.count("does not answer") == 1
    assert caplog.text.count("answers again") == 1


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_server_that_is_gone_for_good_is_given_up(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    remote = Remote(url, give_up_after_seconds=0.05, batch_size=1)
    with pytest.raises(RewardError) as caught:
        score("remote", remote, *gray(9), None, tmp_path)
    message = str(caught.value)
    assert re.search(rf"reward server {url} did not answer for 0 s \(\d+ attempts\)", message)
    assert "ConnectError" in message and "Connection refused" in message
    assert np.load(next(tmp_path.iterdir()))["images"].shape == (9, 3, 4, 4)
    with pytest.raises(UserError, match="did not answer"):
        remote.check([], None)


def test_a_hanging_server_is_given_up() -> None:
    with scripted(hangs) as server:
        remote = Remote(server.url, timeout_seconds=0.1, give_up_after_seconds=0)
        with pytest.raises(ServerError, match="ReadTimeout"):
            remote(*gray(1), None)


def test_a_reward_that_fails_every_time_is_not_waited_for_long() -> None:
    message = r"HTTP 500: no such prompt \(the last of 5 attempts"
    with (
        scripted(says({"error": "no such prompt"}, 500)) as server,
        pytest.raises(ServerError, match=message),
    ):
        Remote(server.url)(*gray(1), None)
    assert len(server.requests) == http.ATTEMPTS_AT_500


def drips(handler: ScriptedHandler, body: Any) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    while not handler.server.released.wait(0.02):
        try:
            handler.wfile.write(b" ")
        except OSError:  # the client has had enough
            break
    handler.close_connection = True


def test_an_answer_that_never_ends_is_broken_off() -> None:
    with scripted(drips) as server:
        remote = Remote(server.url, timeout_seconds=0.2, give_up_after_seconds=0.2)
        with pytest.raises(ServerError, match="was still answering after 0 s"):
            remote(*gray(1), None)


def test_one_request_that_fails_for_good_ends_those_that_wait() -> None:
    def answer(handler: ScriptedHandler, body: Any) -> None:
        status = 400 if body["prompts"] == ["prompt 2"] else 503
        says({"error": "prompt 2 is not for me"}, status)(handler, body)

    with scripted(answer) as server:
        remote = Remote(server.url, batch_size=1)
        with pytest.raises(ServerError, match="prompt 2 is not for me"):
            remote(*gray(3), None)
        remote.close()


def test_closing_ends_the_wait() -> None:
    remote = Remote(f"http://127.0.0.1:{closed_port()}", batch_size=1)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(remote, *gray(9), None)
        remote.close()
        with pytest.raises(ServerError, match="it was closed"):
            answer.result(PATIENCE)


# --- failures that do not pass ---


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (says({"error": "bad image"}, 400), "/score answered HTTP 400: bad image"),
        (says({"error": "token"}, 401), r"HTTP 401: token \(token_env names the environment"),
        (says({"error": {"message": "no entry"}}, 403), "HTTP 403: no entry"),
        (says(b"<p>Not found</p>", 404), "HTTP 404: <p>Not found</p>"),
        (says(b"", 302, Location="https://a/login"), r"\(redirected to https://a/login\)"),
        (says({"error": "broken"}), "HTTP 200: broken"),
        (says(b'{"scores": [1'), r'answered no JSON object: \{"scores": \[1'),
        (says([1.0, 2.0]), r"answered no JSON object: \[1.0, 2.0\]"),
        (says({"rewards": [1.0, 2.0]}), r"without a list of \"scores\": it has \['rewards'\]"),
        (says({"scores": [1.0]}), "1 scores for 2 images"),
        (says({"scores": [1.0, "2"]}), "'2' for the prompt 'prompt 1': not a number"),
        (says({"scores": [1.0, None]}), "None for the prompt 'prompt 1': not a number"),
        (says(b'{"scores": [1, NaN]}'), "nan for the prompt 'prompt 1': not finite"),
        (says(b'{"scores": [1, 1%s]}' % (b"0" * 400)), "prompt 'prompt 1': not finite"),
    ],
)
def test_other_faults_are_errors_at_once(answer: Behavior, message: str) -> None:
    with scripted(answer) as server, pytest.raises(ServerError, match=message) as caught:
        Remote(server.url)(*gray(2), None)
    assert len(server.requests) == 1
    assert server.url in str(caught.value)


def test_encryption_that_is_not_there_is_an_error_at_once() -> None:
    with scripted(zeros) as server, pytest.raises(ServerError, match="SSL"):
        Remote(server.url.replace("http:", "https:"))(*gray(1), None)


def test_tokens_are_asked_for_and_never_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RIGHT", "hunter2")
    monkeypatch.setenv("WRONG", "hunter3")
    with serving(token="hunter2") as server:
        right = Remote(server.url, token_env="RIGHT")
        right.check([], None)
        np.testing.assert_allclose(right(*gray(1), None), 128 / 255, rtol=1e-6)
        for remote in (Remote(server.url, token_env="WRONG"), Remote(server.url)):
            with pytest.raises(UserError, match="HTTP 401: the token is missing or wrong"):
                remote.check([], None)
            with pytest.raises(ServerError, match="HTTP 401: the token is missing or wrong"):
                remote(*gray(1), None)
    assert "hunter" not in "".join(capsys.readouterr())
    with scripted(zeros) as server:
        Remote(server.url, token_env="RIGHT", token_header="api-key")(*gray(1), None)
    assert server.requests[0][1]["api-key"] == "hunter2"
    assert "Authorization" not in server.requests[0][1]
    with (
        scripted(says({"error": "no user hunter2 here"}, 403)) as server,
        pytest.raises(ServerError, match=r"no user \*\*\* here"),
    ):
        Remote(server.url, token_env="RIGHT")(*gray(1), None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "ftp://host"}, "option url: got 'ftp://host'; must be http://host:port"),
        ({"url": "http://"}, "option url: got 'http://'; must be"),
        ({"url": "http://host:99999"}, "option url: got 'http://host:99999', which is no"),
        ({"url": "http://host/?key=1"}, "option url: got "),
        ({"url": "http://me:hunter2@host"}, "option url: it holds a user name or password"),
        ({"headers": {"authorization": "hunter2"}}, "option headers: authorization would be"),
        ({"headers": {"X-A": "b\nc"}}, "option headers: X-A must be a string of printable"),
        ({"headers": {"X A": "b"}}, "option headers: got the name 'X A'"),
        ({"token_header": "X A"}, "option token_header: got the name 'X A'"),
        ({"token_env": "NOT_SET"}, "option token_env: the environment variable NOT_SET is not"),
        ({"token_env": "ODD"}, "option token_env: the value of ODD must be printable ASCII"),
        ({"timeout_seconds": 0}, "option timeout_seconds: got 0; must be a number greater than 0"),
        ({"give_up_after_seconds": "1"}, "option give_up_after_seconds: got '1'; must be a numb"),
        ({"batch_size": 2.5}, "option batch_size: got 2.5; must be a whole number of at least 1"),
        ({"concurrency": 0}, "option concurrency: got 0; must be a whole number of at least 1"),
    ],
)
def test_options_are_checked(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ODD", "hunter2\x01")
    with pytest.raises(UserError) as caught:
        Remote(**{"url": "http://host", **options})
    assert str(caught.value).startswith(message)
    assert "hunter" not in str(caught.value)


# --- the server ---


def png(size: tuple[int, int] = (4, 4), mode: str = "RGB") -> str:
    return to_png(np.asarray(Image.new(mode, size)))


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
    changes: dict[str, Any], status: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "MAX_PIXELS", 2 * 30 * 30)
    monkeypatch.setattr(reward_server, "MAX_BODY_BYTES", 9000)
    request = {"version": 1, "images": [png()] * 2, "prompts": ["a", "b"], "metadata": None}
    with serving(max_batch=3) as server, httpx2.Client() as client:
        answer = client.post(f"{server.url}/score", json={**request, **changes})
        assert answer.status_code == status
        assert reason in answer.json()["error"]
        # The connection and the server are as good as before.
        assert client.post(f"{server.url}/score", json=request).json() == {"scores": [0.0, 0.0]}


def test_server_speaks_http() -> None:
    with serving() as server, httpx2.Client(base_url=server.url) as client:
        assert client.get("/health").json() == {"version": 1, "name": "a reward", "checks": False}
        assert client.get("/").status_code == 404
        assert client.post("/score", content=b"{").status_code == 400
        assert client.post("/score", content=iter([b"{}"])).status_code == 411
        assert client.put("/score").status_code == 501


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


def test_a_process_serves_and_finishes_what_it_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVER_TOKEN", "hunter2")
    (tmp_path / "slow.py").write_text(SLOW_REWARD)
    code = """
from treegrpo.rewards.server import serve
serve("slow:Slow", {"factor": 2.0}, port=0, token_env="SERVER_TOKEN", device="cpu")
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            started = process.stdout.readline()
            url = re.fullmatch(r"serving slow:Slow at (http://\S+) on cpu\n", started)[1]
            remote = Remote(url, token_env="SERVER_TOKEN", give_up_after_seconds=0)
            remote.check([], None)
            with ThreadPoolExecutor(1) as pool:
                answer = pool.submit(remote, *gray(3), None)
                while not (tmp_path / "begun").exists():
                    assert not answer.done() and process.poll() is None
                process.send_signal(signal.SIGTERM)
                (tmp_path / "go").touch()
                np.testing.assert_allclose(answer.result(PATIENCE), 256 / 255, rtol=1e-6)
            rest = process.stdout.read()
            assert process.wait(PATIENCE) == 0
            assert rest.endswith("stopped\n") and "hunter" not in rest
        finally:
            process.kill()


def test_an_address_in_use_is_refused_before_the_reward_is_loaded() -> None:
    with serving() as server, pytest.raises(UserError, match="--host and --port: cannot listen on"):
        reward_server.serve("no_such:reward", {}, port=int(server.url.rpartition(":")[2]))


# --- the judge ---


def completion(*texts: str, **more: Any) -> list[Behavior]:
    return [says({"choices": [{"message": {"content": text}, **more}]}) for text in texts]


def test_judge_asks_as_the_api_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "hunter2")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 6, 5), generator=generator) / 255
    prompts = ["a {scale}", "two {prompt}s", "three"]

    def answer(handler: ScriptedHandler, body: Any) -> None:
        text = body["messages"][0]["content"][1]["text"]
        place = next(i for i, prompt in enumerate(prompts) if f"<{prompt}>" in text)
        completion(json.dumps({"score": 2 * place + 1}))[0](handler, body)

    with scripted(answer) as server:
        judge = VLMJudge(
            f"{server.url}/v1",
            "a-model",
            rubric="From 0 to {scale}: <{prompt}>",
            token_env="API_KEY",
            scale=5,
            extra_body={"seed": 3, "max_tokens": None, "max_completion_tokens": 99},
        )
        assert judge(images, prompts, None) == [1 / 5, 3 / 5, 5 / 5]
    by_text = {}
    for path, headers, body in server.requests:
        assert path == "/v1/chat/completions"
        assert headers["Authorization"] == "Bearer hunter2"
        (message,) = body.pop("messages")
        assert body == {
            "model": "a-model",
            "temperature": 0.0,
            "seed": 3,
            "max_completion_tokens": 99,
        }
        assert message["role"] == "user"
        image, text = message["content"]
        assert image["type"] == "image_url" and text["type"] == "text"
        kind, _, data = image["image_url"]["url"].partition(",")
        assert kind == "data:image/png;base64"
        by_text[text["text"]] = np.asarray(Image.open(BytesIO(b64decode(data))))
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for prompt, expected in zip(prompts, pixels, strict=True):
        np.testing.assert_array_equal(by_text[f"From 0 to 5: <{prompt}>"], expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"score": 7}', 7),
        ('```json\n{"reason": "2 of 3 cats", "score": "6.5"}\n```', 6.5),
        ("{'score': 7.0}", 7),
        ("Score: 7/10", 7),
        ("**Score:** 7 out of 10.", 7),
        ("Score (0-10): 8", 8),
        ("I count 3 cats.\n\nFinal score = 4", 4),
        ("Rating: 3. On reflection, the score is 2", 2),
        ('{"score": 6}\n\nA score of 10 would require two cats.', 6),
        ("**Score: 6/10**\n\nTo reach a score of 10, it needs two cats.", 6),
        ('{"score": 3, "comment": "the score is 0 for text"}', 3),
        ('{"score": 1e1}', 10),
        ('{"why": {"cats": 2}, "score": 4}', 4),
        ("I give it a score of 6.", 6),
        ("A score of 6; a score of 10 would require two cats.", None),
        ("Score: 7-8/10", None),
        ("It is between 7 and 8 out of 10.", None),
        ("Score: 7 or 8", None),
        ("Score: 7~8", None),
        ("It earns 9/10 for its 3 cats.", 9),
        ("7", 7),
        (" **8.5** \n", 8.5),
        ("10/10", 10),
        ("0", 0),
        ("Score: 7,5", 7.5),
        ("<think>Score: 3? There are 2 of 4.</think>\nScore: 5", 5),
        ("Score: 11", None),
        ("Score: -1", None),
        ("Score: 70/100", None),
        ("Score: 7-8", None),
        ("Score: 1.2.3", None),
        ("There are 3 cats and 2 dogs.", None),
        ("I cannot rate this image.", None),
        ("<think>Score: 3", 3),
        ("", None),
    ],
)
def test_scores_are_read_from_answers(text: str, expected: float | None) -> None:
    assert parse_score(text, 10) == expected


def test_an_answer_that_was_cut_off_has_no_score_but_a_whole_one() -> None:
    assert parse_score('{"score": 1', 10, cut_off=True) is None
    assert parse_score("A score of 2", 10, cut_off=True) is None
    assert parse_score("Score: 1", 10, cut_off=True) is None
    assert parse_score('{"score": 7}\n\nThe image', 10, cut_off=True) == 7
    cut = completion('{"score": 1', finish_reason="length")
    with scripted(*cut, *completion('{"score": 10}')) as server:
        assert VLMJudge(server.url, "m")(*gray(1), None) == [1.0]


def test_judge_reads_answers_in_parts() -> None:
    parts = [{"type": "thinking", "thinking": "Score: 3"}, {"type": "text", "text": "Score: 8"}]
    with scripted(says({"choices": [{"message": {"content": parts}}]})) as server:
        assert VLMJudge(server.url, "m")(*gray(1), None) == [0.8]


def test_judge_asks_again_where_it_got_no_score() -> None:
    with scripted(*completion("A fine picture.", "Score: 8")) as server:
        assert VLMJudge(server.url, "m")(*gray(1), None) == [0.8]
    first, second = (body["messages"] for _, _, body in server.requests)
    assert second[:1] == first
    assert second[1] == {"role": "assistant", "content": "A fine picture."}
    assert '{"score": NUMBER}, from 0 to 10' in second[2]["content"]

    with scripted(*completion("Well, hm", finish_reason="length")) as server:
        message = (
            r"gave no score from 0 to 10 for the prompt 'prompt 0' in 3 answers; the last one "
            r"\(cut off: raise max_tokens\): 'Well, hm'"
        )
        with pytest.raises(ServerError, match=message):
            VLMJudge(server.url, "m")(*gray(1), None)
    assert len(server.requests) == 3


def test_an_image_without_a_score_may_get_a_fallback(caplog: pytest.LogCaptureFixture) -> None:
    filtered = says({"error": {"message": "the image was filtered"}}, 400)
    for answers in ([filtered], completion("I cannot judge this.")):
        with scripted(*answers) as server:
            assert VLMJudge(server.url, "m", fallback_score=2)(*gray(1), None) == [0.2]
            with pytest.raises(ServerError):
                VLMJudge(server.url, "m")(*gray(1), None)
            # A mistake in the settings must not pass for a filter.
            with pytest.raises(UserError):
                VLMJudge(server.url, "m", fallback_score=2).check(["a cat"], None)
    assert sum("it gets the fallback_score, 2" in record.message for record in caplog.records) == 2
    with (
        scripted(says({"error": "no such key"}, 401)) as server,
        pytest.raises(ServerError, match="HTTP 401"),
    ):
        VLMJudge(server.url, "m", fallback_score=2)(*gray(1), None)
    with pytest.raises(UserError, match=r"option fallback_score: got 11; must be at most scale"):
        VLMJudge("http://host", "m", fallback_score=11)


def test_judge_checks_itself_before_a_run() -> None:
    with scripted(*completion("5")) as server:
        VLMJudge(server.url, "m").check(["a cat"], None)
    assert "Description: a cat\n" in server.requests[0][2]["messages"][0]["content"][1]["text"]
    for answer, message in [
        (says({"error": {"message": "no model m"}}, 404), "/chat/completions answered HTTP 404"),
        (says({"choices": []}), "answered no chat completion"),
    ]:
        with scripted(answer) as server, pytest.raises(UserError, match=message):
            VLMJudge(server.url, "m").check(["a cat"], None)
    with pytest.raises(UserError, match="option rubric: must hold"):
        VLMJudge("http://host", "m", rubric="Rate it")


def test_importing_them_imports_nothing_heavy() -> None:
    code = """
import sys, treegrpo.rewards.remote, treegrpo.rewards.vlm_judge, treegrpo.rewards.server
print(*{"torch", "diffusers", "transformers", "scipy", "PIL", "numpy"} & set(sys.modules))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "\n"

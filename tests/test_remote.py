"""Rewards behind HTTP, against real servers: what they score, and how they bear failure."""

from __future__ import annotations

import logging
import re
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

import numpy as np
import pytest
import torch
from reward_servers import (
    PATIENCE,
    Behavior,
    ScriptedHandler,
    breaks_off,
    gray,
    hangs,
    hangs_up,
    says,
    scripted,
    serving,
    zeros,
)

from treegrpo.errors import UserError
from treegrpo.miniature.scenes import all_compositions, place, render
from treegrpo.rewards import RewardError, http, load_reward, score
from treegrpo.rewards.composition import composition
from treegrpo.rewards.http import ServerError
from treegrpo.rewards.remote import Remote

pytestmark = pytest.mark.usefixtures("quick_retries")


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
    clean = np.stack([render(place(one, rng)) for one in shown])
    pictures = clean + rng.normal(scale=0.08, size=clean.shape)
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
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "FIRST_ANSWER_SECONDS", 0.0)  # it has answered before
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


@pytest.mark.parametrize("listens", [False, True])
def test_a_server_that_never_answered_is_not_waited_for_long(
    listens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is at that port, or somebody who does not speak HTTP; give_up_after_seconds is 600."""
    monkeypatch.setattr(http, "FIRST_ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(http, "CONNECT_SECONDS", 0.2)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        if listens:
            other.listen()
        remote = Remote(f"http://127.0.0.1:{other.getsockname()[1]}")
        begin = time.monotonic()
        with pytest.raises(UserError, match=r"did not answer for [01] s"):
            remote.reach()
    assert time.monotonic() - begin < 5


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
    with scripted(zeros) as gateway:
        Remote(gateway.url, token_env="RIGHT", token_header="api-key")(*gray(1), None)
    assert gateway.requests[0][1]["api-key"] == "hunter2"
    assert "Authorization" not in gateway.requests[0][1]
    with (
        scripted(says({"error": "no user hunter2 here"}, 403)) as gateway,
        pytest.raises(ServerError, match=r"no user \*\*\* here"),
    ):
        Remote(gateway.url, token_env="RIGHT")(*gray(1), None)


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


def test_importing_them_imports_nothing_heavy() -> None:
    code = """
import sys, treegrpo.rewards.remote, treegrpo.rewards.vlm_judge, treegrpo.rewards.server
print(*{"torch", "diffusers", "transformers", "scipy", "PIL", "numpy"} & set(sys.modules))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "\n"

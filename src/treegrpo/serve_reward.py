"""Serve a reward to training runs on other machines: `treegrpo serve-reward`.

The protocol is described in `treegrpo.rewards.remote`. One process, one model, one batch at a time;
what is left out: TLS (put a proxy in front) and several models (start several servers).
"""

from __future__ import annotations

import hmac
import json
import select
import signal
import socket
import sys
import threading
import time
import traceback
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import TYPE_CHECKING, Any

from treegrpo.device import usable_device
from treegrpo.errors import UserError
from treegrpo.rewards import Reward, RewardError, load_reward, score
from treegrpo.rewards.http import read_token
from treegrpo.rewards.remote import VERSION

if TYPE_CHECKING:
    from torch import Tensor

MAX_BODY_BYTES = 512 * 2**20
MAX_PIXELS = 2**28  # of one request; 3 GiB as floats
FAREWELL_SECONDS = 30.0  # at most so long a stopping server finishes what it has begun


class _Refusal(Exception):
    """A request that is answered with an error, and which."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class RewardServer(ThreadingHTTPServer):
    """Answers with a reward; `serve_forever` until `shutdown`, then `finish`.

    Args:
        address: host and port; port 0 lets the system choose (see `url`).
        name: the reward's name.
        reward: the reward. It is called by one thread at a time.
        token: what clients must send as `Authorization: Bearer`, or None.
        max_batch: most images of one request.
        device: where the reward gets its images.
    """

    daemon_threads = True  # idle connections end with the process
    request_queue_size = 128

    def __init__(
        self,
        address: tuple[str, int],
        name: str,
        reward: Reward,
        *,
        token: str | None = None,
        max_batch: int = 256,
        device: str = "cpu",
    ) -> None:
        self.name, self.reward, self.token = name, reward, token
        self.max_batch, self.device = max_batch, device
        self.model_lock = threading.Lock()
        self.stopping = False
        self._busy = 0
        self._idle = threading.Condition()
        super().__init__(address, _Handler)

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}"

    @contextmanager
    def answering(self) -> Iterator[None]:
        with self._idle:
            self._busy += 1
        try:
            yield
        finally:
            with self._idle:
                self._busy -= 1
                self._idle.notify_all()

    def finish(self) -> None:
        """Wait for the batch that is being scored; turn away what waits for its turn."""
        self.stopping = True
        with self._idle:
            self._idle.wait_for(lambda: not self._busy, FAREWELL_SECONDS)
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that goes away in the middle is no news; anything else is a fault of ours.
        if not isinstance(sys.exception(), OSError):
            traceback.print_exc()


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    protocol_version = "HTTP/1.1"
    timeout = 60.0  # seconds without a byte
    disable_nagle_algorithm = True  # headers and body are two writes: no wait between them

    def do_GET(self) -> None:
        self._handle(self._health if self.path == "/health" else None)

    def do_POST(self) -> None:
        self._handle({"/score": self._score, "/check": self._check}.get(self.path))

    def log_message(self, format: str, *arguments: Any) -> None:
        # Whatever a client sends, it is one line and does nothing to a terminal.
        line = " ".join((format % arguments).split())
        text = "".join(character if character.isprintable() else "?" for character in line)
        print(f"{time.strftime('%H:%M:%S')} {self.client_address[0]} {text}", flush=True)

    def log_error(self, format: str, *arguments: Any) -> None:
        if not isinstance(sys.exception(), TimeoutError):  # an idle connection is no request
            self.log_message(format, *arguments)

    def log_request(self, code: object = "-", size: object = "-") -> None:
        pass  # `_handle` logs with the time taken

    def _handle(self, route: Callable[[bytes], dict[str, Any]] | None) -> None:
        with self.server.answering():
            start, self._images = time.perf_counter(), 0
            status, answer = 200, {}
            try:
                body = self._read()
                if route is None:
                    raise _Refusal(404, "there are only GET /health, POST /score and POST /check")
                answer = route(body)
            except _Refusal as refusal:
                status, answer = refusal.status, {"error": str(refusal)}
            except RewardError as error:
                # A prompt that it cannot score is not worth another attempt.
                status = 422 if isinstance(error.__cause__, UserError) else 500
                if status == 500 and error.__cause__ is not None:
                    traceback.print_exception(error.__cause__)
                # Where the images were (not) kept is the business of the client, which has them.
                answer = {"error": str(error).partition("; the batch's images")[0]}
            except OSError:
                raise  # the connection is gone
            except Exception as error:  # out of memory, above all
                traceback.print_exc()
                status, answer = 500, {"error": f"{type(error).__name__}: {error}"}
            ending = "" if status == 200 else f": {answer['error']}"
            try:
                self._send(status, answer)
            except OSError as error:
                ending += f", but the client has left ({error})"
            seconds = time.perf_counter() - start
            self.log_message(
                "%s",
                f"{self.command} {self.path} {status}, {self._images} images, {seconds:.2f} s"
                + ending,
            )

    def _read(self) -> bytes:
        given = self.headers.get("Content-Length", "0" if self.command == "GET" else "")
        if not (given.isascii() and given.isdigit()):
            self.close_connection = True
            raise _Refusal(411, "the request must have a Content-Length")
        length = int(given)
        refusal = self._refused(length)
        if refusal is not None:
            # Bytes left unread would reset the connection and take the answer with them.
            while length > 0 and (part := self.rfile.read(min(length, 2**20))):
                length -= len(part)
            raise refusal
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionError("the client left before its request ended")
        return body

    def _refused(self, length: int) -> _Refusal | None:
        """Why a request is refused before its body is kept."""
        given = self.headers.get("Authorization", "").encode("utf-8", "replace")
        token = self.server.token
        if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            return _Refusal(401, "the token is missing or wrong")
        if length > MAX_BODY_BYTES:
            return _Refusal(
                413,
                f"the request has {length} bytes; must be at most {MAX_BODY_BYTES} (send fewer "
                "images at once)",
            )
        return None

    def _health(self, body: bytes) -> dict[str, Any]:
        checks = hasattr(self.server.reward, "check")
        return {"version": VERSION, "name": self.server.name, "checks": checks}

    def _check(self, body: bytes) -> dict[str, Any]:
        request = _object(body)
        prompts: Any = request.get("prompts")
        metadata: Any = request.get("metadata")
        if not isinstance(prompts, list):
            raise _Refusal(400, "prompts: must be a list of strings")
        _check_lists(prompts, metadata, len(prompts))
        problem = None
        with self.server.model_lock:
            try:
                getattr(self.server.reward, "check", lambda *_: None)(prompts, metadata)
            except UserError as error:
                problem = str(error)
        return {"problem": problem}

    def _score(self, body: bytes) -> dict[str, Any]:
        images, prompts, metadata = _parsed(body, self.server.max_batch)
        self._images = len(images)
        with self.server.model_lock:
            if self.server.stopping:
                raise _Refusal(503, "the server is stopping")
            if self._client_has_left():
                raise _Refusal(408, "the client did not wait")
            scores = score(
                self.server.name,
                self.server.reward,
                images.to(self.server.device),
                prompts,
                metadata,
                None,
            )
        return {"scores": scores.tolist()}

    def _client_has_left(self) -> bool:
        """Work for a client that gave up would only delay those that still wait."""
        try:
            readable, _, _ = select.select([self.connection], [], [], 0)
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection or self.server.stopping:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)


def _parsed(body: bytes, max_batch: int) -> tuple[Tensor, list[str], list[dict[str, Any]] | None]:
    """The images, prompts and metadata of a request, or a `_Refusal` that says what is wrong."""
    request = _object(body)
    images: Any = request.get("images")
    prompts: Any = request.get("prompts")
    metadata: Any = request.get("metadata")
    if not isinstance(images, list) or not images:
        raise _Refusal(400, "images: must be a list of at least one PNG in base64")
    if len(images) > max_batch:
        raise _Refusal(400, f"images: got {len(images)}; must be at most {max_batch}")
    _check_lists(prompts, metadata, len(images))
    return _decoded(images), prompts, metadata


def _object(body: bytes) -> dict[str, Any]:
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _Refusal(400, f"the body is no JSON ({error})") from error
    if not isinstance(request, dict):
        raise _Refusal(400, "the body must be a JSON object")
    if request.get("version") != VERSION:
        raise _Refusal(400, f"version: got {request.get('version')!r}; must be {VERSION}")
    return request


def _check_lists(prompts: Any, metadata: Any, count: int) -> None:
    if not _is_list_of(prompts, str, count):
        raise _Refusal(400, f"prompts: must be a list of {count} strings")
    if metadata is not None and not _is_list_of(metadata, dict, count):
        raise _Refusal(400, f"metadata: must be null or a list of {count} objects")


def _is_list_of(value: Any, kind: type, count: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(element, kind) for element in value)
    )


def _decoded(images: list[Any]) -> Tensor:
    """PNGs in base64 to float32 [N, 3, H, W] in [0, 1]."""
    import numpy as np
    import torch
    from PIL import Image

    pixels = None
    for number, text in enumerate(images):
        field = f"images.{number}"
        try:
            picture = Image.open(BytesIO(b64decode(text, validate=True)), formats=["PNG"])
            width, height = picture.size
            # The size is known before anything is decompressed.
            if len(images) * width * height > MAX_PIXELS:
                raise _Refusal(
                    413,
                    f"{field}: is {width}x{height}; {len(images)} such images have more than "
                    f"{MAX_PIXELS} pixels",
                )
            if picture.mode != "RGB":
                raise _Refusal(400, f"{field}: has the mode {picture.mode}; must be RGB")
            if pixels is None:
                pixels = np.empty((len(images), height, width, 3), np.uint8)
            if (height, width) != pixels.shape[1:3]:
                raise _Refusal(
                    400,
                    f"{field}: is {width}x{height}; must be {pixels.shape[2]}x{pixels.shape[1]}, "
                    "as the first",
                )
            pixels[number] = np.asarray(picture)
        except Image.DecompressionBombError as error:
            raise _Refusal(413, f"{field}: {error}") from error
        except _Refusal:
            raise
        except Exception as error:  # whatever Pillow trips over
            raise _Refusal(400, f"{field}: is no PNG in base64 ({error})") from error
    # Contiguous, as a decoder's images are: reward models may round differently otherwise.
    return torch.from_numpy(pixels).movedim(-1, 1).contiguous().float() / 255


def serve(
    reward_name: str,
    options: Mapping[str, Any],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token_env: str | None = None,
    max_batch: int = 256,
    device: str = "auto",
) -> None:
    """Serve a reward until Ctrl-C or SIGTERM; the second signal ends it at once.

    It prints its address when it is ready, and a line per request. Call it in the main thread.

    Args:
        reward_name: as in a configuration.
        options: the reward's options, as in a configuration.
        host: the address to listen on; "0.0.0.0" lets other machines in.
        port: the port; 0 lets the system choose.
        token_env: the environment variable with the token that clients must send.
        max_batch: most images of one request.
        device: where the reward gets its images; "auto" is the accelerator, if there is one.

    Raises:
        UserError: the reward, its options, the token, the device or the address cannot be used.
    """
    token = None if token_env is None else read_token(token_env)
    _check_address(host, port)
    place = str(usable_device(device, "--device"))
    reward = load_reward(reward_name, options)
    try:
        server = RewardServer(
            (host, port),
            reward_name,
            reward,
            token=token,
            max_batch=max_batch,
            device=place,
        )
    except OSError as error:
        raise _no_address(host, port, error) from error

    def stop(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        server.stopping = True
        # `shutdown` waits for the loop that this handler interrupts.
        threading.Thread(target=server.shutdown, daemon=True).start()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    print(f"serving {reward_name} at {server.url} on {server.device}", flush=True)
    if token is None and host not in ("127.0.0.1", "localhost"):
        print("warning: no token is asked for; --token-env names a variable with one", flush=True)
    server.serve_forever(poll_interval=0.1)
    server.finish()
    print("stopped", flush=True)


def _check_address(host: str, port: int) -> None:
    """Refuse an address in use before a model is loaded; listening begins only after that."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        raise _no_address(host, port, error) from error


def _no_address(host: str, port: int, error: Exception) -> UserError:
    return UserError(f"--host and --port: cannot listen on {host}:{port} ({error})")

"""Serves a reward to training runs on other machines: `treegrpo serve-reward`.

One process, one model, one batch at a time. Needs `pip install 'treegrpo[serve]'`.

Left out: what requests hold (`protocol.py`), TLS (a proxy's), several models (several servers').
"""

from __future__ import annotations

import asyncio
import hmac
import json
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from treegrpo.device import usable_device
from treegrpo.errors import UserError
from treegrpo.rewards.http import read_token
from treegrpo.rewards.protocol import VERSION, Refusal, read_check, read_score
from treegrpo.rewards.registry import Reward, load_reward
from treegrpo.rewards.scoring import RewardError, score

try:
    import uvicorn
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send
except ModuleNotFoundError as error:
    raise UserError(
        f"the reward server cannot be imported ({error}); install it with "
        "pip install 'treegrpo[serve]'"
    ) from error

MAX_BODY_BYTES = 512 * 2**20
IDLE_SECONDS = 60  # without a byte, after which a request or an idle connection is given up
FAREWELL_SECONDS = 30  # at most so long a stopping server finishes what it has begun

_Result = TypeVar("_Result")


class RewardServer(uvicorn.Server):
    """Answers with a reward: `run([listener])`, until a signal or until `should_exit` is set.

    Args:
        listener: a bound socket.
        reward: is called by one thread at a time.
        token: what clients must send as `Authorization: Bearer`.
        max_batch: most images of one request.
        device: where the reward gets its images.
    """

    def __init__(
        self,
        listener: socket.socket,
        name: str,
        reward: Reward,
        *,
        token: str | None = None,
        max_batch: int = 256,
        device: str = "cpu",
    ) -> None:
        config = uvicorn.Config(
            self._respond,
            interface="asgi3",
            http="h11",  # whatever else is installed
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            timeout_keep_alive=IDLE_SECONDS,
        )
        super().__init__(config)
        # Headers and body are two writes: no wait between them, on any connection.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.url = "http://{}:{}".format(*listener.getsockname())
        self.name, self.reward, self.token = name, reward, token
        self.max_batch, self.device = max_batch, device
        self._turn = asyncio.Lock()
        self._routes = {
            ("GET", "/health"): self._health,
            ("POST", "/check"): self._check,
            ("POST", "/score"): self._score,
        }

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say where it is: from now on it answers, and a signal stops it in good order."""
        await super().startup(sockets)
        print(f"serving {self.name} at {self.url} on {self.device}", flush=True)
        if self.token is None and not self.url.startswith("http://127."):
            warning = "warning: no token is asked for; --token-env names a variable with one"
            print(warning, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop once the batch that is being scored is answered; the second signal ends it at once.

        uvicorn's own waits without end, whatever the second signal, and then ends the process by
        the first one, as if nothing had been finished.
        """
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, FAREWELL_SECONDS)  # its signal ends the process
        self.should_exit = True

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, start = Request(scope, receive), time.perf_counter()
        request.state.images = 0
        status, answer = 200, {}
        try:
            body = await self._read(request)
            route = self._routes.get((request.method, request.scope["path"]))
            if route is None:
                status = 404 if request.method in ("GET", "POST") else 501
                raise Refusal(status, "there are only GET /health, POST /score and POST /check")
            answer = await route(request, body)
        except ClientDisconnect:
            return
        except Refusal as refusal:
            status, answer = refusal.status, {"error": str(refusal)}
        except RewardError as error:
            # A prompt that it cannot score is not worth another attempt.
            status = 422 if isinstance(error.__cause__, UserError) else 500
            if status == 500 and error.__cause__ is not None:
                traceback.print_exception(error.__cause__)
            # Where the images were (not) kept is the business of the client, which has them.
            answer = {"error": str(error).partition("; the batch's images")[0]}
        except Exception as error:  # out of memory, above all
            traceback.print_exc()
            status, answer = 500, {"error": f"{type(error).__name__}: {error}"}
        line = (
            f"{request.client.host if request.client else '-'} {request.method} "
            f"{scope['path']} {status}, {request.state.images} images, "
            f"{time.perf_counter() - start:.2f} s"
        )
        if status != 200:
            line += f": {answer['error']}"
        if await request.is_disconnected():
            line += ", but the client has left"
        # Whatever a client sends, it is one line and does nothing to a terminal.
        line = "".join(one if one.isprintable() else "?" for one in " ".join(line.split()))
        print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
        # Starlette's JSONResponse cannot write every text that JSON can hold.
        response = Response(json.dumps(answer), status, media_type="application/json")
        await response(scope, receive, send)

    async def _read(self, request: Request) -> bytes:
        refusal, body = self._refusal(request), bytearray()
        try:
            async with asyncio.timeout(IDLE_SECONDS) as patience:
                # A refused request is read, too: bytes left unread would reset the connection and
                # take the answer with them.
                async for part in request.stream():
                    patience.reschedule(asyncio.get_running_loop().time() + IDLE_SECONDS)
                    body += b"" if refusal else part
        except TimeoutError as error:
            raise Refusal(408, f"nothing came for {IDLE_SECONDS} s") from error
        if refusal:
            raise refusal
        return bytes(body)

    def _refusal(self, request: Request) -> Refusal | None:
        """Why a request is refused before its body is kept."""
        length = request.headers.get("Content-Length", "0" if request.method == "GET" else "")
        if not length:
            return Refusal(411, "the request must have a Content-Length")
        given = request.headers.get("Authorization", "").encode("latin-1")
        expected = given if self.token is None else f"Bearer {self.token}".encode()
        if not hmac.compare_digest(given, expected):
            return Refusal(401, "the token is missing or wrong")
        if int(length) > MAX_BODY_BYTES:
            most = f"{MAX_BODY_BYTES} (send fewer images at once)"
            return Refusal(413, f"the request has {length} bytes; must be at most {most}")
        return None

    async def _health(self, request: Request, body: bytes) -> dict[str, Any]:
        checks = hasattr(self.reward, "check")
        return {"version": VERSION, "name": self.name, "checks": checks}

    async def _check(self, request: Request, body: bytes) -> dict[str, Any]:
        prompts, metadata = await run_in_threadpool(read_check, body)
        check = getattr(self.reward, "check", lambda *_: None)
        try:
            await self._in_turn(request, lambda: check(prompts, metadata))
        except UserError as error:
            return {"problem": str(error)}
        return {"problem": None}

    async def _score(self, request: Request, body: bytes) -> dict[str, Any]:
        images, prompts, metadata = await run_in_threadpool(read_score, body, self.max_batch)
        request.state.images = len(images)

        def scores() -> list[float]:
            here = images.to(self.device)
            return score(self.name, self.reward, here, prompts, metadata, None).tolist()

        return {"scores": await self._in_turn(request, scores)}

    async def _in_turn(self, request: Request, function: Callable[[], _Result]) -> _Result:
        """Call it once the reward is free, if somebody still waits for the answer."""
        # uvicorn stops reading after a large body; this lets it read on, and notice who leaves.
        await request.is_disconnected()
        async with self._turn:
            if self.should_exit:
                raise Refusal(503, "the server is stopping")
            if await request.is_disconnected():
                raise Refusal(408, "the client did not wait")
            return await run_in_threadpool(function)


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
        options: of the reward, as in a configuration.
        host: the address to listen on; "0.0.0.0" lets other machines in.
        port: 0 lets the system choose.
        token_env: the environment variable with the token that clients must send.
        device: where the reward gets its images; "auto" is the accelerator, if there is one.

    Raises:
        UserError: the reward, its options, the token, the device or the address cannot be used.
    """
    token = None if token_env is None else read_token(token_env)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # An address in use is refused before a model is loaded; nobody is listened to until then.
        with _usable(host, port):
            listener.bind((host, port))
        place = str(usable_device(device, "--device"))
        reward = load_reward(reward_name, options)
        with _usable(host, port):
            listener.listen()
        server = RewardServer(
            listener, reward_name, reward, token=token, max_batch=max_batch, device=place
        )
        server.run([listener])
    signal.setitimer(signal.ITIMER_REAL, 0)
    print("stopped", flush=True)


@contextmanager
def _usable(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except (OSError, OverflowError) as error:
        raise UserError(f"--host and --port: cannot listen on {host}:{port} ({error})") from error

"""Servers that the tests of remote rewards ask: ours, and one that answers as it is told."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from treegrpo.rewards.server import RewardServer

PATIENCE = 120.0  # seconds; reached only where a test fails


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

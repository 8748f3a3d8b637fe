"""Asking a server: JSON in and out, several requests at once, patience while it is away.

What may pass (no connection, silence, HTTP 408, 425, 429, 500, 502 and above) is tried again after
waits that double, up to a limit, which is short for a server that has never answered: its address
may be mistyped. What will not pass (a refused token, an unknown address, an answer that makes no
sense) is an error at once.

Left out: what is asked (`remote.py`, `vlm_judge.py`). A library for retries would give the loop
alone: when to stop, how long to wait and what to say are all our own.
"""

from __future__ import annotations

import json
import logging
import os
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2

from treegrpo.errors import UserError

FIRST_WAIT = 0.5  # seconds; doubles with every attempt
LONGEST_WAIT = 15.0
CONNECT_SECONDS = 10.0  # a host that is down may not even refuse
# So long a request is waited for before the server's first answer.
FIRST_ANSWER_SECONDS = 5.0
MAX_ANSWER_BYTES = 64 * 2**20
NO_TLS = {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"}
PASSING = (
    httpx2.TimeoutException,
    httpx2.NetworkError,
    httpx2.RemoteProtocolError,
    httpx2.ProxyError,
)
# A server that answers 500 is there, and its fault is often the same each time.
ATTEMPTS_AT_500 = 5
# Rate limits are everyday; they are worth a line where they hold up a request for so long.
BUSY_SECONDS = 10.0

_log = logging.getLogger(__name__)
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class ServerError(RuntimeError):
    """A server gave no answer for too long, refused, or answered nonsense."""

    status: int | None = None  # of a refusal


@dataclass(frozen=True)
class _Fault:
    """Why an attempt failed where another may succeed."""

    text: str
    status: int | None = None
    retry_after: float = 0.0
    is_reached: bool = False  # it is there, if slow or busy


class Endpoint:
    """One server, asked from several threads at once.

    Args:
        kind: what it is in messages, such as "reward server".
        headers: sent with every request. Not for secrets: a configuration holds them.
        token_env: the environment variable with a secret.
        token_header: the header that takes it, after "Bearer" if it is Authorization.
        timeout_seconds: of silence, after which an attempt has failed.
        give_up_after_seconds: after a request's first failure no attempt begins later than this. A
            server that has not answered yet is given up after `FIRST_ANSWER_SECONDS` at most.
        concurrency: requests at once.

    Raises:
        UserError: names the option that cannot be used.
    """

    def __init__(
        self,
        kind: str,
        url: str,
        *,
        headers: Mapping[str, str] | None,
        token_env: str | None,
        token_header: str,
        timeout_seconds: float,
        give_up_after_seconds: float,
        concurrency: int,
    ) -> None:
        check_number("timeout_seconds", timeout_seconds, above=0)
        check_number("give_up_after_seconds", give_up_after_seconds, minimum=0)
        check_number("concurrency", concurrency, minimum=1, whole=True)
        self.kind = kind
        self.url = _checked_url(url)
        self._give_up_after = give_up_after_seconds
        self._token = None if token_env is None else read_token(token_env)
        sent = _checked_headers(headers or {})
        _check_header_name("token_header", token_header)
        if self._token is not None:
            is_bearer = token_header.lower() == "authorization"
            sent[token_header] = f"Bearer {self._token}" if is_bearer else self._token
        self._attempt_seconds = timeout_seconds + give_up_after_seconds
        self._short = httpx2.Timeout(min(timeout_seconds, CONNECT_SECONDS))
        self._client = httpx2.Client(
            headers=sent,
            timeout=httpx2.Timeout(timeout_seconds, connect=self._short.connect),
            limits=httpx2.Limits(max_keepalive_connections=concurrency),
        )
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="reward-requests")
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._has_answered = False
        self._waiting: set[int] = set()  # threads whose request the server does not answer
        self._outage_start = 0.0

    def map(self, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
        """`function` of every item, several at once; the first failure ends it."""
        futures = [self._pool.submit(function, item) for item in items]
        try:
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """Let requests that wait for the server fail now, so that the process can end."""
        self._closed.set()

    def request(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        """Send a request, with patience, and return the JSON object that answers it."""
        address = self.url + path
        content = None if body is None else json.dumps(body, allow_nan=False).encode()
        attempts = failures_500 = 0
        begin, since = time.monotonic(), 0.0
        answered = False
        try:
            while True:
                self._check_open()
                answer = self._attempt(method, address, content)
                if not isinstance(answer, _Fault):
                    answered = self._has_answered = True
                    return answer
                attempts += 1
                now = time.monotonic()
                since = since or now
                failures_500 = failures_500 + 1 if answer.status == 500 else 0
                left = self._give_up_after - (now - since)
                if not (self._has_answered or answer.is_reached):
                    left = min(left, FIRST_ANSWER_SECONDS - (now - begin))
                if failures_500 == ATTEMPTS_AT_500:
                    raise ServerError(f"{answer.text} (the last of {attempts} attempts)")
                if left <= 0:
                    raise ServerError(
                        f"{self.kind} {self.url} did not answer for {now - begin:.0f} s "
                        f"({attempts} attempts); last fault: {answer.text}"
                    )
                if answer.status != 429 or now - since >= BUSY_SECONDS:
                    self._announce(answer.text, left)
                # Beyond 2**20 the power only overflows.
                wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** min(attempts - 1, 20))
                self._closed.wait(min(left, max(wait, answer.retry_after)))
        finally:
            self._end_of_wait(answered)

    def _attempt(self, method: str, address: str, content: bytes | None) -> dict[str, Any] | _Fault:
        what = f"{method} {address}"
        try:
            status, received, text = self._exchange(method, address, content)
        except httpx2.RequestError as error:
            text = f"{what}: {type(error).__name__}: {self._shown(str(error))}"
            if not isinstance(error, PASSING) or _is_encryption_fault(error):
                raise ServerError(text) from error
            # A question takes time, above all the first one.
            is_slow = method == "POST" and isinstance(error, httpx2.ReadTimeout)
            return _Fault(text, is_reached=is_slow)
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            answer = None
        told = answer.get("error") if isinstance(answer, dict) else None
        if status != 200 or told:
            said = f"{what} answered HTTP {status}: {self._shown(_reason(answer, text))}"
            if status == 200 and isinstance(told, dict) and isinstance(told.get("code"), int):
                status = told["code"]  # a gateway passes on what another server answered
            if status in (408, 425, 429, 500) or status >= 502:
                # The header's other form, a date, is not worth a clock's trust.
                seconds = received.get("Retry-After", "")
                pause = float(seconds) if re.fullmatch(r"\d{1,6}", seconds) else 0.0
                is_reached = pause > 0 or status in (408, 425, 429, 500)
                return _Fault(said, status, pause, is_reached)
            if status in (401, 403) and self._token is None:
                said += " (token_env names the environment variable with a token)"
            if 300 <= status < 400:
                said += f" (redirected to {received.get('Location')})"
            refusal = ServerError(said)
            refusal.status = status
            raise refusal
        if not isinstance(answer, dict):
            raise ServerError(f"{what} answered no JSON object: {self._shown(text or '(nothing)')}")
        return answer

    def _exchange(
        self, method: str, address: str, content: bytes | None
    ) -> tuple[int, Mapping[str, str], str]:
        """Status, headers and text of the answer; one that never ends is broken off."""
        headers = {} if content is None else {"Content-Type": "application/json"}
        deadline = time.monotonic() + self._attempt_seconds
        received = bytearray()
        # A GET asks whether the server is there.
        patience = self._short if method == "GET" else self._client.timeout
        with self._client.stream(
            method, address, content=content, headers=headers, timeout=patience
        ) as response:
            for part in response.iter_bytes():
                received += part
                self._check_open()
                if len(received) > MAX_ANSWER_BYTES:
                    most = f"{MAX_ANSWER_BYTES:,} bytes"
                    raise ServerError(f"{method} {address} answered more than {most}")
                if time.monotonic() > deadline:
                    raise ServerError(
                        f"{method} {address} was still answering after "
                        f"{self._attempt_seconds:.0f} s (timeout_seconds + give_up_after_seconds)"
                    )
            text = received.decode(response.encoding or "utf-8", "replace")
            return response.status_code, response.headers, text

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise ServerError(f"{self.kind} {self.url}: no longer asked, it was closed")

    def _announce(self, fault: str, left: float) -> None:
        """Say once per outage that requests wait."""
        with self._lock:
            if not self._waiting:
                self._outage_start = time.monotonic()
                told = "%s %s does not answer, retrying for up to %.0f s (%s)"
                _log.warning(told, self.kind, self.url, left, fault)
            self._waiting.add(threading.get_ident())

    def _end_of_wait(self, answered: bool) -> None:
        with self._lock:
            if threading.get_ident() not in self._waiting:
                return
            self._waiting.remove(threading.get_ident())
            if answered and not self._waiting:
                seconds = time.monotonic() - self._outage_start
                _log.warning("%s %s answers again after %.0f s", self.kind, self.url, seconds)

    def _shown(self, text: str) -> str:
        """An excerpt on one line, without the token, which some servers echo."""
        if self._token is not None:
            text = text.replace(self._token, "***")
        text = " ".join(text.split())
        return text if len(text) <= 600 else text[:597] + "..."


def check_number(
    option: str,
    value: object,
    *,
    minimum: float | None = None,
    above: float | None = None,
    whole: bool = False,
) -> None:
    """Refuse, with a UserError, an option that is not a number in its range."""
    allowed = "a whole number" if whole else "a number"
    kinds = (int,) if whole else (int, float)
    fits = isinstance(value, kinds) and not isinstance(value, bool) and abs(value) < float("inf")
    if minimum is not None:
        allowed += f" of at least {minimum}"
        fits = fits and value >= minimum  # type: ignore[operator]
    if above is not None:
        allowed += f" greater than {above}"
        fits = fits and value > above  # type: ignore[operator]
    if not fits:
        raise UserError(f"option {option}: got {value!r}; must be {allowed}")


def read_token(variable: str) -> str:
    """A secret from an environment variable; no message shows it.

    Raises:
        UserError: the variable is not set, or cannot be sent in a header.
    """
    token = os.environ.get(variable, "").strip()
    if not token:
        raise UserError(f"option token_env: the environment variable {variable} is not set")
    if not re.fullmatch(r"[!-~]+", token):
        raise UserError(
            f"option token_env: the value of {variable} must be printable ASCII without spaces"
        )
    return token


def _checked_url(url: str) -> str:
    if not isinstance(url, str):
        raise UserError(f"option url: got {url!r}; must be a string")
    if re.match(r"[^/]*//[^/]*@", url):
        raise UserError(
            "option url: it holds a user name or password, which would be written into the run's "
            "folder; put a token into an environment variable and name it in token_env"
        )
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        httpx2.URL(url)
    except (ValueError, httpx2.InvalidURL) as error:
        raise UserError(f"option url: got {url!r}, which is no address ({error})") from error
    if not usable or parts.query or parts.fragment:
        raise UserError(f"option url: got {url!r}; must be http://host:port or https://host/path")
    return url.rstrip("/")


def _checked_headers(headers: Mapping[str, str]) -> dict[str, str]:
    if not isinstance(headers, Mapping):
        raise UserError(f"option headers: got {type(headers).__name__}; must be a mapping")
    for name, value in headers.items():
        _check_header_name("headers", name)
        if name.lower() in ("authorization", "proxy-authorization", "cookie"):
            raise UserError(
                f"option headers: {name} would be written into the run's folder; put the token "
                "into an environment variable and name it in token_env"
            )
        if not isinstance(value, str) or not re.fullmatch(r"[ -~]*", value):
            raise UserError(f"option headers: {name} must be a string of printable ASCII")
    return dict(headers)


def _check_header_name(option: str, name: object) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.ASCII):
        raise UserError(f"option {option}: got the name {name!r}, which is none of a header")


def _is_encryption_fault(error: BaseException | None) -> bool:
    """Whether the server's certificate is wrong, or there is no TLS at all on that port."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError) or (
            isinstance(error, ssl.SSLError) and error.reason in NO_TLS
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def _reason(answer: object, text: str) -> str:
    """What an error response says, in our own format, in OpenAI's, or in any other."""
    error = answer.get("error") if isinstance(answer, dict) else None
    if isinstance(error, dict):
        error = error.get("message")
    return error if isinstance(error, str) and error else text or "(no body)"

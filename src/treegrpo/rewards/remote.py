"""A reward on another machine, asked by HTTP.

Left out: the protocol (`protocol.py`), patience (`http.py`) and the server (`server.py`).
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from treegrpo.errors import UserError
from treegrpo.rewards.http import Endpoint, ServerError, check_number
from treegrpo.rewards.protocol import VERSION, to_pixels, to_png
from treegrpo.rewards.registry import Metadata

if TYPE_CHECKING:
    from torch import Tensor

PROMPTS_PER_CHECK = 10_000


class Remote:
    """A reward that a server computes.

    It is sent 8-bit pictures: a reward that is given pictures of that precision scores the same
    on either side, to the last bit.

    Args:
        url: the server's address, without `/score`.
        timeout_seconds: of silence; requests that wait for others at the server are silent, too.
        batch_size: images per request.

    The other options are those of `Endpoint`, with which it refuses what cannot be used.
    """

    concurrent = True

    def __init__(
        self,
        url: str,
        headers: dict[str, str] | None = None,
        token_env: str | None = None,
        token_header: str = "Authorization",
        timeout_seconds: float = 60.0,
        give_up_after_seconds: float = 600.0,
        batch_size: int = 32,
        concurrency: int = 4,
    ) -> None:
        check_number("batch_size", batch_size, minimum=1, whole=True)
        self._batch_size = batch_size
        self._endpoint = Endpoint(
            "reward server",
            url,
            headers=headers,
            token_env=token_env,
            token_header=token_header,
            timeout_seconds=timeout_seconds,
            give_up_after_seconds=give_up_after_seconds,
            concurrency=concurrency,
        )

    def __call__(self, images: Tensor, prompts: list[str], metadata: Metadata) -> list[float]:
        """Scores [N] of images, float [N, 3, H, W] in [0, 1]."""
        pixels = to_pixels(images)

        def ask(start: int) -> list[float]:
            part = slice(start, start + self._batch_size)
            question = _described(prompts, metadata, part)
            question["images"] = [to_png(image) for image in pixels[part]]
            answer = self._endpoint.request("POST", "/score", question)
            return self._checked(answer, prompts[part])

        parts = self._endpoint.map(ask, range(0, len(pixels), self._batch_size))
        return [score for part in parts for score in part]

    def reach(self) -> dict[str, Any]:
        """What the server says of itself.

        Raises:
            UserError: it is not there, refuses the token or speaks another version.
        """
        try:
            health = self._endpoint.request("GET", "/health")
        except ServerError as error:
            raise UserError(str(error)) from error
        if health.get("version") != VERSION:
            raise UserError(
                f"reward server {self._endpoint.url} speaks version {health.get('version')!r} of "
                f"the protocol; must be {VERSION}"
            )
        return health

    def check(self, prompts: list[str], metadata: Metadata) -> None:
        """`reach` the server, and make sure that it can score all prompts.

        Raises:
            UserError: it cannot, or metadata cannot be written as JSON; or as `reach`.
        """
        for prompt, described in zip(prompts, metadata or [], strict=False):
            try:
                json.dumps(described, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"the metadata of the prompt {prompt!r} cannot be sent as JSON ({error})"
                ) from error
        has_check = self.reach().get("checks")
        try:
            checked = range(0, len(prompts), PROMPTS_PER_CHECK) if has_check else ()
            for start in checked:
                part = slice(start, start + PROMPTS_PER_CHECK)
                question = _described(prompts, metadata, part)
                problem = self._endpoint.request("POST", "/check", question).get("problem")
                if problem is not None:
                    raise UserError(f"reward server {self._endpoint.url}: {problem}")
        except ServerError as error:
            raise UserError(str(error)) from error

    def close(self) -> None:
        """Stop waiting for the server: calls under way fail, and so do later ones."""
        self._endpoint.close()

    def _checked(self, answer: dict[str, Any], prompts: list[str]) -> list[float]:
        what = f"reward server {self._endpoint.url} answered"
        scores = answer.get("scores")
        if not isinstance(scores, list):
            raise ServerError(f'{what} without a list of "scores": it has {sorted(answer)}')
        if len(scores) != len(prompts):
            raise ServerError(f"{what} {len(scores)} scores for {len(prompts)} images")
        for score, prompt in zip(scores, prompts, strict=True):
            if isinstance(score, bool) or not isinstance(score, int | float):
                raise ServerError(f"{what} {score!r} for the prompt {prompt!r}: not a number")
            if not abs(score) <= sys.float_info.max:  # compares NaN and huge integers, too
                raise ServerError(f"{what} {score} for the prompt {prompt!r}: not finite")
        return scores


def _described(prompts: list[str], metadata: Metadata, part: slice) -> dict[str, Any]:
    """What a request says of its prompts."""
    of_part = None if metadata is None else metadata[part]
    return {"version": VERSION, "prompts": prompts[part], "metadata": of_part}

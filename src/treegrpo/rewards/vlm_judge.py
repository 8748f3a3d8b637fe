"""A vision-language model as the judge, behind any OpenAI-compatible `/chat/completions`.

Left out: other APIs, running the model here, and several pictures in one question.
"""

from __future__ import annotations

import json
import logging
import re
from typing import TYPE_CHECKING, Any

from treegrpo.errors import UserError
from treegrpo.rewards.http import Endpoint, ServerError, check_number
from treegrpo.rewards.protocol import to_pixels, to_png
from treegrpo.rewards.registry import Metadata

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

RUBRIC = """\
This image was generated for the description below. Judge how faithfully it shows what the \
description asks for: every object, its count, its color and other attributes, the relations \
between objects, and any text. Only then consider how clear and well made it is.

Description: {prompt}

Score the image from 0 (shows nothing of it) to {scale} (shows all of it, without a fault).
Answer with one JSON object and nothing else: {"score": NUMBER}"""

REMINDER = 'Answer with one JSON object and nothing else: {"score": NUMBER}, from 0 to {scale}.'
REMINDERS = 2

_NUMBER = r"(?P<number>-?\d+(?:[.,]\d+)?)(?![\d.,]*\d)"
_OUT_OF = r"(?:\s*(?:/|out of)\s*(?P<scale>\d+(?:\.\d+)?))?"
# "score" or "rating", perhaps a remark in parentheses, then the number.
_LABEL = r"\b(?:score|rating)\b[\s\"'*_`]*(?:\([^()\n]*\))?[\s\"'*_`]*"
_STATED = re.compile(rf"{_LABEL}(?:[:=]|is\b)[\s\"'*_`:=]*{_NUMBER}{_OUT_OF}", re.IGNORECASE)
_MENTIONED = re.compile(rf"{_LABEL}(?:of)?[\s\"'*_`]*{_NUMBER}{_OUT_OF}", re.IGNORECASE)
_FRACTION = re.compile(
    rf"(?<![\d.,/]){_NUMBER}\s*(?:/|out of)\s*(?P<scale>\d+(?:\.\d+)?)", re.IGNORECASE
)
_BARE = re.compile(rf"[\s\"'*_`]*{_NUMBER}{_OUT_OF}[\s\"'*_`.]*")
# Two numbers of which neither is the score: 7-8, 7 to 8, 7 or 8.
_RANGE = re.compile(r"\d+(?:\.\d+)?\s*(?:-|\u2013|\u2014|~|to\b|or\b|and\b)\s*\d+(?:\.\d+)?")

_log = logging.getLogger(__name__)


class NoScore(ServerError):
    """The judge's answers hold no score."""


class VLMJudge:
    """Asks a vision-language model to score each image; the score is divided by `scale`.

    Args:
        url: the API's base, as OpenAI clients take it, such as `http://host:8000/v1`.
        model: the model's name at that API.
        rubric: what is asked, with `{prompt}` where the image's prompt goes and, if wanted,
            `{scale}`. It must ask for a number.
        token_header: the header that takes the key of `token_env` (Azure's is "api-key").
        scale: the rubric's highest score; the lowest is 0.
        fallback_score: what an image gets, from 0 to `scale`, for which there is no score: the
            judge gives none, or the API refuses the image (HTTP 400, as content filters do). None:
            the run stops.
        temperature, max_tokens: of the answer; None leaves them to the API.
        extra_body: more fields of the request, or others for those that it has.

    The other options are those of `Endpoint`, with which it refuses what cannot be used.
    """

    concurrent = True

    def __init__(
        self,
        url: str,
        model: str,
        rubric: str = RUBRIC,
        headers: dict[str, str] | None = None,
        token_env: str | None = None,
        token_header: str = "Authorization",
        scale: float = 10.0,
        fallback_score: float | None = None,
        temperature: float | None = 0.0,
        max_tokens: int | None = 256,
        extra_body: dict[str, Any] | None = None,
        timeout_seconds: float = 60.0,
        give_up_after_seconds: float = 600.0,
        concurrency: int = 8,
    ) -> None:
        check_number("scale", scale, above=0)
        if fallback_score is not None:
            check_number("fallback_score", fallback_score, minimum=0)
            if fallback_score > scale:
                raise UserError(
                    f"option fallback_score: got {fallback_score}; must be at most scale ({scale})"
                )
        if not isinstance(model, str) or not model:
            raise UserError(f"option model: got {model!r}; must be the name of a model")
        if temperature is not None:
            check_number("temperature", temperature, minimum=0)
        if max_tokens is not None:
            check_number("max_tokens", max_tokens, minimum=1, whole=True)
        if not isinstance(rubric, str) or "{prompt}" not in rubric:
            raise UserError("option rubric: must hold {prompt} where the image's prompt goes")
        if not isinstance(extra_body, dict | None):
            raise UserError(f"option extra_body: got {extra_body!r}; must be a mapping")
        try:
            json.dumps(extra_body, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"option extra_body: cannot be sent as JSON ({error})") from error
        self._scale, self._fallback_score = scale, fallback_score
        self._rubric = rubric.replace("{scale}", f"{scale:g}")
        self._reminder = REMINDER.replace("{scale}", f"{scale:g}")
        settings = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
        settings |= extra_body or {}
        self._settings = {name: value for name, value in settings.items() if value is not None}
        self._endpoint = Endpoint(
            "judge",
            url,
            headers=headers,
            token_env=token_env,
            token_header=token_header,
            timeout_seconds=timeout_seconds,
            give_up_after_seconds=give_up_after_seconds,
            concurrency=concurrency,
        )

    def __call__(self, images: Tensor, prompts: list[str], metadata: Metadata) -> list[float]:
        """Scores in [0, 1] of images, float [N, 3, H, W] in [0, 1]; metadata is not used."""
        pairs = zip(to_pixels(images), prompts, strict=True)
        return self._endpoint.map(lambda pair: self._judge_or_fall_back(*pair), pairs)

    def reach(self) -> None:
        """`check`, before there are prompts."""
        self.check([], None)

    def check(self, prompts: list[str], metadata: Metadata) -> None:
        """Judge one gray picture: a wrong address, key or model shows before any sampling."""
        import numpy as np

        gray = np.full((64, 64, 3), 128, np.uint8)
        try:
            self._judge(gray, prompts[0] if prompts else "a gray picture")
        except ServerError as error:
            raise UserError(str(error)) from error

    def close(self) -> None:
        """Stop waiting for the judge: calls under way fail, and so do later ones."""
        self._endpoint.close()

    def _judge_or_fall_back(self, pixels: NDArray[np.uint8], prompt: str) -> float:
        try:
            return self._judge(pixels, prompt)
        except ServerError as error:
            is_of_this_image = isinstance(error, NoScore) or error.status == 400
            if self._fallback_score is None or not is_of_this_image:
                raise
            _log.warning("%s; it gets the fallback_score, %g", error, self._fallback_score)
            return self._fallback_score / self._scale

    def _judge(self, pixels: NDArray[np.uint8], prompt: str) -> float:
        picture = {"url": f"data:image/png;base64,{to_png(pixels)}"}
        question = [
            {"type": "image_url", "image_url": picture},
            {"type": "text", "text": self._rubric.replace("{prompt}", prompt)},
        ]
        messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
        for _ in range(1 + REMINDERS):
            answer = self._endpoint.request(
                "POST", "/chat/completions", {**self._settings, "messages": messages}
            )
            text, reason = self._content(answer)
            score = parse_score(text, self._scale, cut_off=reason == "length")
            if score is not None:
                return score / self._scale
            # At temperature 0 the same question would get the same answer.
            if text:  # an empty turn is refused by some
                messages.append({"role": "assistant", "content": text})
            messages.append({"role": "user", "content": self._reminder})
        cut = " (cut off: raise max_tokens)" if reason == "length" else ""
        raise NoScore(
            f"judge {self._endpoint.url} gave no score from 0 to {self._scale:g} for the prompt "
            f"{prompt!r} in {1 + REMINDERS} answers; the last one{cut}: {text[:600]!r}"
        )

    def _content(self, answer: dict[str, Any]) -> tuple[str, str | None]:
        """The text of an answer, and why it ended."""
        try:
            choice = answer["choices"][0]
            text = choice["message"].get("content") or choice["message"].get("refusal") or ""
            if isinstance(text, list):  # in parts, of which reasoning is none of the answer
                text = "".join(part["text"] for part in text if part["type"] == "text")
            if not isinstance(text, str):
                raise TypeError
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ServerError(
                f"judge {self._endpoint.url} answered no chat completion: "
                f"{json.dumps(answer)[:600]}"
            ) from error
        return text, choice.get("finish_reason")


def parse_score(text: str, scale: float, *, cut_off: bool = False) -> float | None:
    """The score in a judge's answer: from 0 to `scale`, or None where it is not plain.

    In this order it understands a JSON object with a "score", a number alone, `Score: 7/10` or "the
    score is 7", "a score of 7" (where all that are mentioned agree) and `7 out of 10`, with
    Markdown or reasoning around. Where a form occurs several times, the last one counts; a range is
    no score. In an answer that was `cut_off`, only a JSON object is sure to be whole.
    """
    text = text.rpartition("</think>")[2]
    objects = _json_scores(text)
    if objects:
        found = objects[-1]
        return float(found) if 0 <= found <= scale else None
    if cut_off:
        return None
    if bare := _BARE.fullmatch(text):
        return _value(bare, scale)
    ranges = [match.span() for match in _RANGE.finditer(text)]
    for pattern in (_STATED, _MENTIONED, _FRACTION):
        matches = list(pattern.finditer(text))
        if matches:
            last = matches[-1]
            if any(start < last.end() and last.start("number") < end for start, end in ranges):
                return None
            if pattern is _MENTIONED and len({match["number"] for match in matches}) > 1:
                return None
            return _value(last, scale)
    return None


def _json_scores(text: str) -> list[float]:
    """The "score" of each JSON object in a text."""
    decoder, scores, place = json.JSONDecoder(), [], text.find("{")
    while place >= 0:
        end = place + 1
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            value = None
        score = value.get("score") if isinstance(value, dict) else None
        if isinstance(score, str) and (match := _BARE.fullmatch(score)):
            score = float(match["number"].replace(",", "."))
        if isinstance(score, int | float) and not isinstance(score, bool):
            scores.append(score)
        place = text.find("{", end)
    return scores


def _value(match: re.Match[str], scale: float) -> float | None:
    """The number of a match, unless it lies outside the scale or names another one."""
    score, stated = float(match["number"].replace(",", ".")), match["scale"]
    fits = 0 <= score <= scale and (stated is None or float(stated) == scale)
    return score if fits else None

"""A vision-language model as the judge: what it is asked, and which answers are scores."""

from __future__ import annotations

import json
from base64 import b64decode
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reward_servers import (
    Behavior,
    ScriptedHandler,
    gray,
    says,
    scripted,
)

from treegrpo.errors import UserError
from treegrpo.rewards.http import ServerError
from treegrpo.rewards.vlm_judge import VLMJudge, parse_score

pytestmark = pytest.mark.usefixtures("quick_retries")


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

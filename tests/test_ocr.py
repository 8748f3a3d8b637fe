"""The text reward: which text is asked for, what a misread letter costs, and reading pictures."""

from __future__ import annotations

import itertools
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from treegrpo.errors import UserError
from treegrpo.rewards.ocr import OCR, comparable, distance, quoted_text


@pytest.fixture(scope="module")
def reward() -> OCR:
    return OCR(threads=2)


def picture(*lines: str) -> torch.Tensor:
    """Lines of text, one below the other: float [3, 256, 256] in [0, 1]."""
    path = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    font = ImageFont.truetype(str(path), 48)
    canvas = Image.new("RGB", (256, 256), "white")
    for row, line in enumerate(lines):
        ImageDraw.Draw(canvas).text((20, 20 + 75 * row), line, fill="black", font=font)
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1) / 255


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a poster that says "Grand Opening"', "Grand Opening"),
        ("a poster that says 'Grand Opening', at night", "Grand Opening"),
        ("a poster that says “Grand Opening”", "Grand Opening"),
        ("a poster that says \u2018Grand Opening\u2019", "Grand Opening"),
        ("a door with \"OPEN\", a door with 'CLOSED' and “EXIT”", "OPEN CLOSED EXIT"),
        ("a sign 'Don't Walk' that isn't lit", "Don't Walk"),
        ("a sign \u2018Don\u2019t Walk\u2019 that isn\u2019t lit", "Don\u2019t Walk"),
        ("a neon \"it's 5 o'clock\"", "it's 5 o'clock"),
        ("a '90s-style sign that says 'LIVE'", "LIVE"),
        ('a 12" record called "Blue" and a 7" one', "Blue"),
        ("the dogs' bowls and the cats' toys; they don't match", ""),
        ('an empty sign "" and half a "quote', ""),
    ],
)
def test_quoted_text(prompt: str, text: str) -> None:
    assert quoted_text(prompt) == text


def test_the_contraction_in_rock_n_roll_is_no_quote() -> None:
    assert quoted_text("""a rock 'n' roll poster that says "Loud\"""") == "Loud"


def test_distance_is_levenshteins_to_the_nearest_run_of_lines() -> None:
    def levenshtein(one: str, other: str) -> int:
        if not one or not other:
            return len(one) + len(other)
        return min(
            levenshtein(one[1:], other) + 1,
            levenshtein(one, other[1:]) + 1,
            levenshtein(one[1:], other[1:]) + (one[0] != other[0]),
        )

    rng = np.random.default_rng(0)
    for _ in range(60):
        lines = ["".join(rng.choice(list("abc"), rng.integers(0, 3))) for _ in range(3)]
        target = "".join(rng.choice(list("abc"), rng.integers(1, 6)))
        runs = ["".join(lines[i:j]) for i, j in itertools.combinations(range(4), 2)]
        expected = min(len(target), *(levenshtein(run, target) for run in runs))
        assert distance(lines, target) == expected
    assert distance(["kitten"], "sitting") == 3
    assert distance([], "abc") == 3
    assert distance(["something else entirely"], "abc") == 3


def test_case_space_and_typography_do_not_count() -> None:
    assert comparable(" Don\u2019t\tWALK\u2026\n") == comparable("DON'T walk...") == "don'twalk..."
    assert comparable("\uff2f\uff30\uff25\uff2e") == "open"  # full-width letters
    assert comparable("hill") != comparable("hi11")


def test_scores_of_rendered_text(reward: OCR) -> None:
    shop = picture("Fresh", "Bread", "Daily")
    cases = [
        (picture("House"), 'a sign "HOUSE"', {}, 1.0),
        (picture("House"), 'a sign "Hous"', {}, 3 / 4),  # Flow-GRPO's says 1
        (picture("Grand", "Opening"), 'a poster "Grand Opening"', {}, 1.0),
        (shop, 'a shop that sells "Bread", at dawn', {}, 1.0),
        (shop, '"Daily"', {"text": "Fresh Bead"}, 8 / 9),
        (picture(), 'a sign "House"', {}, 0.0),
        (torch.rand(3, 256, 256, generator=torch.Generator().manual_seed(0)), '"House"', {}, 0.0),
    ]
    images = torch.stack([image for image, *_ in cases])
    prompts = [prompt for _, prompt, *_ in cases]
    metadata = [entry for *_, entry, _ in cases]
    reward.check(prompts, metadata)
    together = reward(images, prompts, metadata)
    assert together == pytest.approx([expected for *_, expected in cases])
    assert reward(images[2:3], prompts[2:3], None) == together[2:3]


def test_the_reader_gets_rounded_pixels_with_blue_first(
    reward: OCR, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def read(picture: NDArray[np.uint8]) -> list[str]:
        seen.append(picture)
        return ["x"]

    monkeypatch.setattr(reward, "read", read)
    image = torch.tensor([0.5, 1.2, -0.1]).view(1, 3, 1, 1).expand(1, 3, 2, 5)
    assert reward(image, ['"X"'], None) == [1.0]
    assert seen[0].shape == (2, 5, 3) and seen[0].dtype == np.uint8
    assert seen[0][1, 4].tolist() == [0, 255, 128]


def test_prompts_without_text_are_named(reward: OCR) -> None:
    reward.check(["a cat", 'a "dog"'], [{"text": "cat"}, {}])
    for prompts, metadata, message in [
        (['a "dog"', "the cat's toy"], None, 'prompt "the cat\'s toy" asks for no text'),
        (['a "dog"'], [{"text": " "}], "prompt 'a \"dog\"' asks for no text"),
        (["a dog"], [{"text": 7}], "prompt 'a dog' has the metadata text 7; must be a string"),
    ]:
        with pytest.raises(UserError, match=message):
            reward.check(prompts, metadata)
    with pytest.raises(UserError, match="a cat"):
        reward(torch.zeros(1, 3, 32, 32), ["a cat"], None)


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("\u041f\u0440\u0438\u0432\u0435\u0442", "'\u0432', '\u0435', '\u0438'"),  # Cyrillic
        ("\u05e9\u05dc\u05d5\u05dd", "'\u05d5', '\u05dc'"),  # Hebrew
        ("\u0e44\u0e17\u0e22", "'\u0e17', '\u0e22'"),  # Thai
        ("Vi\u1ec7t Nam", "'\u1ec7'"),
        ("Vie\u0323\u0302t Nam", "'\u1ec7'"),  # the same in three signs
        ("Hi \U0001f98a", "'\U0001f98a'"),
    ],
)
def test_text_that_the_reader_cannot_read_is_refused(reward: OCR, text: str, unknown: str) -> None:
    prompt = f'a sign "{text}"'
    with pytest.raises(UserError) as caught:
        reward.check(['"Hello"', prompt], None)
    assert str(caught.value).startswith(f"the prompt {prompt!r} asks for text with ")
    assert unknown in str(caught.value)
    with pytest.raises(UserError, match="the reader's alphabet lacks"):
        reward.check(["a sign"], [{"text": text}])


def test_text_that_the_reader_can_read_is_not_refused(reward: OCR) -> None:
    texts = [
        "Hello World",
        "don\u2019t walk\u2026",
        "\uff2f\uff30\uff25\uff2e",
        "Stra\u00dfe",
        "caf\u00e9",
        "50% off!",
    ]
    texts += [
        "\u4e2d\u6587",
        "a-b_c/d\\e",
        "(x) [y] {z} <w>",
        "$5 & up @ #1 *",
        "\u20ac 3,50; 4:30?",
    ]
    reward.check(["a sign"] * len(texts), [{"text": text} for text in texts])


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match="option threads: 0 is not a positive integer"):
        OCR(threads=0)

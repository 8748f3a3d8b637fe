"""Pictures.

Left out: the page of `treegrpo evaluate` (`test_evaluate.py`), model cards (`test_model_card.py`).
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fontTools.fontBuilder import FontBuilder  # type: ignore[import-untyped]
from fontTools.pens.ttGlyphPen import TTGlyphPen  # type: ignore[import-untyped]
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.image import AxesImage
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image
from torch import Tensor

from treegrpo.plan import RolloutPlan, tree_grpo
from treegrpo.report import fonts, style
from treegrpo.report.curve import training_curve
from treegrpo.report.pictures import Headline, before_after, image_grid
from treegrpo.report.tree import advantage_color, draw_forest


def png_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        return image.size


def test_a_long_prompt_and_large_images_make_one_row(tmp_path: Path) -> None:
    prompt = "$a $ long \\prompt_{ " + "that goes on and on " * 20
    image_grid(tmp_path / "new" / "grid.png", [prompt], torch.rand(1, 3, 3, 600, 300))
    width, height = png_size(tmp_path / "new" / "grid.png")
    assert 1000 < width < 2000 and 400 < height < 1000


def test_before_after_frames_only_what_was_judged(tmp_path: Path) -> None:
    prompts, images = ["two red circles"], torch.full((1, 2, 3, 8, 8), 0.5)
    good, bad = (tuple(round(255 * part) for part in to_rgb(c)) for c in (style.GOOD, style.BAD))

    def colors(correct: Tensor | None) -> set[tuple[int, ...]]:
        path = tmp_path / "picture.png"
        before_after(path, prompts, images, images, None, correct)
        with Image.open(path) as picture:
            found = picture.convert("RGB").getcolors(1 << 24)
        assert found is not None
        # Whatever stands alone in the legend is too small to count.
        return {color for count, color in found if count > 1500}  # type: ignore[misc]

    assert not {good, bad} & colors(None)
    assert {good, bad} & colors(torch.tensor([[True, True]])) == {good}
    assert {good, bad} & colors(torch.tensor([[False, False]])) == {bad}


# --- texts have room ---

LONG = "A highly detailed photograph of an old lighthouse keeper reading a letter " * 3
CHINESE = "一只红色的狐狸坐在雪地里、背后是高山和落日"
WIDE = [CHINESE * 2, "a 🦊 under a 🌈", "눈 덮인 산"]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures that are drawn, in place of their files."""
    figures: list[Figure] = []
    monkeypatch.setattr(style, "save", lambda figure, path: figures.append(figure))
    return figures


def texts_and_images(figure: Figure) -> tuple[dict[str, Bbox], list[Bbox]]:
    """Where all texts and images stand, in pixels."""
    canvas: Any = FigureCanvasAgg(figure)
    with fonts.boxes_allowed():
        canvas.draw()
        renderer = canvas.get_renderer()
        # Those beyond an axis's limits are not drawn.
        of_axes = [text for axes in figure.axes for text in axes.get_xticklabels()]
        of_axes += [text for axes in figure.axes for text in axes.get_yticklabels()]
        texts = [text for text in figure.findobj(Text) if text.get_text() and text not in of_axes]
        places = {
            f"{number}: {text.get_text()}": text.get_window_extent(renderer)
            for number, text in enumerate(texts)
        }
    return places, [image.get_window_extent() for image in figure.findobj(AxesImage)]


def overlapping(figure: Figure) -> list[tuple[str, ...]]:
    """Texts that leave the page, or lie on an image or another text."""
    texts, images = texts_and_images(figure)
    page = figure.bbox
    found: list[tuple[str, ...]] = [
        (name, "leaves the page")
        for name, box in texts.items()
        if box.x0 < 0 or box.y0 < 0 or box.x1 > page.x1 or box.y1 > page.y1
    ]
    found += [(name, "an image") for name, box in texts.items() for i in images if i.overlaps(box)]
    pairs = itertools.combinations(texts.items(), 2)
    return found + [(one, other) for (one, a), (other, b) in pairs if _shared(a, b) > 2]


def _shared(a: Bbox, b: Bbox) -> float:
    """Pixels by which both directions overlap; boxes have some air around their letters."""
    return float(min(min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)))


@pytest.mark.parametrize("judged", [False, True])
@pytest.mark.parametrize(
    ("prompts", "images"),
    [
        ([LONG], (1, 8, 8)),
        (["a cat", LONG, *WIDE], (1, 8, 8)),
        (["a cat", LONG, *WIDE], (2, 8, 16)),
        (["a" * 200, LONG, "b"], (1, 16, 8)),
        (["a cat", LONG, *WIDE], (7, 8, 8)),
    ],
    ids=["one", "wide letters", "wide images", "one word", "many images"],
)
def test_before_and_after_have_room_on_the_page(
    drawn: list[Figure], prompts: list[str], images: tuple[int, ...], judged: bool
) -> None:
    count, height, width = images
    shape = (len(prompts), count, 3, height, width)
    correct = torch.ones(shape[:2], dtype=torch.bool) if judged else None
    headline = Headline(
        "mean my_package.my_rewards:a_long_name of 64 prompts", "-123456.789", "0.2954"
    )
    before_after(
        Path("picture.png"),
        prompts,
        torch.rand(shape),
        torch.rand(shape),
        correct,
        correct,
        label_after="after 23 h 59 min",
        headline=headline,
    )
    (figure,) = drawn
    assert not overlapping(figure)
    texts = " ".join(texts_and_images(figure)[0])
    for word in (headline.before, headline.after, "before training", "after 23 h 59 min"):
        assert word in texts


@pytest.mark.parametrize("text", ["a red circle and a blue square", CHINESE, "a" * 50, LONG])
def test_lines_are_as_wide_as_there_is_room(text: str) -> None:
    for room in (1.2, 1.3, 1.45, fonts.width(text[:12], 10) + 0.01):
        wrapped = fonts.wrap(text, 10, room, 100)
        lines = wrapped.split("\n")
        assert all(fonts.width(line, 10) <= room for line in lines)
        assert "".join(wrapped.split()) == "".join(text.split())
        assert len(lines) <= 1.4 * fonts.width(text, 10) / room + 1  # and mostly full
        assert "\n、" not in wrapped
    cut = fonts.wrap(text, 10, 1.3, 1)
    assert cut.endswith(" …") and fonts.width(cut, 10) <= 1.3


def test_letters_come_from_whatever_font_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    letters = [letter for letter in ("ꙮ", "𐤀", "字") if fonts.without_font(letter)]
    if not letters:
        pytest.skip("this machine has fonts for everything")
    letter = letters[0]
    assert fonts.families(f"a {letter}") == ["DejaVu Sans"]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "it"])
    builder.setupCharacterMap({ord(letter): "it"})
    pen = TTGlyphPen(None)
    for corner, at in zip(
        ("moveTo", "lineTo", "lineTo"), ((0, 0), (0, 700), (700, 0)), strict=True
    ):
        getattr(pen, corner)(at)
    pen.closePath()
    builder.setupGlyf({".notdef": pen.glyph(), "it": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (800, 0), "it": (800, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Just One", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=800, usWeightClass=400)
    builder.setupPost()
    builder.save(tmp_path / "one.ttf")
    caches = (fonts._family_of, fonts._families, fonts._installed, fonts._letters)
    monkeypatch.setattr(fontManager, "ttflist", [*fontManager.ttflist])
    # As if it had been installed after matplotlib had looked.
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: [str(tmp_path / "one.ttf")])
    for function in caches:
        function.cache_clear()
    try:
        assert fonts.families(f"a {letter}") == ["DejaVu Sans", "Just One"]
        assert fonts.without_font(letter) == []
    finally:
        for function in caches:
            function.cache_clear()


def test_letters_without_a_font_are_spoken_of(
    drawn: list[Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fonts, "_families", lambda: ["DejaVu Sans"])
    fonts._family_of.cache_clear()
    try:
        image_grid(Path("grid.png"), ["狐狸", "a 🦊", "สุนัข"], torch.rand(3, 2, 3, 8, 8))
    finally:
        fonts._family_of.cache_clear()
    (note,) = [name for name in texts_and_images(drawn[0])[0] if "No font" in name]
    assert "(Thai, CJK, symbols)" in note
    assert not overlapping(drawn[0])


@pytest.mark.parametrize(
    ("before", "after", "correct", "field"),
    [
        ((2, 2, 3, 8, 8), (1, 2, 3, 8, 8), (1, 2), "before"),
        ((1, 2, 3, 8, 8), (1, 3, 3, 8, 8), (1, 2), "after"),
        ((1, 2, 3, 8, 8), (1, 2, 3, 8, 8), (2, 1), "correct_before"),
        ((1, 0, 3, 8, 8), (1, 0, 3, 8, 8), (1, 0), "before"),
    ],
)
def test_before_after_refuses_shapes_that_do_not_fit(
    tmp_path: Path,
    before: tuple[int, ...],
    after: tuple[int, ...],
    correct: tuple[int, ...],
    field: str,
) -> None:
    with pytest.raises(ValueError, match=f"^{field}: got shape"):
        before_after(
            tmp_path / "picture.png",
            ["a red circle"],
            torch.zeros(before),
            torch.zeros(after),
            torch.ones(correct, dtype=torch.bool),
        )
    assert not (tmp_path / "picture.png").exists()


@pytest.mark.parametrize(
    "metrics",
    [
        [{"iteration": 1, "reward": 0.5}],
        [{"iteration": 1, "reward": 0.5, "ratio_max": 1.1}, {"iteration": 2, "reward": 0.6}],
        [
            {"iteration": i, "reward": 0.1 * i, "accuracy": 0.1 * i, "gradient_norm": float("nan")}
            for i in range(3)
        ],
    ],
)
def test_curve_leaves_out_what_is_missing(tmp_path: Path, metrics: list[dict[str, float]]) -> None:
    training_curve(tmp_path / "curve.png", metrics, [{"iteration": 0, "reward": 0.4}])
    assert png_size(tmp_path / "curve.png") == (1880, 1080)


def record(iteration: int, **changes: float) -> dict[str, float]:
    values = {
        "reward": 0.5 + 0.01 * iteration,
        "gradient_norm": 0.1,
        "reward_std_within_group": 0.2,
        "ratio_min": 1 - 1e-7,
        "ratio_mean": 1.0,
        "ratio_max": 1 + 1e-7,
        "clip_fraction": 0.0,
        "kl": 0.0,
        "learning_rate": 1e-4,
        "seconds": 60.0 if iteration == 0 else 2.5,
    }
    return {"iteration": iteration, **values, **changes}


ALWAYS = [
    "gradient norm",
    "learning rate",
    "seconds an iteration",
    "spread of rewards within a group",
]


@pytest.mark.parametrize(
    ("changes", "panels"),
    [
        ({}, []),
        ({"kl": 1e-5}, ["KL divergence from the initial model"]),
        ({"ratio_max": 1.1}, ["ratio of new to old policy, minus 1"]),
        ({"clip_fraction": 0.01}, ["share of clipped edges"]),
        ({"kl": math.nan}, []),
    ],
)
def test_the_curve_shows_panels_that_say_something(
    drawn: list[Figure], changes: dict[str, float], panels: Sequence[str]
) -> None:
    metrics = [record(iteration, **changes) for iteration in range(9)]
    training_curve(Path("curve.png"), metrics, [{"iteration": 0, "reward": 0.4}], {"x": True})
    (figure,) = drawn
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert sorted(titles) == sorted(["mean x", *ALWAYS, *panels])
    for axes in figure.axes:
        low, high = axes.get_ylim()
        assert high - low > 1e-5  # no axis of rounding errors
        if axes.get_title(loc="left") == "seconds an iteration":
            assert -0.1 * high < low < 0
            assert high == pytest.approx(5 * 2.5 * 1.15)  # not the first one's minute


@pytest.mark.parametrize(("count", "averaged"), [(1, False), (2, True), (1000, True)])
def test_the_curve_is_readable(drawn: list[Figure], count: int, averaged: bool) -> None:
    names = ["composition", "a_package.rewards:" + "long_name_" * 9, "x", "y", "z"]
    values = {f"reward_normalized/{name}": 0.3 for name in names}
    metrics = [
        record(iteration, accuracy=0.5, kl=0.1, clip_fraction=0.1, **values)
        for iteration in range(count)
    ]
    evaluations = [
        {"iteration": iteration, "reward": 0.2812, "reward_standard_error": 0.0012, "accuracy": 0.5}
        for iteration in (0, count)
    ]
    rewards = {name: name == names[0] for name in names}
    training_curve(Path("curve.png"), metrics, evaluations, rewards, averaged=averaged)
    (figure,) = drawn
    assert not overlapping(figure)
    texts = " ".join(texts_and_images(figure)[0])
    assert "0.2812 → 0.2812" in texts and "50% → 50%" in texts
    assert "sampled with noise from the weights as they are" in texts
    of = "the weights' moving average" if averaged else "the same weights"
    assert f"sampled without noise from {of}" in texts


def test_curve_without_rewards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reward"):
        training_curve(tmp_path / "curve.png", [{"iteration": 1, "gradient_norm": 1.0}])


def test_opposite_advantages_are_equally_far_from_grey_on_opposite_sides() -> None:
    neutral, good, bad = (torch.tensor(to_rgb(c)) for c in (style.NEUTRAL, style.GOOD, style.BAD))
    assert torch.equal(torch.tensor(advantage_color(0.0, 2.0)), neutral)
    assert torch.equal(torch.tensor(advantage_color(0.0, 0.0)), neutral)
    shares = []
    for advantage in (0.5, 1.0, 2.0, 3.0):
        up = (torch.tensor(advantage_color(advantage, 2.0)) - neutral) / (good - neutral)
        down = (torch.tensor(advantage_color(-advantage, 2.0)) - neutral) / (bad - neutral)
        torch.testing.assert_close(up, down)
        torch.testing.assert_close(up, up[:1].expand(3))
        shares.append(up[0].item())
    assert 0 < shares[0] < shares[1] < shares[2] == shares[3] == pytest.approx(1.0)


def forest(plan: RolloutPlan, levels: list[int]) -> dict[str, object]:
    return {
        "plan": plan,
        "images": {level: torch.rand(plan.widths[level], 3, 8, 12) for level in levels},
        "advantages": {step: torch.randn(plan.widths[step + 1]) for step in plan.stochastic_steps},
        "rewards": torch.rand(plan.leaves),
        "prompt": "a red circle",
        "sigmas": [1 - level / plan.steps for level in range(plan.steps + 1)],
    }


@pytest.mark.parametrize(
    ("plan", "levels"),
    [
        (tree_grpo(6, branching=2, window_size=2, window_start=1), [0, 1, 2, 3, 6]),
        (tree_grpo(4, branching=2, window_size=1, trees=2), [0, 4]),
        (tree_grpo(3, branching=2, window_size=2, window_start=1), [1, 3]),
    ],
)
def test_forests_of_every_form_are_drawn(
    tmp_path: Path, plan: RolloutPlan, levels: list[int]
) -> None:
    draw_forest(tmp_path / "tree.png", **forest(plan, levels))  # type: ignore[arg-type]
    width, height = png_size(tmp_path / "tree.png")
    assert 1500 < width < 2200 and 800 < height < 2200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("images", {0: torch.rand(1, 3, 8, 8)}),
        ("images", {0: torch.rand(2, 3, 8, 8), 3: torch.rand(2, 3, 8, 8)}),
        ("advantages", {}),
        ("advantages", {0: torch.zeros(3)}),
        ("rewards", torch.zeros(3)),
        ("sigmas", [1.0, 0.0]),
    ],
)
def test_a_forest_that_does_not_fit_its_plan_is_refused(
    tmp_path: Path, field: str, value: object
) -> None:
    arguments = forest(tree_grpo(3, branching=2, window_size=1), [0, 3])
    with pytest.raises(ValueError, match=f"^{field}"):
        draw_forest(tmp_path / "tree.png", **{**arguments, field: value})  # type: ignore[arg-type]

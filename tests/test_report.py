"""Pictures, and the model card.

Left out: the page of `treegrpo evaluate` (`test_evaluate.py`).
"""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml
from fontTools.fontBuilder import FontBuilder  # type: ignore[import-untyped]
from fontTools.pens.ttGlyphPen import TTGlyphPen  # type: ignore[import-untyped]
from huggingface_hub import ModelCard
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.image import AxesImage
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image
from torch import Tensor

from treegrpo.config import load_config
from treegrpo.evaluation.results import Figures
from treegrpo.models.policy import Policy
from treegrpo.plan import RolloutPlan, tree_grpo
from treegrpo.report import fonts, style
from treegrpo.report.curve import training_curve
from treegrpo.report.model_card import write_model_card
from treegrpo.report.pictures import Headline, before_after, image_grid
from treegrpo.report.run import TrainingResult
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


# --- the model card ---


def figures(before: float, after: float) -> Figures:
    change = after - before
    return Figures(after, 0.0123, before, 0.0234, change, 0.0346, 0.5, 0.01)


RESULT = TrainingResult(
    folder=Path(),
    before={"composition": 0.25, "composition_accuracy": 0.5},
    after={"composition": 0.75, "composition_accuracy": 0.53125},
    figures={
        "composition": figures(0.25, 0.75),
        "composition_accuracy": figures(0.5, 0.53125),
    },
    held_out=138,
    iterations=7,
    seconds=900.0,
    rollout_forwards=1234,
    update_forwards=56789,
    interrupted=False,
)


def card_of(folder: Path, result: TrainingResult, *changes: str, frames: int | None = None) -> str:
    said = SimpleNamespace(
        pipeline_name="APipeline",
        checkpoint=SimpleNamespace(index={}, folder=folder / "base"),
        call_settings=lambda: {"guidance_scale": 2.5},
        sampling=SimpleNamespace(frames=frames),
    )
    (folder / "model").mkdir(exist_ok=True)
    config = load_config(None, list(changes))
    write_model_card(folder / "model", config, cast(Policy, said), replace(result, folder=folder))
    return (folder / "model" / "README.md").read_text(encoding="utf-8")


def test_the_model_card_says_what_was_before_and_what_after(tmp_path: Path) -> None:
    (tmp_path / "before_after.png").write_bytes(b"a picture")
    card = card_of(tmp_path, RESULT)
    assert (
        """
| reward | before | after | change |
|---|---|---|---|
| composition | 0.250 ± 0.023 | 0.750 ± 0.012 | +0.500 ± 0.035 |
| composition_accuracy | 0.500 ± 0.023 | 0.531 ± 0.012 | +0.031 ± 0.035 |
"""
        in card
    )
    assert "On 138 prompts that it was not trained on, after 7 iterations:" in card
    rose = "the mean composition rose: from 0.250 ± 0.023 to 0.750 ± 0.012 (+0.500 ± 0.035)"
    assert rose in card
    assert "the mean composition_accuracy rose" not in card  # it was only watched
    assert "15 min, 1,234 forwards to sample, 56,789 to update" in card
    assert "(APipeline)" in card and "guidance_scale=2.5" in card
    assert "![The same prompts and noises before and after training](before_after.png)" in card
    assert (tmp_path / "model" / "before_after.png").read_bytes() == b"a picture"
    # What is within two standard errors may be chance.
    small = replace(RESULT, figures=RESULT.figures | {"composition": figures(0.5, 0.53125)})
    assert "composition did not change by more than chance would" in card_of(tmp_path, small)
    none = Figures(0.5, 0.0, 0.5, 0.0, 0.0, 0.0)
    same = replace(RESULT, figures=RESULT.figures | {"composition": none})
    assert "composition did not change: from 0.5000 to 0.5000 (+0.0000)" in card_of(tmp_path, same)


def test_the_model_card_has_the_header_that_hubs_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    header = "license: other\nlicense_name: a-licence\nlicense_link: LICENSE.md"
    (tmp_path / "base" / "README.md").write_text(f"---\n{header}\n---\n# A model\n")
    lora = ("model.lora_rank=4", "rollout.method=flow_grpo")
    card_of(tmp_path, RESULT, "model.path=someone/a-model", *lora)
    data = ModelCard.load(tmp_path / "model" / "README.md").data.to_dict()
    assert data == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["treegrpo", "reinforcement-learning", "flow_grpo", "lora"],
        "license": "other",
        "license_name": "a-licence",
        "license_link": "https://huggingface.co/someone/a-model/blob/main/LICENSE.md",
        "base_model": "someone/a-model",
        "base_model_relation": "adapter",
    }
    # A folder is no name of a hub, and a card without a licence gives none.
    (tmp_path / "base" / "README.md").write_text("# A model\n")
    card_of(tmp_path, RESULT, f"model.path={tmp_path / 'base'}", frames=5)
    assert ModelCard.load(tmp_path / "model" / "README.md").data.to_dict() == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-video",
        "tags": ["treegrpo", "reinforcement-learning", "tree_grpo"],
    }


@pytest.mark.parametrize("lora", [0, 4])
def test_the_model_card_holds_nothing_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: int
) -> None:
    monkeypatch.chdir(tmp_path)
    secret = tmp_path / "secret"
    for name in ("a-base", "cache", "weights"):
        (secret / name).mkdir(parents=True)
    (secret / "prompts.txt").write_text("a red circle\n")
    server = {
        "name": "http://10.0.0.7:8000",
        "weight": 0,
        "options": {"headers": {"Authorization": "hidden"}, "token_env": "HIDDEN"},
    }
    keeps = "toy_rewards:Keeps"
    own = {"name": keeps, "options": {"path": str(secret / "weights"), "digits": 3}}
    card = card_of(
        tmp_path,
        replace(RESULT, figures=dict.fromkeys((keeps, "http://10.0.0.7:8000"), figures(0, 1))),
        f"model.path={secret / 'a-base'}",
        f"model.lora_rank={lora}",
        f"model.embedding_cache={secret / 'cache'}",
        "prompts.train=secret/prompts.txt",
        f"rewards={json.dumps([own, server])}",
        f"output={secret / 'runs' / 'x'}",
    )
    for word in ("secret", str(tmp_path), "10.0.0.7", "hidden", "HIDDEN"):
        assert word not in card
    configuration = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert configuration["model"]["path"] == "a-base"
    assert configuration["prompts"]["train"] == "prompts.txt"
    assert configuration["rewards"][0]["options"] == {"path": "weights", "digits": 3}
    assert configuration["rewards"][1]["name"] == "a server"
    assert "toy_rewards:Keeps" in card
    assert ("FOLDER_OF_THE_BASE_MODEL" in card) == bool(lora)

"""The rewards against rendered ground truth, and the checks around a reward that misbehaves."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch.nn import functional
from transformers import CLIPImageProcessorPil

from treegrpo.errors import UserError
from treegrpo.images import as_pictures, resized, to_uint8
from treegrpo.miniature.scenes import (
    BACKGROUND,
    COLORS,
    SHAPES,
    Composition,
    PlacedShape,
    all_compositions,
    corruptions,
    inside,
    place,
    render,
)
from treegrpo.rewards import (
    BUILT_IN,
    Reward,
    RewardError,
    check_reward,
    image_reward,
    load_reward,
    score,
)
from treegrpo.rewards.clip_models import process_pictures
from treegrpo.rewards.composition import (
    composition,
    composition_accuracy,
    detect,
    shape_overlap,
    signed_distance,
)
from treegrpo.rewards.jpeg import jpeg_compressibility, jpeg_incompressibility

SCENES = 2000


@pytest.fixture(scope="module")
def truth() -> tuple[list[Composition], torch.Tensor]:
    """Right pictures of prompts, an equal number of every kind."""
    rng = np.random.default_rng(0)
    pools: dict[str, list[Composition]] = {}
    for one in all_compositions():
        pools.setdefault(one.kind, []).append(one)
    assert set(pools) == {"count", "binding", "relation", "mixed"}
    shown = [
        pool[rng.integers(len(pool))]
        for pool in pools.values()
        for _ in range(SCENES // len(pools))
    ]
    return shown, torch.from_numpy(np.stack([render(place(one, rng)) for one in shown]))


def prompts_of(compositions: list[Composition]) -> list[str]:
    return [one.prompt for one in compositions]


def draw(*scene: PlacedShape) -> torch.Tensor:
    return torch.from_numpy(render(list(scene)))[None]


def test_right_pictures_are_accepted(truth: tuple[list[Composition], torch.Tensor]) -> None:
    shown, images = truth
    assert composition_accuracy(images, prompts_of(shown), None).tolist() == [1.0] * SCENES
    assert composition(images, prompts_of(shown), None).tolist() == [1.0] * SCENES


def test_every_wrong_attribute_is_noticed(truth: tuple[list[Composition], torch.Tensor]) -> None:
    shown, images = truth
    chosen = range(0, SCENES, 6)
    wrong = [(index, other) for index in chosen for other in corruptions(shown[index])]
    batch = images[[index for index, _ in wrong]]
    prompts = prompts_of([other for _, other in wrong])
    assert {other.kind for _, other in wrong} == {"count", "binding", "relation", "mixed"}
    assert composition_accuracy(batch, prompts, None).max() == 0
    graded = composition(batch, prompts, None)
    # One attribute is wrong, so most is right: the signal that training climbs on.
    assert graded.min() >= 0.25 and graded.max() < 1


@pytest.mark.parametrize("change", ["blur and noise", "48 pixels", "64 pixels", "128 pixels"])
def test_harmless_changes_are_forgiven(
    truth: tuple[list[Composition], torch.Tensor], change: str
) -> None:
    shown, images = truth
    if change == "blur and noise":
        rng = np.random.default_rng(1)
        pixels = gaussian_filter(images.numpy(), (0, 0, 0.6, 0.6))
        noise = rng.normal(scale=0.03, size=pixels.shape)
        changed = torch.from_numpy(pixels + noise).float().clamp(0, 1)
    else:
        shown, images = shown[::4], images[::4]
        size = int(change.split()[0])
        changed = functional.interpolate(images, (size, size), mode="bicubic").clamp(0, 1)
    accepted = composition_accuracy(changed, prompts_of(shown), None)
    assert accepted.mean() >= 0.99


def test_clean_shapes_overlap_with_ideal_ones_and_dented_ones_less(
    truth: tuple[list[Composition], torch.Tensor],
) -> None:
    """Dents that leave a square a square are seen by the overlap alone; prompts play no part."""
    _, images = truth
    clean = shape_overlap(images, ["x"] * SCENES, None)
    assert clean.min() > 0.9 and clean.max() <= 1
    square = draw(PlacedShape("blue", "square", 16.0, 16.0, 6.0))
    dented = square.clone()
    background = square[0, :, 0, 0][:, None]
    for row, column in ((10, 16), (22, 16), (16, 10), (16, 22)):
        dented[0, :, row - 1 : row + 2, column] = background
        dented[0, :, row, column - 1 : column + 2] = background
    assert (
        detect(dented).shape.tolist() == detect(square).shape.tolist() == [SHAPES.index("square")]
    )
    one, other = (shape_overlap(image, ["x"], None).item() for image in (square, dented))
    assert one - other > 0.02
    nothing = background[None, :, :, None].expand(1, 3, 32, 32)
    assert shape_overlap(nothing, ["x"], None).item() == 0


def test_melted_shapes_are_rejected() -> None:
    """Halves, three quarters, rings, stretched and turned shapes are no shapes."""
    deformations: dict[str, list[Callable[[NDArray[Any], NDArray[Any]], NDArray[np.bool_]]]] = {
        "circle": [
            lambda u, v: inside("circle", u, v) & (v < 0),
            lambda u, v: inside("circle", u, v) & (u < 0),
            lambda u, v: inside("circle", u, v) & ~((u > 0) & (v > 0)),
            lambda u, v: inside("circle", u, v) & (u**2 + v**2 > 0.25),
            lambda u, v: inside("circle", u, 1.4 * v),
            lambda u, v: np.abs(u) + np.abs(v) <= 1,
        ],
        "square": [
            lambda u, v: inside("square", u, 1.5 * v),
            lambda u, v: inside("square", u, v) & (u < v),
            lambda u, v: inside("square", u, v) & ~((u > 0) & (v > 0)),
        ],
        "triangle": [
            lambda u, v: inside("triangle", u, -v),
            lambda u, v: inside("triangle", v, u),
            lambda u, v: inside("triangle", u, v) & (u < 0),
        ],
    }
    grid = (np.arange(128) + 0.5) / 4
    background = np.array(BACKGROUND)[:, None, None]
    images, prompts = [], []
    for shape, melted in deformations.items():
        for deformed in melted:
            for index, (color, rgb) in enumerate(COLORS.items()):
                radius, x, y = 3.6 + 0.4 * index, 15.8 + 0.1 * index, 16.3 - 0.2 * index
                u, v = np.meshgrid((grid - x) / radius, (grid - y) / radius)
                coverage = deformed(u, v).reshape(32, 4, 32, 4).mean((1, 3))
                picture = background + coverage * (np.array(rgb)[:, None, None] - background)
                images.append(gaussian_filter(picture, (0, 0.3, 0.3)))
                prompts.append(f"a {color} {shape}")
    batch = torch.from_numpy(np.stack(images)).float()
    assert composition_accuracy(batch, prompts, None).max() == 0
    # At most the color is right.
    assert composition(batch, prompts, None).max() == 0.5


def test_ideal_shapes_are_the_rendered_ones() -> None:
    x, y = np.random.default_rng(0).uniform(-6, 6, size=(2, 10_000))
    radius = np.full_like(x, 4.0)
    for shape in SHAPES:
        np.testing.assert_array_equal(
            signed_distance(shape, x, y, radius) <= 0, inside(shape, x / 4, y / 4)
        )


def test_detections_say_what_is_where() -> None:
    triangle = PlacedShape("green", "triangle", 9.3, 8.6, 5.0)
    circle = PlacedShape("black", "circle", 22.1, 23.7, 4.0)
    found = detect(torch.cat([draw(), draw(triangle, circle), draw(circle)]))
    assert found.picture.tolist() == [1, 1, 2]
    assert [list(COLORS)[index] for index in found.color] == ["green", "black", "black"]
    assert [SHAPES[index] for index in found.shape] == ["triangle", "circle", "circle"]
    expected = [(triangle.x, triangle.y), (circle.x, circle.y), (circle.x, circle.y)]
    np.testing.assert_allclose(found.center, expected, atol=0.2)


def test_grades_by_hand() -> None:
    red_circle = PlacedShape("red", "circle", 8, 8, 5)
    blue_square = PlacedShape("blue", "square", 22, 22, 4)
    red_square = PlacedShape("red", "square", 22, 8, 4)
    pair = draw(red_circle, blue_square)
    pale = pair.clone()
    pale[0, :, 5:10, 20:26] = torch.tensor([1.0, 0.6, 0.7])[:, None, None]
    touching = draw(red_circle, PlacedShape("blue", "square", 16, 8, 3))
    cases = [
        (draw(red_circle), "a red circle", 1.0),
        (draw(red_circle), "a red square", 0.5),
        (draw(red_circle), "a blue square", 0.0),
        (draw(red_circle), "two red circles", 0.5),
        (pair, "a red circle", 0.5),
        (pair, "a red square and a blue circle", 0.5),
        (pale, "a red circle and a blue square", 2 / 3),
        (touching, "a red circle and a blue square", 0.0),
        (draw(red_circle, red_square), "a red square and a red circle", 1.0),
        (draw(red_circle, red_square), "a red circle left of a red square", 1.0),
        (draw(red_circle, red_square), "a red circle right of a red square", 0.5),
        (draw(red_circle), "a red circle left of a red square", 0.25),
        (draw(), "a red circle left of a red square", 0.0),
    ]
    images = torch.cat([image for image, _, _ in cases])
    grades = composition(images, [prompt for _, prompt, _ in cases], None)
    np.testing.assert_allclose(grades, [grade for _, _, grade in cases], rtol=1e-6)
    exact = composition_accuracy(images, [prompt for _, prompt, _ in cases], None)
    assert exact.tolist() == [float(grade == 1) for _, _, grade in cases]


def test_pictures_of_nothing_are_worth_nothing(
    truth: tuple[list[Composition], torch.Tensor],
) -> None:
    prompts = [*prompts_of(truth[0])[::20], "a black square"]
    count = len(prompts)
    for level in (0.0, 0.15, 0.5, 1.0):
        assert composition(torch.full((count, 3, 32, 32), level), prompts, None).max() == 0
    noise = torch.rand((count, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    assert composition(noise, prompts, None).max() == 0
    assert composition(torch.empty(0, 3, 32, 32), [], None).shape == (0,)


def test_foreign_prompts_and_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="a photo of a cat"):
        composition(draw(), ["a photo of a cat"], None)
    with pytest.raises(ValueError, match=re.escape("[1, 32, 32]")):
        detect(torch.zeros(1, 32, 32))
    with pytest.raises(ValueError, match="2 images do not match 1 prompts"):
        composition(torch.zeros(2, 3, 32, 32), ["a red circle"], None)


def test_jpeg_is_pillows_file_size() -> None:
    noise = torch.rand((3, 40, 24), generator=torch.Generator().manual_seed(0))
    images = torch.stack([torch.full((3, 40, 24), 0.5), noise])
    file = BytesIO()
    pixels = (noise * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    sizes = jpeg_incompressibility(images, ["", ""], None)
    assert sizes[1].item() == pytest.approx(len(file.getvalue()) / 1000)
    rewards = jpeg_compressibility(images, ["", ""], None)
    assert rewards[0] > rewards[1]
    assert torch.equal(rewards, -sizes)


@pytest.mark.parametrize(
    "name",
    [
        "composition",
        "composition_accuracy",
        "shape_overlap",
        "jpeg_compressibility",
        "jpeg_incompressibility",
    ],
)
def test_built_in_rewards_without_options_score(name: str) -> None:
    images = draw(PlacedShape("red", "circle", 16, 16, 5)).expand(2, -1, -1, -1)
    scores = score(name, load_reward(name), images, ["a red circle"] * 2, None, None)
    assert scores.shape == (2,) and scores.dtype == torch.float32


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_reward_refuses_options_it_does_not_have(name: str) -> None:
    with pytest.raises(UserError, match=rf"^reward '{name}': (unknown option|got options)"):
        check_reward(name, {"no_such_option": 1})


class Weighted:
    """A reward with options."""

    def __init__(self, factor: float, offset: float = 0.0) -> None:
        if factor <= 0:
            raise UserError(f"option factor: got {factor}; must be positive")
        self.factor, self.offset = factor, offset

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata: object) -> torch.Tensor:
        return images.mean((1, 2, 3)) * self.factor + self.offset


WEIGHTED = f"{__name__}:Weighted"


def test_a_class_is_made_with_its_options() -> None:
    reward = load_reward(WEIGHTED, {"factor": 2.0, "offset": 1.0})
    images = torch.full((3, 3, 4, 4), 0.2)
    assert reward(images, [""] * 3, None) == pytest.approx(1.4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 1.0, "offest": 1.0}, "unknown option 'offest'; did you mean 'offset'?"),
        ({"offset": 1.0}, "the option 'factor' must be given"),
        ({"factor": -1.0}, "option factor: got -1.0; must be positive"),
    ],
)
def test_options_that_are_not_allowed_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_reward(WEIGHTED, options)
    assert str(caught.value) == f"reward '{WEIGHTED}': {message}"


class Open:
    """A reward whose constructor takes anything."""

    def __init__(self, *arguments: object, **options: float) -> None:
        self.options = options

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata: object) -> list[float]:
        return [self.options.get("value", 0.0)] * len(images)


class Module(torch.nn.Module):
    """A reward that is a module without a constructor of its own."""

    def forward(self, images: torch.Tensor, prompts: list[str], metadata: object) -> torch.Tensor:
        return images.mean((1, 2, 3))


def test_classes_that_take_any_options(images: torch.Tensor) -> None:
    assert load_reward(f"{__name__}:Open")(images, ["", ""], None) == [0.0, 0.0]
    assert load_reward(f"{__name__}:Open", {"value": 2.0})(images, ["", ""], None) == [2.0, 2.0]
    scores = load_reward(f"{__name__}:Module")(images, ["", ""], None)
    assert torch.equal(torch.as_tensor(scores), images.mean((1, 2, 3)))
    with pytest.raises(UserError, match=r"cannot be made with the options \{'eps': 1\}: TypeError"):
        load_reward(f"{__name__}:Module", {"eps": 1})


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_rewards_do_not_disturb_each_other(images: torch.Tensor) -> None:
    buffer = torch.zeros(2)

    def careless(images: torch.Tensor, prompts: list[str], metadata: Any) -> torch.Tensor:
        np.asarray(images)[:] = 0
        prompts[0] = metadata[0]["words"] = "lost"
        assert not torch.is_grad_enabled()
        buffer[:] += 1
        return buffer

    given, prompts, metadata = images.clone(), ["a", "b"], [{"words": ["x"]}, {}]
    first = score("careless", careless, given, prompts, metadata, None)
    score("careless", careless, given, prompts, metadata, None)
    assert torch.equal(given, images)
    assert (prompts, metadata) == (["a", "b"], [{"words": ["x"]}, {}])
    assert first.tolist() == [1.0, 1.0]  # not what came into the buffer later


@pytest.mark.parametrize(
    "answer",
    [np.array([2.0, 1.0])[::-1], np.array([1.0, 2.0], ">f8"), np.array([1, 2], object), (1, 2)],
    ids=["reversed", "big-endian", "objects", "tuple"],
)
def test_numbers_of_any_kind_are_scores(answer: Any, images: torch.Tensor) -> None:
    assert score("it", lambda *_: answer, images, ["", ""], None, None).tolist() == [1.0, 2.0]


def test_pictures_are_what_a_file_would_hold() -> None:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pictures = as_pictures(images)
    saved = (images * 255).round().byte()  # as diffusers turns them into pictures
    assert torch.equal(pictures, saved.float() / 255)
    assert torch.equal(as_pictures(pictures), pictures)


def test_a_video_is_scored_by_the_mean_of_some_frames() -> None:
    asked: list[tuple[int, list[str]]] = []

    def brightness(images: torch.Tensor, prompts: list[str], metadata: object) -> torch.Tensor:
        asked.append((len(images), prompts))
        return images.mean((1, 2, 3))

    levels = torch.tensor([[0, 51, 102, 153, 204, 255], [255, 0, 0, 51, 0, 0]]) / 255
    videos = levels[..., None, None, None].expand(-1, -1, 3, 4, 4)
    scores = score("brightness", brightness, videos, ["a", "b"], None, None, frames=3)
    assert asked == [(6, ["a", "a", "a", "b", "b", "b"])]
    # The frames in the middles of three equal parts.
    torch.testing.assert_close(scores, levels[:, [1, 3, 5]].mean(1))


def test_a_reward_in_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written with NumPy, knowing nothing of torch."""
    source = (
        "import numpy as np\ndef brightness(images, prompts, metadata):\n"
        "    return np.asarray(images).mean((1, 2, 3)) + [entry['bonus'] for entry in metadata]\n"
    )
    (tmp_path / "reward_written_by_a_user.py").write_text(source)
    (tmp_path / "reward_with_a_typo.py").write_text("def brightness(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    reward = load_reward("reward_written_by_a_user:brightness")
    images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    scores = score("mine", reward, images, ["a", "b"], [{"bonus": 0.0}, {"bonus": 1.0}], None)
    assert scores.tolist() == [0.0, 2.0] and scores.dtype == torch.float32
    with pytest.raises(ValueError, match=r"reward_written_by_a_user\.py\) has no function 'glow'"):
        load_reward("reward_written_by_a_user:glow")
    with pytest.raises(ValueError, match=r"cannot be imported \(SyntaxError"):
        load_reward("reward_with_a_typo:brightness")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "compositon",
            r"'compositon' is unknown \(did you mean 'composition'\?\); built in are .*jpeg",
        ),
        ("HPSv2", r"did you mean 'hpsv2'"),
        ("CLIPScore", r"did you mean 'clip_score'"),
        ("clip", r"did you mean 'clip_score'"),
        ("VLM-judge", r"did you mean 'vlm_judge'"),
        ("zzz", r"'zzz' is unknown; built in are"),
        ("module:", r"'module:' is unknown"),
        ("no_such_module:f", r"cannot be imported \(ModuleNotFoundError: No module .*no_such_mod"),
    ],
)
def test_unknown_names_are_explained(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_reward(name)


def raising(images: torch.Tensor, prompts: list[str], metadata: object) -> torch.Tensor:
    raise KeyError("logits")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (raising, r"raised KeyError for 2 prompts, .* \['a red circle'\]: 'logits'"),
        (
            lambda *_: torch.tensor([0.0, torch.nan]),
            r"nan for the prompt 'two blue squares' .*1 of",
        ),
        (lambda *_: np.array([np.inf, 0.0]), r"inf for the prompt 'a red circle' \(image 0 of 2"),
        (lambda *_: torch.zeros(2, 1), r"float32 of shape \[2, 1\] .*expected .* shape \[2\]"),
        (lambda *_: [0.5], r"shape \[1\] .*expected .* shape \[2\]"),
        (lambda *_: None, r"returned NoneType None .*expected 2 numbers"),
        (lambda *_: ["good", "bad"], r"returned list \['good', 'bad'\] .*expected 2 numbers"),
    ],
)
def test_a_failing_reward_is_named_and_its_images_kept(
    reward: Reward, message: str, tmp_path: Path
) -> None:
    images = torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.5)])
    prompts = ["a red circle", "two blue squares"]
    folder = tmp_path / "failures"
    for attempt in range(2):  # the second must not overwrite the first
        with pytest.raises(RewardError, match=f"reward 'mine:it' .*{message}") as caught:
            score("mine:it", reward, images, prompts, None, folder)
        path = folder / f"mine_it-{attempt}.npz"
        assert str(path) in str(caught.value)
        kept = np.load(path)
        assert kept["images"].dtype == np.uint8
        assert kept["images"][:, 0, 0, 0].tolist() == [0, 128]
        assert kept["prompts"].tolist() == prompts
    if reward is raising:
        assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(RewardError, match="were not kept"):
        score("mine:it", reward, images, prompts, None, None)


# --- Pillow ---


@pytest.mark.parametrize("reward", ["image_reward", "clip"])
def test_pixels_do_not_depend_on_pillows_order_of_passes(
    reward: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow 13 takes rows before columns where a picture is more than twice as tall as wide."""
    tall = torch.rand(2, 3, 90, 40, generator=torch.Generator().manual_seed(0))
    resize = Image.Image.resize

    def rows_first(image: Image.Image, size: tuple[int, int], resample: int, **more: Any) -> Any:
        rows = resize(image, (image.width, size[1]), resample, **more)
        return resize(rows, size, resample, **more)

    def pixels() -> torch.Tensor:
        if reward == "image_reward":
            return image_reward.preprocess(tall)
        processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, do_center_crop=False)
        return process_pictures(processor, to_uint8(tall))

    usual = pixels()
    monkeypatch.setattr(Image.Image, "resize", rows_first)
    assert torch.equal(pixels(), usual)
    picture = Image.fromarray(to_uint8(tall)[0].permute(1, 2, 0).numpy())
    columns_first = resized(picture, 28, 63, Image.Resampling.BICUBIC)
    assert columns_first != picture.resize((28, 63), Image.Resampling.BICUBIC), "the order shows"

"""GenEval: judging, on detections by hand; the whole path, on tiny models of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessorPil,
    Owlv2Processor,
)

from treegrpo.errors import UserError
from treegrpo.rewards.geneval import (
    CLASSES,
    COLOR_TEMPLATES,
    COLORS,
    Detection,
    GenEval,
    detector_pixels,
    grades,
    overlap,
    relations,
    requirements,
    suppress_overlaps,
)

NAMES = ["cat", "dog", "traffic light"]


def objects(*colors: str, x: float = 0, y: float = 0) -> list[Detection]:
    """Detections of 10 x 10 pixels around (x, y), one per color, less and less sure."""
    box = (x - 5, y - 5, x + 5, y + 5)
    return [Detection(box, 0.9 - index / 10, color) for index, color in enumerate(colors)]


def clause(name: str, count: object = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


RED, LEFT = {"color": "red"}, {"position": ["left of", 0]}
THREE = {"include": [clause("cat", 3)], "exclude": [clause("cat", 4)]}
TWO_RED = {"include": [clause("cat", 2, **RED)]}
DOG_LEFT = {"include": [clause("cat"), clause("dog", **LEFT)]}
RED_DOG_LEFT_OF_BLUE_CAT = {
    "include": [clause("cat", color="blue"), clause("dog", **RED, **LEFT)],
}
NO_DOG = {"include": [clause("cat")], "exclude": [clause("dog", 1), clause("dog", 3)]}


@pytest.mark.parametrize(
    ("metadata", "found", "expected"),
    [
        # At least as many as asked for, unless more are excluded.
        ({"include": [clause("cat")]}, {}, [0]),
        ({"include": [clause("cat")]}, {"cat": objects(*"abc")}, [1]),
        (THREE, {}, [0]),
        (THREE, {"cat": objects(*"ab")}, [2 / 3]),
        (THREE, {"cat": objects(*"abc")}, [1]),
        (THREE, {"cat": objects(*"abcd")}, [2 / 3]),
        (THREE, {"cat": objects(*"abcdefgh")}, [0]),
        (NO_DOG, {"cat": objects("a")}, [1, 1]),
        (NO_DOG, {"cat": objects("a"), "dog": objects("a")}, [1, 0]),
        # Colors: of the surest.
        (TWO_RED, {"cat": objects("red")}, [1 / 2, 0]),
        (TWO_RED, {"cat": objects("red", "blue", "red")}, [1, 1 / 2]),
        (TWO_RED, {"cat": objects("red", "red", "blue")}, [1, 1]),
        # Positions: of the surest, each to each, and only where the rest is right.
        (DOG_LEFT, {"cat": objects("a", x=50), "dog": objects("a")}, [1, 1, 1]),
        (DOG_LEFT, {"cat": objects("a"), "dog": objects("a", x=50)}, [1, 1, 0]),
        (DOG_LEFT, {"dog": objects("a")}, [0, 1, 0]),
        (DOG_LEFT, {"cat": objects("a", x=50) + objects("a", x=-50), "dog": objects("a")}, [1] * 3),
        (
            {"include": [clause("cat", 2), clause("dog", **LEFT)]},
            {"cat": objects("a", x=50) + objects("a", x=-50), "dog": objects("a")},
            [1, 1, 0],
        ),
        (
            RED_DOG_LEFT_OF_BLUE_CAT,
            {"cat": objects("blue", x=50), "dog": objects("red")},
            [1, 1, 1, 1, 1],
        ),
        (
            RED_DOG_LEFT_OF_BLUE_CAT,
            {"cat": objects("red", x=50), "dog": objects("blue")},
            [1, 0, 1, 0, 0],
        ),
        (
            RED_DOG_LEFT_OF_BLUE_CAT,
            {"cat": objects("green", x=50), "dog": objects("red")},
            [1, 0, 1, 1, 0],
        ),
    ],
)
def test_grades_by_hand(
    metadata: dict[str, Any], found: dict[str, list[Detection]], expected: list[float]
) -> None:
    assert grades(requirements("a prompt", metadata), found) == pytest.approx(expected)


def test_relations_keep_genevals_margin() -> None:
    def to_the(x: float, y: float, half: float = 10) -> set[Any]:
        return relations((x - half, y - half, x + half, y + half), (-10, -10, 10, 10))

    assert to_the(-30, 0) == {"left of"} and to_the(30, 0) == {"right of"}
    assert to_the(0, -30) == {"above"} and to_the(0, 30) == {"below"}  # y points down
    assert to_the(0, 0) == set()
    # A tenth of the joint size, 20 + 20, does not count, and the rest must be over a half of all.
    assert to_the(4, 0) == set() and to_the(8, 0) == set() and to_the(8.1, 0) == {"right of"}
    assert to_the(100, 100) == {"right of", "below"}
    # At 45 degrees 0.707 of the distance is in each direction; at 60 degrees a half is in one.
    assert to_the(100, 180) == {"below"}
    assert to_the(20, 20) == {"right of", "below"} and to_the(20, 20, half=60) == set()


def test_overlaps_are_suppressed_by_surer_detections() -> None:
    assert overlap((0, 0, 9, 9), (0, 0, 9, 9)) == 1  # edge pixels included: ten pixels wide
    assert overlap((0, 0, 9, 9), (5, 0, 14, 9)) == 1 / 3
    assert overlap((0, 0, 9, 9), (20, 20, 29, 29)) == 0
    sure, beside, apart = (
        Detection((0, 0, 9, 9), 0.8),
        Detection((5, 0, 14, 9), 0.9),
        Detection((10, 0, 19, 9), 0.5),
    )
    assert suppress_overlaps([sure, beside, apart], 0.34) == [beside, sure, apart]
    # The one in the middle suppresses both: a suppressed detection would suppress nothing.
    assert suppress_overlaps([sure, beside, apart], 1 / 3) == [beside]
    middle_last = Detection((5, 0, 14, 9), 0.1)
    assert suppress_overlaps([middle_last, sure, apart], 1 / 3) == [sure, apart]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "no GenEval metadata; it needs a line such as"),
        ({"include": []}, "malformed GenEval metadata: include: got"),
        ({"include": [{"class": "cat"}]}, "include.0.count: .* Field required"),
        ({"include": [clause("cat", 0)]}, "include.0.count: got 0: .* greater than or equal to 1"),
        ({"include": [clause("cat", "2")]}, "include.0.count: got '2': .* valid integer"),
        ({"include": [clause("cat", color="mauve")]}, "include.0.color: got 'mauve': .* 'red'"),
        ({"include": [clause("cat", colour="red")]}, "include.0.colour: got 'red': Extra inputs"),
        (
            {"include": [clause("cat"), clause("dog", position=["near", 0])]},
            "include.1.position.0: got 'near': .* 'left of'",
        ),
        (
            {"include": [clause("cat"), clause("dog", position=["above", 1])]},
            "include.1.position: got 1; must be the number of an earlier clause",
        ),
        ({"include": [clause("cat")], "exclude": [clause("cat", 2, color="red")]}, "exclude.0.col"),
    ],
)
def test_malformed_metadata_are_named(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"'a purple prompt' has .*{message}"):
        requirements("a purple prompt", metadata)


def test_the_vocabulary_is_genevals() -> None:
    assert len(CLASSES) == len(set(CLASSES)) == 80
    assert {"person", "traffic light", "computer mouse", "tv remote", "toothbrush"} < set(CLASSES)


# --- the whole path ---


def save_tokenizer(folder: Path, length: int) -> CLIPTokenizer:
    """A CLIP tokenizer without merges: every byte is a token."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = ["!", *sorted(set(ByteLevel.alphabet()) - {"!"})]
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)},
        merges=[],
        pad_token="!",
        model_max_length=length,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An OWLv2 that sees 4 x 4 patches of 64 x 64 pixels, and a CLIP; weights far from 0."""
    detector, classifier = (tmp_path_factory.mktemp(name) for name in ("owlv2", "clip"))
    layers = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = {**layers, "vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513}
    torch.manual_seed(0)
    for folder, config, kind, length, settings in (
        (
            detector,
            Owlv2Config(
                text_config={**text, "max_position_embeddings": 40},
                vision_config={**layers, "image_size": 64, "patch_size": 16},
                projection_dim=32,
            ),
            Owlv2ForObjectDetection,
            40,
            Owlv2ImageProcessorPil(size={"height": 64, "width": 64}),
        ),
        (
            classifier,
            CLIPConfig(
                text_config={**text, "max_position_embeddings": 77},
                vision_config={**layers, "image_size": 32, "patch_size": 8},
                projection_dim=16,
            ),
            CLIPModel,
            77,
            CLIPImageProcessorPil(
                size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
            ),
        ),
    ):
        model = kind(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder)
        settings.save_pretrained(folder)
        save_tokenizer(folder, length)
    return detector, classifier


def build(checkpoints: tuple[Path, Path], **options: Any) -> GenEval:
    detector, classifier = map(str, checkpoints)
    return GenEval(detector, color_path=classifier, **{"classes": NAMES, **options})


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Colored blocks: float [8, 3, 48, 80] in [0, 1]."""
    blocks = torch.rand(8, 3, 3, 5, generator=torch.Generator().manual_seed(1))
    return functional.interpolate(blocks, size=(48, 80), mode="nearest")


def as_pictures(images: torch.Tensor) -> list[Image.Image]:
    return [
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images
    ]


@pytest.mark.parametrize("size", [(40, 60), (64, 64), (200, 150)])
def test_the_detectors_pixels_are_those_of_transformers(size: tuple[int, int]) -> None:
    """Enlarged, unchanged, and shrunk with its Gaussian filter."""
    pictures = torch.randint(256, (2, 3, *size), generator=torch.Generator().manual_seed(0)).byte()
    processor = Owlv2ImageProcessorPil(size={"height": 64, "width": 64})
    arrays = [picture.permute(1, 2, 0).numpy() for picture in pictures]
    expected = processor(arrays, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(detector_pixels(pictures, 64), expected.float(), rtol=0, atol=2e-5)


def test_detections_are_those_of_transformers(
    checkpoints: tuple[Path, Path], images: torch.Tensor
) -> None:
    reward = build(checkpoints, threshold=0.4, max_overlap=1)
    found = reward.detect((images * 255).round().byte())

    model = Owlv2ForObjectDetection.from_pretrained(checkpoints[0]).eval()
    processor = Owlv2Processor(
        Owlv2ImageProcessorPil.from_pretrained(checkpoints[0]),
        CLIPTokenizer.from_pretrained(checkpoints[0]),
    )
    texts = [[f"a photo of a {name}" for name in NAMES]] * len(images)
    inputs = processor(text=texts, images=as_pictures(images), return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs)
    expected = processor.post_process_grounded_object_detection(
        output, threshold=0.4, target_sizes=[(48, 80)] * len(images)
    )
    counts = np.zeros(len(NAMES), int)
    for mine, theirs in zip(found, expected, strict=True):
        boxes = theirs["boxes"].clamp(min=0).minimum(torch.tensor([80.0, 48.0] * 2))
        inside = boxes[:, 3] > boxes[:, 1]
        for kind, name in enumerate(NAMES):
            kept = inside & (theirs["labels"] == kind)
            scores, order = theirs["scores"][kept].sort(descending=True)
            ours = mine.get(name, [])
            assert [one.score for one in ours] == pytest.approx(scores.tolist(), abs=1e-5)
            places = torch.tensor([one.box for one in ours]).view(-1, 4)
            torch.testing.assert_close(places, boxes[kept][order], rtol=0, atol=1e-3)
            counts[kind] += len(ours)
    assert counts.min() > 0 and counts.sum() > 30, counts


def test_colors_are_clips_zero_shot_choice(
    checkpoints: tuple[Path, Path], images: torch.Tensor
) -> None:
    crops = [image[:, :height] for image, height in zip(images, range(6, 46, 5), strict=True)]
    model = CLIPModel.from_pretrained(checkpoints[1]).eval()
    tokenizer = CLIPTokenizer.from_pretrained(checkpoints[1])
    processor = CLIPImageProcessorPil.from_pretrained(checkpoints[1])
    expected = []
    for index, crop in enumerate(crops):
        logits = []
        for color in COLORS:
            texts = [one.format(color=color, name=NAMES[index % 3]) for one in COLOR_TEMPLATES]
            with torch.no_grad():
                output = model(
                    **tokenizer(texts, padding=True, return_tensors="pt"),
                    **processor(as_pictures(crop[None]), return_tensors="pt"),
                )
            mean = output.text_embeds.mean(0)
            logits.append((output.image_embeds @ mean / mean.norm()).item())
        expected.append(COLORS[int(np.argmax(logits))])
    reward = build(checkpoints, batch_size=3)
    pixels = [(crop * 255).round().byte() for crop in crops]
    assert reward.classify_colors(pixels, [NAMES[index % 3] for index in range(8)]) == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_do_not_depend_on_the_batch(
    checkpoints: tuple[Path, Path], images: torch.Tensor, dtype: str
) -> None:
    kinds = [
        {"include": [clause("cat", 4)], "exclude": [clause("cat", 5)]},
        {"include": [clause("dog", 2, color="purple")]},
        {"include": [clause("traffic light"), clause("cat", position=["above", 0])]},
        {"include": [clause("dog"), clause("cat", 2, color="pink", position=["right of", 0])]},
    ]
    metadata = [kinds[index % len(kinds)] for index in range(8)]
    prompts = [f"prompt {index}" for index in range(8)]
    reward = build(checkpoints, threshold=0.4, dtype=dtype)
    reward.check(prompts, metadata)
    together = reward(images, prompts, metadata)
    assert min(together) >= 0 and max(together) <= 1 and len(set(together)) > 2
    in_threes = build(checkpoints, threshold=0.4, dtype=dtype, batch_size=3)
    assert in_threes(images, prompts, metadata) == together
    backwards = reward(images.flip(0), prompts[::-1], metadata[::-1])
    assert backwards[::-1] == together
    strict = build(checkpoints, threshold=0.4, dtype=dtype, score="strict")
    assert strict(images, prompts, metadata) == [float(one == 1) for one in together]


def test_prompts_that_cannot_be_judged_are_named(checkpoints: tuple[Path, Path]) -> None:
    reward = build(checkpoints)
    good = {"tag": "single_object", "include": [clause("cat")], "prompt": "a cat"}
    reward.check(["a cat"], [good])
    with pytest.raises(UserError, match="'two dogs' has no GenEval metadata"):
        reward.check(["two dogs"], None)
    with pytest.raises(UserError, match="'two dogs' has no GenEval metadata"):
        reward.check(["a cat", "two dogs"], [good, {}])
    with pytest.raises(UserError, match=r"'a dogg' names the class 'dogg' \(did you mean 'dog'\?"):
        reward.check(["a dogg"], [{"include": [clause("dogg")]}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "half"}, "option score: 'half' is none of partial, strict"),
        ({"threshold": 1.5}, "option threshold: 1.5 is not between 0 and 1"),
        ({"max_overlap": -1}, "option max_overlap: -1 is not between 0 and 1"),
        ({"threshold": "high"}, "option threshold: 'high' is not between 0 and 1"),
        ({"classes": []}, r"option classes: \[\] is no list of one name or more"),
        ({"classes": "cat"}, "option classes: 'cat' is no list of one name or more"),
        ({"classes": ["cat" * 20]}, "option classes: 'cat.*' is longer than the detector reads"),
        ({"path": "/no/such/folder"}, "option path: '/no/such/folder' does not exist"),
        ({"color_path": "/no/such/folder"}, "option color_path: '/no/such/folder' does not exist"),
    ],
)
def test_options_are_checked(
    checkpoints: tuple[Path, Path], options: dict[str, Any], message: str
) -> None:
    detector, classifier = map(str, checkpoints)
    given = {"path": detector, "color_path": classifier, "classes": NAMES, **options}
    with pytest.raises(UserError, match=message):
        GenEval(**given)


def test_another_model_is_no_detector(checkpoints: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="option path: "):
        build((checkpoints[1], checkpoints[1]))

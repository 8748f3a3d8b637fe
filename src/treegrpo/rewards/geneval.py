"""Objects, their number, color and position, judged as GenEval does (arXiv 2310.11513).

Judging is functions on detections that know no model: `grades`, `relations`, `suppress_overlaps`.
`GenEval` gives them what OWLv2 detects and CLIP says about colors. The original is
evaluation/evaluate_images.py of https://github.com/djghosh13/geneval.

Left out: its detector, Mask2Former, which needs mmdetection 2 and an environment of its own.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

from treegrpo.errors import UserError
from treegrpo.images import to_uint8
from treegrpo.rewards.checkpoints import Placement
from treegrpo.rewards.clip_models import (
    CLIP_FILES,
    Clip,
    find_clip,
    load_clip,
    load_model,
    load_tokenizer,
)
from treegrpo.rewards.registry import Metadata

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DETECTOR = "google/owlv2-base-patch16-ensemble"
COLOR_CLASSIFIER = "openai/clip-vit-large-patch14"
CHECKPOINTS = {"path": (DETECTOR, CLIP_FILES), "color_path": (COLOR_CLASSIFIER, CLIP_FILES)}

Color = Literal[
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"
]
Relation = Literal["left of", "right of", "above", "below"]
COLORS: tuple[Color, ...] = get_args(Color)
COLOR_TEMPLATES = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)
# Centers must lie further apart than this share of the boxes' sizes for a relation to hold.
POSITION_MARGIN = 0.1
# COCO's classes in GenEval's words.
CLASSES = tuple(
    re.split(
        r",\s+",
        """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
    fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant,
    bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard,
    sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle,
    wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
    hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink,
    refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush""",
    )
)

Count = Annotated[StrictInt, Field(ge=1)]


class Excluded(BaseModel):
    """There must be fewer than `count` objects of the class."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(alias="class")
    count: Count


class Included(Excluded):
    """There must be `count` objects of the class or more, of one color, in one place."""

    color: Color | None = None
    position: tuple[Relation, Annotated[StrictInt, Field(ge=0)]] | None = None
    """Where the objects are, seen from those of an earlier clause, which the number gives."""


class Requirements(BaseModel):
    """What a picture must show, from an entry of GenEval's evaluation_metadata.jsonl."""

    model_config = ConfigDict(frozen=True)

    include: tuple[Included, ...] = Field(min_length=1)
    exclude: tuple[Excluded, ...] = ()


@dataclass(frozen=True)
class Detection:
    """An object: its box (left, top, right, bottom) in pixels, how sure it is, and its color."""

    box: tuple[float, float, float, float]
    score: float
    color: str | None = None


def requirements(prompt: str, metadata: Mapping[str, Any]) -> Requirements:
    """What a picture must show; UserError: the prompt's metadata are not in GenEval's format."""
    if "include" not in metadata:
        raise UserError(
            f"the prompt {prompt!r} has no GenEval metadata; it needs a line such as "
            '{"prompt": "a photo of two dogs", "include": [{"class": "dog", "count": 2}]}'
        )
    given = {key: metadata[key] for key in ("include", "exclude") if metadata.get(key) is not None}
    try:
        parsed = Requirements.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"the prompt {prompt!r} has malformed GenEval metadata: {place}: got "
            f"{first['input']!r}: {first['msg']}"
        ) from error
    for index, clause in enumerate(parsed.include):
        if clause.position is not None and clause.position[1] >= index:
            raise UserError(
                f"the prompt {prompt!r} has malformed GenEval metadata: include.{index}.position: "
                f"got {clause.position[1]}; must be the number of an earlier clause, from 0"
            )
    return parsed


def grades(required: Requirements, found: Mapping[str, Sequence[Detection]]) -> list[float]:
    """How far each requirement is met, in [0, 1]: all are 1 exactly if the original says correct.

    One grade for the number of objects of each included clause, of each color and position asked
    for, and of each class that is only excluded:

    - number: 1 - (missing or too many) / asked for, but not below 0. A class's excluded number is
      an upper limit here, so that an empty picture meets nothing by having none too many.
    - color: the share of the objects that have it; 0 where objects are missing.
    - position: 1 if each of the objects is there seen from each of the other clause's; 0 where a
      clause's number or color is not met.

    As in the original, color and position are of the surest objects, as many as asked for. `found`
    has the objects of each class, the surest first, without overlaps.
    """
    limits: dict[str, int] = {}
    for unwanted in required.exclude:
        most = unwanted.count - 1
        limits[unwanted.name] = min(most, limits.get(unwanted.name, most))
    result: list[float] = []
    matched: list[Sequence[Detection]] = []  # per clause; empty where it is not met
    for clause in required.include:
        objects = found.get(clause.name, ())
        missing = max(0, clause.count - len(objects))
        too_many = max(0, len(objects) - limits.get(clause.name, len(objects)))
        result.append(max(0.0, 1 - (missing + too_many) / clause.count))
        surest = () if missing else objects[: clause.count]
        if clause.color is not None:
            right = sum(one.color == clause.color for one in surest)
            result.append(right / clause.count)
            surest = surest if right == clause.count else ()
        if clause.position is not None:
            relation, other = clause.position
            pairs = [(one, target) for one in surest for target in matched[other]]
            there = all(relation in relations(one.box, target.box) for one, target in pairs)
            result.append(float(bool(pairs) and there))
            surest = surest if result[-1] else ()
        matched.append(surest)
    for name in limits.keys() - {clause.name for clause in required.include}:
        result.append(float(len(found.get(name, ())) <= limits[name]))
    return result


def relations(one: Sequence[float], other: Sequence[float]) -> set[Relation]:
    """Where a box (left, top, right, bottom) is, seen from another one: none, one or two relations.

    The distance of the centers, less `POSITION_MARGIN` times the boxes' joint size in that
    direction, must be more than half of the undiminished distance.
    """
    left, top, right, bottom = one
    other_left, other_top, other_right, other_bottom = other
    x = (left + right - other_left - other_right) / 2
    y = (top + bottom - other_top - other_bottom) / 2
    width = abs(right - left) + abs(other_right - other_left)
    height = abs(bottom - top) + abs(other_bottom - other_top)
    beyond_x = math.copysign(max(abs(x) - POSITION_MARGIN * width, 0), x)
    beyond_y = math.copysign(max(abs(y) - POSITION_MARGIN * height, 0), y)
    if max(abs(beyond_x), abs(beyond_y)) < 1e-3:
        return set()
    half = math.hypot(x, y) / 2
    holds: dict[Relation, bool] = {
        "left of": beyond_x < -half,
        "right of": beyond_x > half,
        "above": beyond_y < -half,
        "below": beyond_y > half,
    }
    return {relation for relation, there in holds.items() if there}


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes (left, top, right, bottom), edge pixels included."""

    def area(left: float, top: float, right: float, bottom: float) -> float:
        return max(right - left + 1, 0) * max(bottom - top + 1, 0)

    shared = area(*map(max, one[:2], other[:2]), *map(min, one[2:], other[2:]))
    return shared / (area(*one) + area(*other) - shared)


def suppress_overlaps(detections: Sequence[Detection], max_overlap: float) -> list[Detection]:
    """The detections, surest first, without those that overlap a surer one by `max_overlap`."""
    kept: list[Detection] = []
    for detection in sorted(detections, key=lambda one: -one.score):
        if all(overlap(surer.box, detection.box) < max_overlap for surer in kept):
            kept.append(detection)
    return kept


def detector_pixels(pictures: Tensor, size: int) -> Tensor:
    """Pictures as OWLv2 gets them: uint8 [N, 3, H, W] to float32 [N, 3, size, size], same device.

    Padded with black to a square at the right and bottom, resized, normalized. This is what
    transformers' processor computes with SciPy in a quarter of a second per picture, longer than
    a GPU takes to detect: a Gaussian filter where it shrinks, then bilinear interpolation, with the
    picture mirrored at its borders.
    """
    import torch
    from torch.nn import functional
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    height, width = pictures.shape[2:]
    side = max(height, width)
    pixels = functional.pad(pictures.float() / 255, (0, side - width, 0, side - height))
    sigma = (side / size - 1) / 2
    radius = int(4 * sigma + 0.5)
    if radius > 0:
        offsets = torch.arange(-radius, radius + 1, device=pictures.device)
        kernel = (-((offsets / sigma) ** 2) / 2).exp()
        kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
        pixels = functional.pad(pixels, (radius,) * 4, mode="reflect")
        pixels = functional.conv2d(pixels, kernel, groups=3)
        pixels = functional.conv2d(pixels, kernel.mT, groups=3)
    place = (torch.arange(size, device=pictures.device) + 0.5) * side / size - 0.5
    y, x = torch.meshgrid(*[2 * place / (side - 1) - 1] * 2, indexing="ij")
    grid = torch.stack([x, y], dim=-1).expand(len(pictures), -1, -1, -1)
    pixels = functional.grid_sample(pixels, grid, padding_mode="reflection", align_corners=True)
    mean, std = pixels.new_tensor([OPENAI_CLIP_MEAN, OPENAI_CLIP_STD]).view(2, 3, 1, 1).unbind()
    return (pixels - mean) / std


class GenEval:
    """How far a picture shows the objects that its prompt's metadata ask for, in [0, 1].

    Unlike the original: OWLv2 detects, not Mask2Former, with other confidences, so that its
    thresholds (0.3, and 0.9 for counting) mean nothing here; one threshold serves all. OWLv2 finds
    an object several times, so overlaps are suppressed. There are no masks: a color is judged with
    the background inside the box, which the original paints gray. Published scores are therefore
    not comparable.

    Args:
        path: OWLv2 in transformers' format, a local folder or a hub repository; None:
            google/owlv2-base-patch16-ensemble.
        device, dtype, batch_size: those of `Placement`; bfloat16 places boxes to about 1/256 of the
            picture only.
        color_path: CLIP in transformers' format, for colors; None: openai/clip-vit-large-patch14,
            the original's.
        score: "partial", the mean of `grades`, or "strict", 1 if they all are 1 and else 0.
        threshold: detections must be surer than this, in [0, 1].
        max_overlap: a detection that overlaps a surer one of its class by this intersection over
            union or more is the same object; 1 keeps all but identical boxes.
        classes: the names between which the detector chooses for every object; None: GenEval's 80.
            Synonyms compete with each other: leave out what your prompts do not name.
    """

    def __init__(
        self,
        path: str | None = None,
        device: str = "auto",
        dtype: str = "float32",
        batch_size: int = 32,
        color_path: str | None = None,
        score: str = "partial",
        threshold: float = 0.3,
        max_overlap: float = 0.5,
        classes: list[str] | None = None,
    ) -> None:
        self.placement = Placement(device, dtype, batch_size)
        if score not in ("partial", "strict"):
            raise UserError(f"option score: {score!r} is none of partial, strict")
        for name, value in (("threshold", threshold), ("max_overlap", max_overlap)):
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise UserError(f"option {name}: {value!r} is not between 0 and 1")
        listed = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
        if classes is not None and not (listed and classes):
            raise UserError(f"option classes: {classes!r} is no list of one name or more, nor null")
        self.classes = CLASSES if classes is None else tuple(classes)
        self.strict = score == "strict"
        self.threshold, self.max_overlap = threshold, max_overlap
        self._load_detector(path)
        self._load_color_classifier(color_path)

    def _load_detector(self, path: str | None) -> None:
        import torch
        from transformers import Owlv2ForObjectDetection

        folder = find_clip(path, DETECTOR, needs=("tokenizer",))
        tokenizer = load_tokenizer(folder)
        self._detector = load_model(Owlv2ForObjectDetection, folder).eval()
        length = self._detector.config.text_config.max_position_embeddings
        queries = [f"a photo of a {name}" for name in self.classes]
        tokens = tokenizer(queries, padding="max_length", max_length=length, return_tensors="pt")
        if tokens["input_ids"].shape[1] > length:
            longest = max(self.classes, key=len)
            raise UserError(
                f"option classes: {longest!r} is longer than the detector reads ({length} tokens "
                "with 'a photo of a')"
            )
        with torch.no_grad():
            features = self._detector.owlv2.get_text_features(**tokens)
        self._queries = features.pooler_output[None]
        self._detector.to(getattr(torch, self.placement.dtype))

    def _load_color_classifier(self, path: str | None) -> None:
        try:
            self._color_classifier = Clip(*load_clip(path, COLOR_CLASSIFIER), self.placement)
        except UserError as error:
            raise UserError(str(error).replace("option path", "option color_path")) from error
        self._color_queries: dict[str, Tensor] = {}

    def check(self, prompts: list[str], metadata: Metadata) -> None:
        """Raises UserError for the first prompt whose metadata cannot be judged."""
        self._requirements(prompts, metadata)

    def _requirements(self, prompts: list[str], metadata: Metadata) -> list[Requirements]:
        result = []
        for prompt, entry in zip(prompts, metadata or [{}] * len(prompts), strict=True):
            required = requirements(prompt, entry)
            for clause in (*required.include, *required.exclude):
                if clause.name not in self.classes:
                    near = difflib.get_close_matches(clause.name, self.classes, n=1)
                    raise UserError(
                        f"the prompt {prompt!r} names the class {clause.name!r}"
                        f"{f' (did you mean {near[0]!r}?)' if near else ''}, which is none of the "
                        f"{len(self.classes)} that the detector looks for; set the option classes"
                    )
            result.append(required)
        return result

    def __call__(self, images: Tensor, prompts: list[str], metadata: Metadata) -> list[float]:
        """Judge N images, float [N, 3, H, W] in [0, 1], by their metadata: N numbers in [0, 1]."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must have the shape [N, 3, H, W], got {list(images.shape)}")
        asked = self._requirements(prompts, metadata)
        device = self.placement.device_for(images)
        scores: list[float] = []
        for start in range(0, len(images), self.placement.batch_size):
            batch = slice(start, start + self.placement.batch_size)
            pictures = to_uint8(images[batch]).to(device)
            found = self.detect(pictures)
            self._color(pictures, asked[batch], found)
            for required, objects in zip(asked[batch], found, strict=True):
                result = grades(required, objects)
                scores.append(float(min(result) == 1) if self.strict else sum(result) / len(result))
        return scores

    def detect(self, pictures: Tensor) -> list[dict[str, list[Detection]]]:
        """The objects of each picture by class, surest first: uint8 [N, 3, H, W] on any device."""
        import torch
        from transformers.image_transforms import center_to_corners_format

        height, width = pictures.shape[2:]
        detector = self._detector.to(pictures.device)
        pixels = detector_pixels(pictures, detector.config.vision_config.image_size)
        with torch.no_grad():
            grid, _ = detector.image_embedder(pixels.to(detector.dtype))
            places = grid.flatten(1, 2)
            logits, _ = detector.class_predictor(places, self._queries.to(places))
            boxes = detector.box_predictor(places, grid)
        score, label = logits.float().sigmoid().max(-1)
        # Relative to the square that the picture was padded to; what lies in the padding is cut.
        corners = center_to_corners_format(boxes.float()) * max(height, width)
        corners = corners.clamp(min=0).minimum(corners.new_tensor([width, height] * 2))
        seen = (score > self.threshold) & (corners[..., :2] < corners[..., 2:]).all(-1)
        result = []
        for index, mask in enumerate(seen):
            objects: dict[str, list[Detection]] = {}
            kept = (values[index, mask].tolist() for values in (corners, score, label))
            for box, sure, kind in zip(*kept, strict=True):
                objects.setdefault(self.classes[kind], []).append(Detection(tuple(box), sure))
            for name, detections in objects.items():
                objects[name] = suppress_overlaps(detections, self.max_overlap)
            result.append(objects)
        return result

    def _color(
        self,
        pictures: Tensor,
        asked: Sequence[Requirements],
        found: Sequence[dict[str, list[Detection]]],
    ) -> None:
        """Give those detections their color on which the judgment will depend."""
        wanted = {
            (index, clause.name, rank): None  # in this order, each once
            for index, (required, objects) in enumerate(zip(asked, found, strict=True))
            for clause in required.include
            if clause.color is not None and len(objects.get(clause.name, ())) >= clause.count
            for rank in range(clause.count)
        }
        crops = []
        for index, name, rank in wanted:
            left, top, right, bottom = (round(edge) for edge in found[index][name][rank].box)
            # At least a pixel, where the box rounds to none.
            top, left = min(top, pictures.shape[2] - 1), min(left, pictures.shape[3] - 1)
            rows, columns = slice(top, max(bottom, top + 1)), slice(left, max(right, left + 1))
            crops.append(pictures[index, :, rows, columns])
        colors = self.classify_colors(crops, [name for _, name, _ in wanted])
        for (index, name, rank), color in zip(wanted, colors, strict=True):
            found[index][name][rank] = replace(found[index][name][rank], color=color)

    def classify_colors(self, crops: Sequence[Tensor], names: Sequence[str]) -> list[Color]:
        """The color of the object in each crop, uint8 [3, h, w] of any sizes, by its class's name.

        CLIP's zero-shot classification, as in the original: the nearest of `COLORS`, of which each
        is the mean embedding of `COLOR_TEMPLATES`.
        """
        import torch

        result: list[Color] = []
        for start in range(0, len(crops), self.placement.batch_size):
            part = slice(start, start + self.placement.batch_size)
            device = crops[start].device
            pixels = torch.cat(
                [self._color_classifier.preprocess(crop[None]) for crop in crops[part]]
            )
            embeddings = self._color_classifier.embed_pixels(pixels, device)
            queries = torch.stack([self._color_query(name, device) for name in names[part]])
            nearest = torch.einsum("ncd,nd->nc", queries, embeddings).argmax(1)
            result += [COLORS[index] for index in nearest.tolist()]
        return result

    def _color_query(self, name: str, device: torch.device) -> Tensor:
        """What the colors of a class look like to CLIP: float32 [10, D]."""
        from torch.nn import functional

        if name not in self._color_queries:
            texts = [
                template.format(color=color, name=name)
                for color in COLORS
                for template in COLOR_TEMPLATES
            ]
            each = self._color_classifier.embed_prompts(texts, device)
            mean = each.view(len(COLORS), len(COLOR_TEMPLATES), -1).mean(1)
            self._color_queries[name] = functional.normalize(mean, dim=-1)
        return self._color_queries[name].to(device)

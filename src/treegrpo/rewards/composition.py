"""The miniature's verifiable reward: find the shapes in a picture and hold them against its prompt.

Pixels alone decide. `detect` finds the objects of a whole batch, `composition` grades them in
[0, 1] for training, and `composition_accuracy` says exactly yes or no for evaluation.

A pixel is `background + coverage * (color - background)`, so antialiasing and blur change its
coverage and not its hue. A shape is recognized by laying the ideal circle, square and triangle of
the same area and centroid over the coverage: blur preserves both, whereas a bounding box of
thresholded pixels loses a triangle's tip.

Left out: drawing such pictures and writing their prompts (`miniature/scenes.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional

from treegrpo.errors import UserError
from treegrpo.miniature.scenes import BACKGROUND, COLORS, IMAGE_SIZE, SHAPES, parse, relation_holds
from treegrpo.rewards.registry import Metadata

# Lengths are in pixels of an IMAGE_SIZE picture, color distances Euclidean in [0, 1] RGB.
VISIBLE = 0.3  # least distance from the background that people notice
COLOR_TOLERANCE = 0.22  # the two nearest palette colors are 0.45 apart
COLOR_SPREAD = 0.15  # greatest root mean square inside one object; touching shapes have more
SPECK = 4  # a visible blob of fewer pixels is noise
RADIUS_RANGE = (2.5, 8.0)  # scenes hold radii of 3.5 to 6; the rest is debris or backdrop
EDGE_WIDTH = 1.25  # over this length the ideal shape's edge fades, as a decoder's edges do
# Least intersection over union with the ideal shape. A rhombus and a circle reach 0.84.
SHAPE_OVERLAP = {"circle": 0.86, "square": 0.86, "triangle": 0.8}

_BACKGROUND = np.array(BACKGROUND, np.float32)
_CONTRASTS = np.array(list(COLORS.values()), np.float32) - _BACKGROUND
_CONTRAST_NORMS = np.linalg.norm(_CONTRASTS, axis=1)
_UNIT_AREAS = {"circle": np.pi, "square": 4.0, "triangle": 2.0}
# A triangle's centroid lies a third of its radius below the center of its box.
_CENTROIDS = {"circle": 0.0, "square": 0.0, "triangle": 1 / 3}
# Four-connected within a picture, never from one picture to the next.
_CONNECTIVITY = np.zeros((3, 3, 3), bool)
_CONNECTIVITY[1] = ndimage.generate_binary_structure(2, 1)


@dataclass(frozen=True)
class Detections:
    """The K objects seen in a batch, sorted by picture.

    `picture` int64 [K] is the row in the batch. `color` and `shape` int64 [K] index `COLORS` and
    `SHAPES`, or are -1 where the object is not cleanly one of them. `center` float64 [K, 2] is
    the box center (x, y) in pixels of an `IMAGE_SIZE` picture. `overlap` float64 [K] in [0, 1] is
    the intersection over union with the ideal shape of its area that fits best.
    """

    picture: NDArray[np.int64]
    color: NDArray[np.int64]
    shape: NDArray[np.int64]
    center: NDArray[np.float64]
    overlap: NDArray[np.float64]


def detect(images: Tensor) -> Detections:
    """Find the objects in pictures: float [N, 3, H, W] in [0, 1] (else ValueError), of any size.

    Everything that stands out from the background is an object, recognized or not, except specks.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must have the shape [N, 3, H, W], got {list(images.shape)}")
    images = images.detach().float().cpu()
    size = (IMAGE_SIZE, IMAGE_SIZE)
    if len(images) and images.shape[2:] != size:
        images = functional.interpolate(images, size, mode="bilinear", antialias=True)
    contrast = images.permute(0, 2, 3, 1).numpy() - _BACKGROUND
    labels = _label_objects(contrast)

    padded = np.pad(labels, ((0, 0), (1, 1), (1, 1)))
    band = np.maximum(np.maximum(padded[:, :-2], padded[:, 1:-1]), padded[:, 2:])
    grown = np.maximum(np.maximum(band[..., :-2], band[..., 1:-1]), band[..., 2:])
    core = labels > 0
    for top, left in ((0, 1), (2, 1), (1, 0), (1, 2)):
        core &= padded[:, top : top + IMAGE_SIZE, left : left + IMAGE_SIZE] == labels

    contrast = contrast.reshape(-1, 3)
    areas = np.bincount(labels.ravel())
    mean, color = _colors(contrast[core.ravel()], labels[core], len(areas))
    # Every object with the rim of faint pixels around it.
    owner = np.where(labels, labels, grown).ravel()
    near = np.flatnonzero(owner)
    owner = owner[near]
    power = np.maximum((mean**2).sum(1), 1e-6)
    coverage = np.einsum("pc,pc->p", contrast[near], (mean / power[:, None])[owner]).clip(0, 1)
    rows, columns = np.divmod(near % IMAGE_SIZE**2, IMAGE_SIZE)
    shape, radius, center, overlap = _shapes(owner, columns + 0.5, rows + 0.5, coverage, len(areas))

    picture = np.zeros(len(areas), np.int64)
    picture[owner] = near // IMAGE_SIZE**2
    outsized = (radius < RADIUS_RANGE[0]) | (radius > RADIUS_RANGE[1])
    color[outsized] = shape[outsized] = -1
    objects = np.flatnonzero(areas >= SPECK)
    objects = objects[objects > 0]
    objects = objects[np.argsort(picture[objects], kind="stable")]
    return Detections(
        picture[objects], color[objects], shape[objects], center[objects], overlap[objects]
    )


def _label_objects(contrast: NDArray[np.float32]) -> NDArray[np.int64]:
    """Number the connected objects of a batch: contrast [N, size, size, 3] to [N, size, size]."""
    visible = np.einsum("nyxc,nyxc->nyx", contrast, contrast) > VISIBLE**2
    # Half covered by the palette color of its hue: the edge of a shape, whatever its color.
    seen = contrast[visible]
    alignment = seen @ (_CONTRASTS / _CONTRAST_NORMS[:, None]).T
    solid = np.zeros_like(visible)
    solid[visible] = alignment.max(1) > 0.5 * _CONTRAST_NORMS[alignment.argmax(1)]
    labels, count = ndimage.label(solid, _CONNECTIVITY)
    # Things too pale to be solid anywhere are objects all the same.
    pale, pale_count = ndimage.label(visible, _CONNECTIVITY)
    is_pale = np.ones(pale_count + 1, bool)
    is_pale[0] = is_pale[pale[solid]] = False
    numbered: NDArray[np.int64] = np.where(is_pale[pale], count + pale, labels)
    return numbered


def _colors(
    contrast: NDArray[np.float32], owner: NDArray[np.int64], count: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Mean contrast [count, 3] and color index [count] from the objects' inner pixels."""
    pixels = np.maximum(np.bincount(owner, minlength=count), 1)
    sums = [np.bincount(owner, contrast[:, channel], count) for channel in range(3)]
    mean = np.stack(sums, axis=1) / pixels[:, None]
    squares = np.bincount(owner, np.einsum("pc,pc->p", contrast, contrast), count) / pixels
    spread = squares - (mean**2).sum(1)
    distance = np.linalg.norm(mean[:, None] - _CONTRASTS, axis=2)
    color = distance.argmin(1)
    color[(distance.min(1) > COLOR_TOLERANCE) | (spread > COLOR_SPREAD**2)] = -1
    return mean, color


def _shapes(
    owner: NDArray[np.int64],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    coverage: NDArray[np.float32],
    count: int,
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Of the best ideal shapes: index, radius, box center [count, 2] and overlap, [count] each."""
    area = np.maximum(np.bincount(owner, coverage, count), 1e-6)
    center_x = np.bincount(owner, coverage * x, count) / area
    center_y = np.bincount(owner, coverage * y, count) / area
    x, y = x - center_x[owner], y - center_y[owner]
    overlap = np.empty((len(SHAPES), count))
    radius = np.empty((len(SHAPES), count))
    for index, shape in enumerate(SHAPES):
        radius[index] = np.sqrt(area / _UNIT_AREAS[shape])
        size = radius[index][owner]
        distance = signed_distance(shape, x, y + _CENTROIDS[shape] * size, size)
        ideal = (0.5 - distance / EDGE_WIDTH).clip(0, 1)
        shared = np.bincount(owner, np.minimum(coverage, ideal), count)
        overlap[index] = shared / (area + np.bincount(owner, ideal, count) - shared)
    best = overlap.argmax(0)
    radius = np.take_along_axis(radius, best[None], 0)[0]
    center_y -= np.array([_CENTROIDS[shape] for shape in SHAPES])[best] * radius
    best[overlap.max(0) < np.array([SHAPE_OVERLAP[shape] for shape in SHAPES])[best]] = -1
    return best, radius, np.stack([center_x, center_y], axis=1), overlap.max(0)


def signed_distance(
    shape: str, x: NDArray[np.float64], y: NDArray[np.float64], radius: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Distance from points to the edge lines of a shape centered at 0, negative inside it.

    The shape is that of `treegrpo.miniature.scenes.inside`, scaled by `radius`; y points down.
    """
    if shape == "circle":
        distance: NDArray[np.float64] = np.hypot(x, y) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - radius
    else:
        distance = np.maximum(y - radius, (2 * np.abs(x) - radius - y) / np.sqrt(5))
    return distance


@lru_cache(maxsize=4096)
def _required(prompt: str) -> tuple[NDArray[np.int64], str | None]:
    """The (color, shape) indices [R, 2] that a prompt asks for, and the first two's relation."""
    composition = parse(prompt)
    colors = list(COLORS)
    things = [
        (colors.index(phrase.color), SHAPES.index(phrase.shape))
        for phrase in composition.phrases
        for _ in range(phrase.count)
    ]
    return np.array(things), composition.relation


def _grade(
    things: NDArray[np.int64],
    relation: str | None,
    seen: NDArray[np.int64],
    center: NDArray[np.float64],
) -> float:
    """Hold the objects of one picture, `seen` [D, 2] and `center` [D, 2], against a prompt's."""
    # Color and shape right: 1; only one of them: a half.
    match = (things[:, None] == seen).mean(2)
    most = max(len(things), len(seen))
    if relation is None or len(seen) < 2:
        total = match[linear_sum_assignment(match, maximize=True)].sum()
        return float(total / most * (1.0 if relation is None else 0.5))
    # A relation has two things, so every assignment can be tried.
    return max(
        float(match[0, first] + match[1, second])
        / most
        * (1.0 if relation_holds(relation, *(center[first] - center[second])) else 0.5)
        for first in range(len(seen))
        for second in range(len(seen))
        if first != second
    )


def composition(images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
    """How far each picture shows what its prompt says: float32 [N] in [0, 1].

    Seen objects are assigned to asked ones so that the most agrees: 1 for color and shape, 0.5
    for one of them. The sum is divided by the number asked or seen, whichever is larger, and
    halved where the prompt's relation fails. It is 1 exactly if everything is right.

    Images are float [N, 3, H, W] in [0, 1], of any size. `metadata` is not used.

    Raises:
        ValueError: a prompt is not of the grammar, or the images' shape does not fit.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images do not match {len(prompts)} prompts")
    wanted = [_required(prompt) for prompt in prompts]
    found = detect(images)
    seen = np.stack([found.color, found.shape], axis=1)
    ends = np.searchsorted(found.picture, np.arange(len(prompts) + 1))
    return torch.tensor(
        [
            _grade(things, relation, seen[start:end], found.center[start:end])
            for (things, relation), start, end in zip(wanted, ends[:-1], ends[1:], strict=True)
        ],
        dtype=torch.float32,
    )


def composition_accuracy(images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
    """Whether each picture shows exactly what its prompt says: float32 [N], 0 or 1.

    Right is: the asked objects with their counts, nothing else that is visible, and the relation.
    """
    return (composition(images, prompts, metadata) == 1).float()


class Composition:
    """`composition`, as a reward that refuses prompts of another kind before a run."""

    def __call__(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
        """Float32 [N] in [0, 1]; see `composition`."""
        return composition(images, prompts, metadata)

    def check(self, prompts: list[str], metadata: Metadata) -> None:
        """Raises UserError for the first prompt that is not of the miniature's grammar."""
        for prompt in prompts:
            try:
                _required(prompt)
            except ValueError as error:
                raise UserError(f"{error}; for other prompts choose other rewards") from None


class CompositionAccuracy(Composition):
    """`composition_accuracy`, likewise."""

    def __call__(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
        """Float32 [N], 0 or 1; see `composition_accuracy`."""
        return composition_accuracy(images, prompts, metadata)


def shape_overlap(images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
    """How clean a picture's objects are drawn, whatever they are: float32 [N] in [0, 1].

    The mean overlap of its objects with ideal circles, squares and triangles; 0 without objects.
    Neither `composition` nor its accuracy sees rounded corners or dents that leave a shape what it
    is: watch this beside them. Takes images as they do; prompts and metadata are not used.
    """
    found = detect(images)
    counts = np.bincount(found.picture, minlength=len(images))
    sums = np.bincount(found.picture, found.overlap, len(images))
    return torch.tensor(sums / np.maximum(counts, 1), dtype=torch.float32)

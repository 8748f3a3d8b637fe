"""The miniature's world: prompts about colored shapes, and scenes that show them.

A `Composition` is what a prompt says, a scene is a list of `PlacedShape`, and `render` draws it.
`python -m treegrpo.miniature.scenes` writes the two prompt lists that ship with the package.

Left out: finding shapes in a picture (`rewards/composition.py`), captions (`pretrain.py`).
"""

from __future__ import annotations

import hashlib
import itertools
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

IMAGE_SIZE = 32
BACKGROUND = (0.96, 0.95, 0.92)
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.22, 0.20),
    "green": (0.20, 0.65, 0.32),
    "blue": (0.18, 0.38, 0.86),
    "yellow": (0.96, 0.78, 0.16),
    "purple": (0.60, 0.26, 0.74),
    "black": (0.15, 0.15, 0.18),
}
SHAPES = ("circle", "square", "triangle")
COUNT_WORDS = {"a": 1, "two": 2, "three": 3, "four": 4}
RELATIONS = ("above", "below", "left of", "right of")
MAX_SHAPES = 4


@dataclass(frozen=True)
class Phrase:
    """`count` shapes of one color and kind: "two red circles"."""

    count: int
    color: str
    shape: str

    def __str__(self) -> str:
        word = next(word for word, count in COUNT_WORDS.items() if count == self.count)
        return f"{word} {self.color} {self.shape}{'s' if self.count > 1 else ''}"


@dataclass(frozen=True)
class Composition:
    """What a prompt asks for: one or two phrases; a relation holds from the first to the second."""

    phrases: tuple[Phrase, ...]
    relation: str | None = None

    @property
    def prompt(self) -> str:
        """In the miniature's grammar, which `parse` reads."""
        return f" {self.relation or 'and'} ".join(str(phrase) for phrase in self.phrases)

    @property
    def kind(self) -> str:
        """Which ability the prompt tests: count, binding, relation or mixed (count and binding)."""
        if self.relation:
            return "relation"
        if len(self.phrases) == 1:
            return "count"
        return "binding" if all(phrase.count == 1 for phrase in self.phrases) else "mixed"

    @property
    def combination(self) -> tuple[tuple[int, str, str], ...]:
        """The attributes that occur together, whatever their order and relation."""
        return tuple(sorted((phrase.count, phrase.color, phrase.shape) for phrase in self.phrases))


_PHRASE = (
    rf"(?P<count{{0}}>{'|'.join(COUNT_WORDS)}) "
    rf"(?P<color{{0}}>{'|'.join(COLORS)}) (?P<shape{{0}}>{'|'.join(SHAPES)})s?"
)
_PROMPT = re.compile(
    rf"^{_PHRASE.format(1)}(?: (?P<link>and|{'|'.join(RELATIONS)}) {_PHRASE.format(2)})?$"
)


def parse(prompt: str) -> Composition:
    """Read a prompt of the miniature's grammar, or raise a ValueError that shows the form."""
    match = _PROMPT.match(prompt.strip().lower())
    composition = None
    if match:
        ends = ("1",) if match["link"] is None else ("1", "2")
        phrases = tuple(
            Phrase(COUNT_WORDS[match["count" + end]], match["color" + end], match["shape" + end])
            for end in ends
        )
        composition = Composition(phrases, match["link"] if match["link"] in RELATIONS else None)
    if composition is None or composition.prompt != prompt.strip().lower():
        raise ValueError(
            f"prompt {prompt!r} is not one of the miniature's scenes; write for example "
            "'two red circles', 'a red circle and a blue square' or 'a green triangle above a "
            f"yellow square' (colors: {', '.join(COLORS)}; shapes: {', '.join(SHAPES)}; "
            f"relations: {', '.join(RELATIONS)}; counts up to four)"
        )
    return composition


def all_compositions() -> list[Composition]:
    """Every composition whose prompt is in the grammar, at most four shapes in a scene."""
    things = list(itertools.product(COLORS, SHAPES))
    singles = [
        Composition((Phrase(count, *thing),)) for count in COUNT_WORDS.values() for thing in things
    ]
    pairs = [
        Composition((Phrase(first_count, *first), Phrase(second_count, *second)), relation)
        for first, second in itertools.permutations(things, 2)
        for first_count, second_count in itertools.product((1, 2, 3), repeat=2)
        if first_count + second_count <= MAX_SHAPES
        for relation in ((None, *RELATIONS) if first_count == second_count == 1 else (None,))
    ]
    return singles + pairs


def is_held_out(composition: Composition) -> bool:
    """Whether the composition's attribute combination belongs to evaluation (about 30% do).

    A hash of the combination decides, so every wording, order and relation of the same shapes
    falls on the same side.
    """
    digest = hashlib.sha256(repr(composition.combination).encode()).digest()
    return digest[0] < 0.3 * 256


@dataclass(frozen=True)
class PlacedShape:
    """A shape in a scene; `x`, `y` (the center) and `radius` (half the side) are in pixels."""

    color: str
    shape: str
    x: float
    y: float
    radius: float


def inside(shape: str, u: NDArray[np.floating], v: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Which points lie in the unit shape; `u` right and `v` down, both [-1, 1] across its box."""
    if shape == "circle":
        disk: NDArray[np.bool_] = u**2 + v**2 <= 1
        return disk
    box: NDArray[np.bool_] = (np.abs(u) <= 1) & (np.abs(v) <= 1)
    return box if shape == "square" else box & (np.abs(u) <= (1 + v) / 2)


def relation_holds(relation: str, dx: float, dy: float) -> bool:
    """Whether the first shape stands in `relation` to the second; (dx, dy) is first - second."""
    horizontal = relation in ("left of", "right of")
    along, across = (dx, dy) if horizontal else (dy, dx)
    sign = -1 if relation in ("left of", "above") else 1
    return sign * along > abs(across)


def place(composition: Composition, rng: np.random.Generator) -> list[PlacedShape]:
    """Draw sizes and positions for a composition: nothing overlaps, relations are unmistakable."""
    wanted = [phrase for phrase in composition.phrases for _ in range(phrase.count)]
    smallest, largest = {1: (4.0, 6.0), 2: (4.0, 6.0), 3: (4.0, 5.0), 4: (3.5, 4.5)}[len(wanted)]
    pairs = np.triu_indices(len(wanted), 1)
    while True:
        # Rejection sampling, 64 candidate scenes at a time.
        radii = rng.uniform(smallest, largest, size=(64, len(wanted)))
        margin = radii[..., None] + 1.0
        centers = rng.uniform(margin, IMAGE_SIZE - margin, size=(64, len(wanted), 2))
        distance = np.abs(centers[:, :, None] - centers[:, None]).max(-1)
        gap = distance - (radii[:, :, None] + radii[:, None])
        valid = (gap[:, pairs[0], pairs[1]] >= 2.0).all(-1)
        for candidate in np.flatnonzero(valid):
            if composition.relation:
                dx, dy = centers[candidate, 0] - centers[candidate, 1]
                # Scaled to keep clear of the diagonal, where people would disagree.
                offset = (dx, dy * 1.4) if "of" in composition.relation else (dx * 1.4, dy)
                if not relation_holds(composition.relation, *offset):
                    continue
            return [
                PlacedShape(phrase.color, phrase.shape, float(x), float(y), float(radius))
                for phrase, (x, y), radius in zip(
                    wanted, centers[candidate], radii[candidate], strict=True
                )
            ]


def render(scene: list[PlacedShape], supersample: int = 4) -> NDArray[np.float32]:
    """Draw a scene with antialiased edges: float32 [3, IMAGE_SIZE, IMAGE_SIZE] in [0, 1]."""
    image = np.empty((3, IMAGE_SIZE, IMAGE_SIZE), np.float32)
    image[:] = np.array(BACKGROUND, np.float32)[:, None, None]
    grid = (np.arange(IMAGE_SIZE * supersample) + 0.5) / supersample
    for item in scene:
        u, v = (grid - item.x) / item.radius, (grid - item.y) / item.radius
        fine = inside(item.shape, u[None, :], v[:, None])
        coverage = fine.reshape(IMAGE_SIZE, supersample, IMAGE_SIZE, supersample).mean((1, 3))
        color = np.array(COLORS[item.color], np.float32)[:, None, None]
        image += (coverage * (color - image)).astype(np.float32)
    return image


def corruptions(composition: Composition) -> list[Composition]:
    """Every composition that differs in one count, color or shape, or in the relation.

    A swap of two phrases' colors or shapes counts as one too, since it is how binding goes wrong.
    """
    phrases, relation = composition.phrases, composition.relation
    variants: list[Composition] = []
    for index, phrase in enumerate(phrases):
        changed = [replace(phrase, color=color) for color in COLORS]
        changed += [replace(phrase, shape=shape) for shape in SHAPES]
        if relation is None:
            most = MAX_SHAPES - sum(other.count for other in phrases) + phrase.count
            changed += [replace(phrase, count=count) for count in range(1, most + 1)]
        before, after = phrases[:index], phrases[index + 1 :]
        variants += [Composition((*before, new, *after), relation) for new in changed]
    if len(phrases) == 2:
        first, second = phrases
        for name in ("color", "shape"):
            new_first = replace(first, **{name: getattr(second, name)})
            new_second = replace(second, **{name: getattr(first, name)})
            variants.append(Composition((new_first, new_second), relation))
    if relation:
        variants += [Composition(phrases, other) for other in RELATIONS]
    return [
        variant
        for variant in dict.fromkeys(variants)
        if (variant.combination, variant.relation) != (composition.combination, relation)
        if len({(phrase.color, phrase.shape) for phrase in variant.phrases}) == len(phrases)
    ]


def write_prompts(folder: Path, train_count: int = 480, held_out_count: int = 160) -> None:
    """Write train_prompts.txt and heldout_prompts.txt, balanced over the kinds of prompt."""
    rng = np.random.default_rng(0)
    for name, held_out, count in (("train", False, train_count), ("heldout", True, held_out_count)):
        prompts: list[str] = []
        for kind in ("count", "binding", "relation", "mixed"):
            pool = [
                composition.prompt
                for composition in all_compositions()
                if composition.kind == kind and is_held_out(composition) == held_out
            ]
            chosen = rng.choice(len(pool), size=min(count // 4, len(pool)), replace=False)
            prompts += [pool[index] for index in sorted(chosen)]
        (folder / f"{name}_prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_prompts(Path(__file__).parent)

"""Figures of a comparison over seeds: ends, areas, and the cost of catching up with the weakest.

Left out: one run's figures (`outcome.py`) and how they are shown (`page.py`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from treegrpo.comparison.outcome import Outcome, Point


@dataclass(frozen=True)
class Figure:
    """A mean over seeds, and the standard deviation of single seeds, where there are several."""

    mean: float
    std: float | None

    @staticmethod
    def of(values: Iterable[float]) -> Figure | None:
        """None where there are no values."""
        numbers = list(values)
        if not numbers:
            return None
        spread = statistics.stdev(numbers) if len(numbers) > 1 else None
        return Figure(statistics.fmean(numbers), spread)


@dataclass(frozen=True)
class Row:
    """An entry's figures; all None where every run of it failed.

    Attributes:
        changes: the values that it was tuned to.
        runs, failed: seeds that ended, and that did not.
        forwards: rows without and with gradient.
        cost: in forwards, a row with gradient counted as told.
        area: the mean height of accuracy (else of the reward) over cost, from 0 to the least cost
            at which any run ended.
        catch_up: the cost at which accuracy (else the reward) reaches the weakest entry's end with
            the same seed.
        measured_factor: seconds of a row with gradient over seconds of one without.
    """

    label: str
    changes: tuple[str, ...]
    runs: int
    failed: int
    seconds_per_iteration: Figure | None
    iterations: Figure | None
    rollout_forwards: Figure | None
    update_forwards: Figure | None
    cost: Figure | None
    reward: Figure | None
    accuracy: Figure | None
    area: Figure | None
    catch_up: Figure | None
    measured_factor: Figure | None


def height(point: Point) -> float:
    """What is compared: accuracy where there is one, else the reward."""
    return point.reward if point.accuracy is None else point.accuracy


def summarise(labels: Sequence[str], outcomes: Sequence[Outcome]) -> list[Row]:
    """A row per entry, in their order; failed runs count in `failed` alone."""
    sound = [outcome for outcome in outcomes if outcome.error is None]
    least_cost = min((outcome.cost for outcome in sound), default=0.0)
    weakest: dict[int, float] = {}
    for outcome in sound:
        end = height(outcome.end)
        weakest[outcome.seed] = min(end, weakest.get(outcome.seed, end))
    rows = []
    for label in labels:
        mine = [outcome for outcome in outcomes if outcome.entry == label]
        ended = [outcome for outcome in mine if outcome.error is None]

        def over(value: Callable[[Outcome], float], ended: list[Outcome] = ended) -> Figure | None:
            return Figure.of(value(outcome) for outcome in ended)

        accuracies = [o.end.accuracy for o in ended if o.end.accuracy is not None]
        rows.append(
            Row(
                label,
                mine[0].changes if mine else (),
                len(mine),
                len(mine) - len(ended),
                over(lambda o: o.seconds / max(o.iterations, 1)),
                over(lambda o: o.iterations),
                over(lambda o: o.rollout_forwards),
                over(lambda o: o.update_forwards),
                over(lambda o: o.cost),
                over(lambda o: o.end.reward),
                Figure.of(accuracies),
                over(lambda o: area(o.curve, least_cost)),
                over(lambda o: reached(o.curve, weakest[o.seed])),
                over(measured_factor),
            )
        )
    return rows


def measured_factor(outcome: Outcome) -> float:
    """Seconds of a row with gradient, forward and backward, over those of one without."""
    update = outcome.seconds_update / max(outcome.update_forwards, 1)
    rollout = outcome.seconds_rollout / max(outcome.rollout_forwards, 1)
    return update / rollout if rollout else 0.0


def area(curve: Sequence[Point], upto: float) -> float:
    """The mean height from no cost to some, straight between points."""
    total = 0.0
    for first, second in pairwise(curve):
        stop = min(second.cost, upto)
        if stop > first.cost:
            share = (stop - first.cost) / (second.cost - first.cost)
            at_stop = height(first) + share * (height(second) - height(first))
            total += (stop - first.cost) * (height(first) + at_stop) / 2
    return total / upto if upto else height(curve[0])


def reached(curve: Sequence[Point], target: float) -> float:
    """The first cost at which the height is so large, straight between points.

    Args:
        target: at most the last point's height.
    """
    if height(curve[0]) >= target:
        return curve[0].cost
    for first, second in pairwise(curve):
        if height(second) >= target:
            share = (target - height(first)) / (height(second) - height(first))
            return first.cost + share * (second.cost - first.cost)
    return curve[-1].cost


@dataclass(frozen=True)
class MeanPoint:
    """Points of several seeds, and where on an axis they are in the mean."""

    x: float
    points: tuple[Point, ...]

    def figure(self, value: Callable[[Point], float]) -> Figure:
        """A value over the seeds."""
        figure = Figure.of(value(point) for point in self.points)
        assert figure is not None
        return figure


def mean_curve(outcomes: Sequence[Outcome], axis: Callable[[Point], float]) -> list[MeanPoint]:
    """The mean curve of an entry's runs.

    Seeds have points at nearly the same places, since windows differ: the n-th points are averaged.
    """
    curves = [outcome.curve for outcome in outcomes if outcome.error is None]
    if not curves:
        return []
    length = min(len(curve) for curve in curves)
    # The last points, which are the ends, stay together.
    picked = [[*curve[: length - 1], curve[-1]] for curve in curves]
    return [
        MeanPoint(statistics.fmean(axis(point) for point in column), tuple(column))
        for column in zip(*picked, strict=True)
    ]


def frontier(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats: as high at no more cost."""
    best: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or value > best[-1][1]:
            best.append((cost, value))
    return best

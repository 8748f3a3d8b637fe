"""What an evaluation finds: the scores of one model, or of two side by side, and their figures.

Two models draw every prompt from the same noises, so their scores come in pairs.

Left out: sampling and scoring (`measure.py`, `pair.py`), tables and pages (`report/comparison.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from treegrpo.prompts import Prompt

BASE, TRAINED = "base", "trained"

# The r_max of normalized scores: TreeGRPO's (arXiv 2512.08153, figure 1), then those of shares.
BEST_SCORES = {
    "hpsv2": 1.0,
    "image_reward": 2.0,
    "aesthetic": 10.0,
    "clip_score": 1.0,
    **dict.fromkeys(("composition", "composition_accuracy", "geneval", "ocr", "vlm_judge"), 1.0),
}


def standard_error(scores: Tensor) -> float | None:
    """Standard error of the mean of scores [prompts, images]; None for a single prompt."""
    # Over the prompts' means, since images of one prompt are not independent.
    means = scores.mean(1)
    return (means.std() / len(means) ** 0.5).item() if len(means) > 1 else None


@dataclass(frozen=True)
class Evaluation:
    """Scores of one model.

    Attributes:
        prompts: P texts.
        scores: reward name to float32 [P, images per prompt].
        kept: indices of the prompts whose images were kept, in the list of all prompts.
        images: float32 [kept, images per prompt, 3, height, width]; a video's middle frame.
        seconds: wall time.
    """

    prompts: tuple[str, ...]
    scores: dict[str, Tensor]
    kept: tuple[int, ...]
    images: Tensor
    seconds: float

    def mean(self, name: str) -> float:
        """A reward's mean over prompts and images."""
        return self.scores[name].mean().item()

    def standard_error(self, name: str) -> float:
        """Standard error of that mean; 0 for a single prompt."""
        return standard_error(self.scores[name]) or 0.0

    @staticmethod
    def join(parts: Sequence[Evaluation]) -> Evaluation:
        """One evaluation of all prompts, from those of consecutive shares of them."""
        return Evaluation(
            tuple(prompt for part in parts for prompt in part.prompts),
            {name: torch.cat([part.scores[name] for part in parts]) for name in parts[0].scores},
            tuple(index for part in parts for index in part.kept),
            torch.cat([part.images for part in parts]),
            max(part.seconds for part in parts),
        )


@dataclass(frozen=True)
class Figures:
    """What one reward says of a model, beside its base where there is one.

    Standard errors are over prompts; with a single prompt they are None. Without a base, all that
    compares is None.

    Attributes:
        mean, base_mean: over prompts and noises.
        difference: trained minus base; its error is that of the prompts' differences.
        win_rate: share of pairs in which the trained model scores higher; ties count half.
        normalized_score: (mean - base_mean) / (best score - base_mean), where the best is known.
    """

    mean: float
    standard_error: float | None
    base_mean: float | None = None
    base_standard_error: float | None = None
    difference: float | None = None
    difference_standard_error: float | None = None
    win_rate: float | None = None
    win_rate_standard_error: float | None = None
    normalized_score: float | None = None


def compare(trained: Tensor, base: Tensor | None, best: float | None = None) -> Figures:
    """The figures of scores [prompts, noises] of the same noises; `best` bounds all scores."""
    mean, error = _mean_and_error(trained)
    if base is None:
        return Figures(mean, error)
    base_mean, base_error = _mean_and_error(base)
    difference = _mean_and_error(trained - base)
    wins = _mean_and_error((trained > base).double() + 0.5 * (trained == base).double())
    normalized = None
    if best is not None and base_mean < best:
        normalized = (mean - base_mean) / (best - base_mean)
    return Figures(mean, error, base_mean, base_error, *difference, *wins, normalized)


def _mean_and_error(scores: Tensor) -> tuple[float, float | None]:
    return scores.mean(1).mean().item(), standard_error(scores)


@dataclass
class Comparison:
    """Scores of a model, and of its base if it has one; they fill up while they are measured.

    Attributes:
        model, base: as the user names them.
        rewards: their names.
        noises: that every prompt is drawn from.
        settings: how the images are made, by name; for readers, nothing is computed from it.
        failures: reward to what went wrong.
        scores: reward to model (`BASE`, `TRAINED`) to float64 [prompts, noises]; not yet scored is
            NaN.
    """

    model: str
    base: str | None
    prompts: Sequence[Prompt]
    rewards: Sequence[str]
    noises: int
    settings: Mapping[str, Any]
    failures: dict[str, str] = field(default_factory=dict)
    scores: dict[str, dict[str, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        shape = len(self.prompts), self.noises
        self.scores = {
            reward: {role: torch.full(shape, torch.nan, dtype=torch.float64) for role in self.roles}
            for reward in self.rewards
        }

    @property
    def roles(self) -> list[str]:
        """The models that are scored, in that order."""
        return [TRAINED] if self.base is None else [BASE, TRAINED]

    def figures(self) -> dict[str, Figures]:
        """Reward name to figures, for rewards that have scored every image."""
        return {
            reward: compare(models[TRAINED], models.get(BASE), BEST_SCORES.get(reward))
            for reward, models in self.scores.items()
            if all(scores.isfinite().all() for scores in models.values())
        }

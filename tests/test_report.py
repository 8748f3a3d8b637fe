"""Pictures, and the model card.

Left out: the page of `treegrpo evaluate` (`test_evaluate.py`).
"""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image
from torch import Tensor

from treegrpo.config import load_config
from treegrpo.models.policy import Policy
from treegrpo.plan import RolloutPlan, tree_grpo
from treegrpo.report import style
from treegrpo.report.model_card import write_model_card
from treegrpo.report.pictures import before_after, image_grid, training_curve
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


def test_the_model_card_says_what_was_before_and_what_after(tmp_path: Path) -> None:
    result = TrainingResult(
        folder=tmp_path,
        before={"composition": 0.25, "composition_accuracy": 0.5},
        after={"composition": 0.75, "composition_accuracy": 0.875},
        iterations=7,
        seconds=900.0,
        rollout_forwards=1234,
        update_forwards=56789,
        interrupted=False,
    )
    said = SimpleNamespace(
        pipeline_name="APipeline",
        checkpoint=SimpleNamespace(index={}),
        call_settings=lambda: {"guidance_scale": 2.5},
    )
    write_model_card(tmp_path, load_config(None, []), cast(Policy, said), result)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (
        """
| reward | before | after |
|---|---|---|
| composition | 0.2500 | 0.7500 |
| composition_accuracy | 0.5000 | 0.8750 |
"""
        in card
    )
    assert "7 iterations" in card
    assert "0.25 hours, 1,234 forwards to sample, 56,789 to update" in card
    assert "(APipeline)" in card and "guidance_scale=2.5" in card

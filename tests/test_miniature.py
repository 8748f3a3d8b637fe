"""The embedded default: its prompts, its size, and how good a base model it is."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from treegrpo.batch_size import BatchSize
from treegrpo.config import ModelConfig
from treegrpo.evaluation.measure import evaluate
from treegrpo.evaluation.sampling import Draws
from treegrpo.miniature import scenes
from treegrpo.models.folder import resolve
from treegrpo.models.opening import load_policy
from treegrpo.prompts import load_prompts
from treegrpo.rewards import load_reward


def test_train_and_held_out_prompts_share_no_attribute_combination() -> None:
    train, held_out = (
        {scenes.parse(prompt.text).combination for prompt in load_prompts("miniature", split)}
        for split in ("train", "held_out")
    )
    assert len(train) > 250
    assert len(held_out) > 80
    assert not train & held_out


def test_the_prompt_lists_are_what_the_script_writes(tmp_path: Path) -> None:
    scenes.write_prompts(tmp_path)
    for written in tmp_path.iterdir():
        shipped = resources.files("treegrpo.miniature") / written.name
        assert written.read_text(encoding="utf-8") == shipped.read_text(encoding="utf-8")


def test_every_prompt_reads_back_and_every_corruption_differs() -> None:
    for composition in scenes.all_compositions():
        assert scenes.parse(composition.prompt) == composition
    composition = scenes.parse("two red circles and a blue square")
    for other in scenes.corruptions(composition):
        assert other.prompt != composition.prompt
        assert scenes.parse(other.prompt) == other


def test_a_prompt_outside_the_grammar_is_refused() -> None:
    with pytest.raises(ValueError, match="'a pink circle' is not one of the miniature's scenes"):
        scenes.parse("a pink circle")


def test_scenes_keep_their_shapes_apart_and_inside() -> None:
    rng = np.random.default_rng(0)
    for prompt in ("four black triangles", "two red circles and two blue squares"):
        for _ in range(50):
            placed = scenes.place(scenes.parse(prompt), rng)
            for index, one in enumerate(placed):
                assert one.radius <= min(one.x, one.y)
                assert max(one.x, one.y) <= scenes.IMAGE_SIZE - one.radius
                for other in placed[:index]:
                    apart = max(abs(one.x - other.x), abs(one.y - other.y))
                    assert apart >= one.radius + other.radius + 2


def test_the_checkpoint_is_small_and_an_honest_base_model() -> None:
    """Between 35% and 65% right before training: room to learn, and something to learn from."""
    files = [path for path in Path(resolve("miniature")).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6
    policy = load_policy(ModelConfig(embedding_cache=None), device=torch.device("cpu"))
    forwards = 0

    def count(module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        nonlocal forwards
        forwards += len(keywords["hidden_states"])

    policy.network.register_forward_pre_hook(count, with_kwargs=True)
    accuracy = {"accuracy": load_reward("composition_accuracy")}
    prompts = load_prompts("miniature", "held_out")
    rows: list[int] = []
    policy.network.register_forward_hook(lambda *given: rows.append(len(given[-1][0])))
    draws = Draws(images_per_prompt=2, steps=10, seed=1, max_batch=BatchSize(256))
    result = evaluate(policy, prompts, accuracy, draws)
    assert 0.35 < result.mean("accuracy") < 0.65
    assert sum(rows) == len(prompts) * 2 * 10

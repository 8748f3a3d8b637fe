"""The README's configuration and every recipe: planned on their checkpoints' own configurations.

Left out: the batch sizes that they get and what each phase takes, which need minutes
(benchmarks/recipe_memory.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import pytest
import torch
from recipe_memory import CHECKPOINTS, RECIPES, bytes_of, recipe

from treegrpo.config import RECIPES as ALL
from treegrpo.config import method_of
from treegrpo.memory import LEAST, automatic, estimate
from treegrpo.models.opening import open_policy

ROOT = Path(__file__).parent.parent


def test_none_is_forgotten() -> None:
    assert {name for name in ALL if not name.startswith("miniature")} == RECIPES.keys() - {"README"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_can_be_trained(name: str, tmp_path: Path) -> None:
    config = recipe(name, tmp_path)
    config.check_shares(RECIPES[name][0])
    # What fits into the GPU at hand is found, so that none is tied to one.
    assert automatic(config) == ["max_batch", "decode_batch", "micro_batch"]
    assert config.rollout.transition is None
    policy = open_policy(
        config.model, device=torch.device("cpu"), steps=config.rollout.steps, weights=False
    )
    method = method_of(config)
    for share in method.checked_plans(config.train.iterations):
        method.transitions(policy.schedule(config.rollout.steps), share.plan)


def test_the_readmes_fits_into_the_memory_that_it_says(tmp_path: Path) -> None:
    needed = estimate(recipe("README", tmp_path), LEAST)
    assert needed.parameters in {published for _, _, published in CHECKPOINTS.values()}
    assert needed.peak < 0.9 * bytes_of(RECIPES["README"][1])
    assert needed.disk["embeddings"] < 50 * 2**30

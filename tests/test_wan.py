"""What Wan refuses; tests/test_families.py has the rest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import wan

from treegrpo.config import ModelConfig
from treegrpo.models.folder import ModelError
from treegrpo.models.opening import open_policy


@pytest.mark.parametrize(
    ("frames", "near"), [(-3, "1 or 5"), (4, "1 or 5"), (6, "5 or 9"), (80, "77 or 81")]
)
def test_frames_that_the_decoder_cannot_make_are_refused(
    tmp_path: Path, frames: int, near: str
) -> None:
    wan.build(tmp_path)
    model = ModelConfig(path=str(tmp_path))
    message = rf"model\.frames: got {frames}; must be one more than a multiple of 4 .* as {near}$"
    with pytest.raises(ModelError, match=message):
        open_policy(model.model_copy(update={"frames": frames}), device=torch.device("cpu"))


@pytest.mark.parametrize("settings", [{"boundary_ratio": 0.875}, {"expand_timesteps": True}, {}])
def test_wan_2_2_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    wan.build(tmp_path, **settings)
    if not settings:  # two networks
        shutil.copytree(tmp_path / "transformer", tmp_path / "transformer_2")
        index = tmp_path / "model_index.json"
        parts = json.loads(index.read_text())
        index.write_text(json.dumps({**parts, "transformer_2": parts["transformer"]}))
    with pytest.raises(ModelError, match=r"model\.path: .* is a Wan 2\.2 checkpoint"):
        open_policy(ModelConfig(path=str(tmp_path)), device=torch.device("cpu"))

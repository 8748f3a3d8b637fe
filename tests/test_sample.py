"""`treegrpo sample`: what it writes beside the grid.

Left out: what a model draws (test_families.py), the refusals (test_cli.py, test_refusals.py).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from command_line import CommandLine
from PIL import Image

from treegrpo.config import ModelConfig
from treegrpo.evaluation.sampling import Draws, sample
from treegrpo.images import to_uint8
from treegrpo.models.opening import load_policy


def test_every_picture_by_itself(
    tiny_checkpoint: Path, tmp_path: Path, treegrpo: CommandLine
) -> None:
    folder = tmp_path / "each"
    given = ("sample", str(tiny_checkpoint), "--prompt", "a", "--prompt", "b", "--count", "2")
    options = ("--steps", "2", "--seed", "5", "--out", str(tmp_path / "grid.png"))
    code, _, err = treegrpo(*given, *options, "--each", str(folder))
    assert code == 0, err
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["000-0.png", "000-1.png", "001-0.png", "001-1.png"]
    policy = load_policy(ModelConfig(path=str(tiny_checkpoint)), device=torch.device("cpu"))
    expected = to_uint8(sample(policy, ["a", "b"], Draws(2, 2, 5)).flatten(0, 1))
    for name, picture in zip(names, expected, strict=True):
        written = np.asarray(Image.open(folder / name)).astype(int)
        assert abs(written - picture.permute(1, 2, 0).numpy()).max() <= 1
    message = treegrpo.refusal(*given, *options, "--each", str(folder))
    assert message == f"--each: {folder} must be a new or an empty folder"

"""What tests share. One thread each, here and in what they start: results then repeat exactly."""

import os
from pathlib import Path

import pytest
from command_line import CommandLine

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests leave nothing in the user's cache folder."""
    os.environ["TREEGRPO_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 3 checkpoint of random weights: the miniature's, with 2 narrow layers."""
    import torch
    from diffusers import SD3Transformer2DModel

    from treegrpo.miniature import pretrain
    from treegrpo.models.switches import quiet_libraries

    quiet_libraries()
    torch.manual_seed(0)
    pipeline = pretrain.build_pipeline()
    smaller = SD3Transformer2DModel.from_config(
        pipeline.transformer.config,
        num_layers=2,
        num_attention_heads=1,
        caption_projection_dim=32,
        pos_embed_max_size=8,  # room for pictures wider than its own
    )
    pipeline.register_modules(transformer=smaller)
    folder = tmp_path_factory.mktemp("tiny_checkpoint")
    pretrain.save(pipeline, folder)
    return folder


@pytest.fixture
def treegrpo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> CommandLine:
    """In an empty folder, with wide lines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return CommandLine(capsys, monkeypatch)


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers on this machine are asked again at once."""
    from treegrpo.rewards import http

    monkeypatch.setattr(http, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(http, "LONGEST_WAIT", 0.02)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

"""Model cards: what hubs read, what people read, and what they must not hold."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import yaml
from huggingface_hub import ModelCard

from treegrpo.config import load_config
from treegrpo.evaluation.results import Figures
from treegrpo.models.policy import Policy
from treegrpo.report.model_card import write_model_card
from treegrpo.report.run import TrainingResult


def figures(before: float, after: float) -> Figures:
    change = after - before
    return Figures(after, 0.0123, before, 0.0234, change, 0.0346, 0.5, 0.01)


RESULT = TrainingResult(
    folder=Path(),
    before={"composition": 0.25, "composition_accuracy": 0.5},
    after={"composition": 0.75, "composition_accuracy": 0.53125},
    figures={
        "composition": figures(0.25, 0.75),
        "composition_accuracy": figures(0.5, 0.53125),
    },
    held_out=138,
    iterations=7,
    seconds=900.0,
    rollout_forwards=1234,
    update_forwards=56789,
    interrupted=False,
)


def card_of(folder: Path, result: TrainingResult, *changes: str, frames: int | None = None) -> str:
    said = SimpleNamespace(
        pipeline_name="APipeline",
        checkpoint=SimpleNamespace(index={}, folder=folder / "base"),
        call_settings=lambda: {"guidance_scale": 2.5},
        sampling=SimpleNamespace(frames=frames),
    )
    (folder / "model").mkdir(exist_ok=True)
    config = load_config(None, list(changes))
    write_model_card(folder / "model", config, cast(Policy, said), replace(result, folder=folder))
    return (folder / "model" / "README.md").read_text(encoding="utf-8")


def test_the_model_card_says_what_was_before_and_what_after(tmp_path: Path) -> None:
    (tmp_path / "before_after.png").write_bytes(b"a picture")
    card = card_of(tmp_path, RESULT)
    assert (
        """
| reward | before | after | change |
|---|---|---|---|
| composition | 0.250 ± 0.023 | 0.750 ± 0.012 | +0.500 ± 0.035 |
| composition_accuracy | 0.500 ± 0.023 | 0.531 ± 0.012 | +0.031 ± 0.035 |
"""
        in card
    )
    assert "On 138 held-out prompts, after 7 iterations:" in card
    rose = "the mean composition rose: from 0.250 ± 0.023 to 0.750 ± 0.012 (+0.500 ± 0.035)"
    assert rose in card
    assert "the mean composition_accuracy rose" not in card  # it was only watched
    assert "15 min, 1,234 forwards to sample, 56,789 to update" in card
    assert "(APipeline)" in card and "guidance_scale=2.5" in card
    assert "![The same prompts and noises before and after training](before_after.png)" in card
    assert (tmp_path / "model" / "before_after.png").read_bytes() == b"a picture"
    # What is within two standard errors may be chance.
    small = replace(RESULT, figures=RESULT.figures | {"composition": figures(0.5, 0.53125)})
    assert "composition did not change by more than chance would" in card_of(tmp_path, small)
    none = Figures(0.5, 0.0, 0.5, 0.0, 0.0, 0.0)
    same = replace(RESULT, figures=RESULT.figures | {"composition": none})
    assert "composition did not change: from 0.5000 to 0.5000 (+0.0000)" in card_of(tmp_path, same)


def test_the_model_card_has_the_header_that_hubs_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    header = "license: other\nlicense_name: a-licence\nlicense_link: LICENSE.md"
    (tmp_path / "base" / "README.md").write_text(f"---\n{header}\n---\n# A model\n")
    lora = ("model.lora_rank=4", "rollout.method=flow_grpo")
    card_of(tmp_path, RESULT, "model.path=someone/a-model", *lora)
    data = ModelCard.load(tmp_path / "model" / "README.md").data.to_dict()
    assert data == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["treegrpo", "reinforcement-learning", "flow_grpo", "lora"],
        "license": "other",
        "license_name": "a-licence",
        "license_link": "https://huggingface.co/someone/a-model/blob/main/LICENSE.md",
        "base_model": "someone/a-model",
        "base_model_relation": "adapter",
    }
    # A folder is no name of a hub, and a card without a licence gives none.
    (tmp_path / "base" / "README.md").write_text("# A model\n")
    card_of(tmp_path, RESULT, f"model.path={tmp_path / 'base'}", frames=5)
    assert ModelCard.load(tmp_path / "model" / "README.md").data.to_dict() == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-video",
        "tags": ["treegrpo", "reinforcement-learning", "tree_grpo"],
    }


@pytest.mark.parametrize("lora", [0, 4])
def test_the_model_card_holds_nothing_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: int
) -> None:
    monkeypatch.chdir(tmp_path)
    secret = tmp_path / "secret"
    for name in ("a-base", "cache", "weights"):
        (secret / name).mkdir(parents=True)
    (secret / "prompts.txt").write_text("a red circle\n")
    server = {
        "name": "http://10.0.0.7:8000",
        "weight": 0,
        "options": {"headers": {"Authorization": "hidden"}, "token_env": "HIDDEN"},
    }
    keeps = "toy_rewards:Keeps"
    own = {"name": keeps, "options": {"path": str(secret / "weights"), "digits": 3}}
    card = card_of(
        tmp_path,
        replace(RESULT, figures=dict.fromkeys((keeps, "http://10.0.0.7:8000"), figures(0, 1))),
        f"model.path={secret / 'a-base'}",
        f"model.lora_rank={lora}",
        f"model.embedding_cache={secret / 'cache'}",
        "prompts.train=secret/prompts.txt",
        f"rewards={json.dumps([own, server])}",
        f"output={secret / 'runs' / 'x'}",
    )
    for word in ("secret", str(tmp_path), "10.0.0.7", "hidden", "HIDDEN"):
        assert word not in card
    configuration = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert configuration["model"]["path"] == "a-base"
    assert configuration["prompts"]["train"] == "prompts.txt"
    assert configuration["rewards"][0]["options"] == {"path": "weights", "digits": 3}
    assert configuration["rewards"][1]["name"] == "a server"
    assert "toy_rewards:Keeps" in card
    assert ("FOLDER_OF_THE_BASE_MODEL" in card) == bool(lora)

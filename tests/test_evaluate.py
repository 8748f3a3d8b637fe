"""Scores and figures, and `treegrpo evaluate` through the command line.

Left out: held-out prompts over several processes (`test_processes.py`).
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints.stable_diffusion
import tiny_checkpoints.wan
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from treegrpo import cli
from treegrpo.batch_size import BatchSize
from treegrpo.config import ModelConfig
from treegrpo.errors import UserError
from treegrpo.evaluation import pair
from treegrpo.evaluation.measure import evaluate
from treegrpo.evaluation.results import Evaluation, compare
from treegrpo.evaluation.sampling import Draws, sample
from treegrpo.miniature import EMBEDDED
from treegrpo.models.adapters import add_lora
from treegrpo.models.export import export
from treegrpo.models.opening import load_policy
from treegrpo.models.policy import Policy
from treegrpo.prompts import Prompt
from treegrpo.report import comparison
from treegrpo.rewards import load_reward

Run = Callable[..., tuple[int, str, str]]
REWARD = f"{__name__}:weighted_brightness"


def load(folder: Path) -> Policy:
    model = ModelConfig(path=str(folder), embedding_cache=None)
    return load_policy(model, device=torch.device("cpu"))


def weighted_brightness(
    images: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]
) -> torch.Tensor:
    weights = torch.tensor([one.get("weight", 1.0) for one in metadata])
    return images.mean((1, 2, 3)) * weights


failed: list[list[str]] = []


def fails_on_bright_images(
    images: torch.Tensor, prompts: list[str], metadata: object
) -> torch.Tensor:
    if images.mean() > 0.5:
        failed.append(prompts)
        raise RuntimeError("too bright")
    return images.mean((1, 2, 3))


class RefusesColor:
    def __init__(self, color: str = "red") -> None:
        self.color = color

    def check(self, prompts: list[str], metadata: object) -> None:
        for prompt in prompts:
            if self.color in prompt:
                raise UserError(f"prompt {prompt!r} is {self.color}")

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata: object) -> torch.Tensor:
        return images.mean((1, 2, 3))


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def treegrpo(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `treegrpo evaluate`: the exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["treegrpo", "evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        output = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, output.out, output.err

    return run


@pytest.fixture(scope="module")
def gray(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Checkpoints whose every image is one gray, by its brightness."""

    def build(brightness: float) -> Path:
        folder = tmp_path_factory.mktemp("gray") / "model"
        shutil.copytree(tiny_checkpoint, folder)
        file = folder / "vae" / "diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        weights["decoder.conv_out.weight"].zero_()
        weights["decoder.conv_out.bias"].fill_(2 * brightness - 1)
        save_file(weights, file, metadata={"format": "pt"})
        return folder

    return build


MINIATURES = ("--prompts", "miniature")
SHORT = (*MINIATURES, "--steps", 2, "--max-prompts", 2, "--images-per-prompt", 1)


def test_figures_are_those_of_the_formulas() -> None:
    trained = torch.tensor([[1.0, 3.0], [2.0, 4.0], [0.0, 5.0]], dtype=torch.float64)
    base = torch.tensor([[1.0, 1.0], [3.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    found = compare(trained, base, best=10.0)
    # Prompts' means are 2, 3, 2.5 and 1, 2, 0; their differences 1, 1, 2.5.
    assert (found.mean, found.base_mean, found.difference) == (2.5, 1.0, 1.5)
    assert found.standard_error == pytest.approx(0.5 / 3**0.5)
    assert found.base_standard_error == pytest.approx(1 / 3**0.5)
    assert found.difference_standard_error == pytest.approx(0.75**0.5 / 3**0.5)
    # Prompts' win rates are 3/4, 1/2, 3/4.
    assert found.win_rate == pytest.approx(2 / 3)
    assert found.win_rate_standard_error == pytest.approx((1 / 48) ** 0.5 / 3**0.5)
    assert found.normalized_score == pytest.approx(1.5 / 9)
    # One prompt says nothing about the spread over prompts, and a perfect base leaves no room.
    single = compare(trained[:1], trained[:1], best=2.0)
    assert single.difference == 0 and single.win_rate == 0.5
    assert single.standard_error is single.normalized_score is None


def test_the_standard_error_is_over_prompts() -> None:
    scores = torch.tensor([[1.0, 3.0], [2.0, 4.0], [0.0, 5.0]])
    whole = Evaluation(("a", "b", "c"), {"x": scores}, (), torch.empty(0), 0.0)
    assert whole.mean("x") == 2.5
    assert whole.standard_error("x") == pytest.approx(0.5 / 3**0.5)
    single = Evaluation(("a",), {"x": scores[:1]}, (), torch.empty(0), 0.0)
    assert single.standard_error("x") == 0


def test_shares_join_to_the_whole(tiny_checkpoint: Path) -> None:
    policy = load(tiny_checkpoint)
    prompts = [Prompt(text, {"weight": float(i)}) for i, text in enumerate("abc")]

    def evaluated(share: range | None, max_batch: int = 2) -> Evaluation:
        return evaluate(
            policy,
            prompts,
            {"x": load_reward(REWARD)},
            Draws(images_per_prompt=2, steps=2, seed=1, max_batch=BatchSize(max_batch)),
            keep=[2, 0],
            share=share,
        )

    whole, *parts = (evaluated(share) for share in (None, range(1), range(1, 1), range(1, 3)))
    joined = Evaluation.join(parts)
    assert joined.prompts == whole.prompts == ("a", "b", "c")
    assert joined.kept == whole.kept == (0, 2)
    assert torch.equal(joined.scores["x"], whole.scores["x"])
    assert torch.equal(joined.images, whole.images)
    # Nor do the noises depend on how prompts are batched.
    torch.testing.assert_close(evaluated(None, max_batch=6).scores["x"], whole.scores["x"])
    brightness = whole.images.mean((2, 3, 4)) * torch.tensor([[0.0], [2.0]])
    torch.testing.assert_close(whole.scores["x"][[0, 2]], brightness, atol=5e-3, rtol=0)


def test_measuring_imports_nothing_that_only_reports_need() -> None:
    code = """
import sys
import treegrpo.evaluation.measure, treegrpo.evaluation.pair
print({"rich", "PIL", "html", "matplotlib", "treegrpo.report"} & set(sys.modules))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "set()\n"


def test_a_model_is_exactly_as_good_as_itself(treegrpo: Run, tiny_checkpoint: Path) -> None:
    rewards = ("--rewards", f"composition,{REWARD}", "--reward", "jpeg_compressibility")
    code, out, _ = treegrpo(
        tiny_checkpoint, "--base", tiny_checkpoint, *SHORT, *rewards, "--seeds", 2, "--json", "a"
    )
    assert code == 0
    assert "50.0%" in out
    summary = json.loads(Path("a").read_text())
    assert list(summary["rewards"]) == ["composition", REWARD, "jpeg_compressibility"]
    for figures in summary["rewards"].values():
        assert figures["difference"] == figures["difference_standard_error"] == 0
        assert figures["win_rate"] == 0.5
        assert figures["mean"] == figures["base_mean"]
    for prompt in summary["per_prompt"]:
        scores = prompt["scores"][REWARD]
        assert scores["base"] == scores["trained"]
        assert len(set(scores["trained"])) == 2  # the seeds' noises are independent


def test_scores_are_those_of_the_images(treegrpo: Run, tiny_checkpoint: Path) -> None:
    treegrpo(tiny_checkpoint, *SHORT, "--reward", REWARD, "--seeds", 2, "--json", "scores.json")
    summary = json.loads(Path("scores.json").read_text())
    assert summary["base"] is None
    policy = load(tiny_checkpoint)
    prompts = [one["prompt"] for one in summary["per_prompt"]]
    for seed in range(2):
        images = sample(policy, prompts, Draws(images_per_prompt=1, steps=2, seed=seed))
        means = (images * 255).round().mean((1, 2, 3, 4)) / 255
        scores = [one["scores"][REWARD]["trained"][seed] for one in summary["per_prompt"]]
        # One pixel that is rounded the other way moves the mean by 1.3e-6.
        assert scores == pytest.approx(means.tolist(), abs=2e-6)


def test_rewards_get_their_options(treegrpo: Run, tiny_checkpoint: Path) -> None:
    name = f"{__name__}:RefusesColor"
    options = {name: {"color": "pink"}}
    Path("options.yaml").write_text(yaml.safe_dump(options))
    arguments = ("--rewards", name, "--reward-options", "options.yaml", "--json", "s.json")
    code, _, _ = treegrpo(tiny_checkpoint, *SHORT, *arguments)
    assert code == 0
    assert json.loads(Path("s.json").read_text())["reward_options"] == options


def test_a_known_shift_gives_known_figures(treegrpo: Run, gray: Callable[..., Path]) -> None:
    weights = {"plain": 1.0, "nothing": 0.0, "reversed": -1.0, "double": 2.0}
    lines = [json.dumps({"text": text, "weight": weight}) for text, weight in weights.items()]
    Path("prompts.jsonl").write_text("\n".join(lines))
    code, _, _ = treegrpo(
        gray(0.8),
        *("--base", gray(0.2), "--prompts", "prompts.jsonl", "--column", "text"),
        *("--rewards", REWARD, "--steps", 2, "--seeds", 2, "--max-batch", 3, "--json", "s.json"),
    )
    assert code == 0
    summary = json.loads(Path("s.json").read_text())
    figures = summary["rewards"][REWARD]
    # Differences are 0.6 times the weights, whose mean is 0.5 and whose variance is 5/3.
    assert figures["base_mean"] == pytest.approx(0.1)
    assert figures["mean"] == pytest.approx(0.4)
    assert figures["difference"] == pytest.approx(0.3)
    assert figures["difference_standard_error"] == pytest.approx(0.6 * (5 / 3) ** 0.5 / 2)
    assert figures["win_rate"] == (1 + 0.5 + 0 + 1) / 4
    assert figures["normalized_score"] is None
    assert summary["sampling"]["steps"] == 2
    assert [one["prompt"] for one in summary["per_prompt"]] == list(weights)
    assert summary["per_prompt"][3]["scores"][REWARD] == {
        "base": pytest.approx([0.4] * 4),
        "trained": pytest.approx([1.6] * 4),
    }


# --- which base ---


def lora_export(base: Path, folder: Path) -> Path:
    """Adapters that change something: fresh ones are the identity."""
    policy = load(base)
    add_lora(policy, ModelConfig(lora_rank=2, lora_alpha=2.0))
    torch.manual_seed(0)
    for parameter in policy.network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    export(policy, folder, str(base))
    return folder


def test_adapters_are_compared_with_their_checkpoint(treegrpo: Run, tiny_checkpoint: Path) -> None:
    model = lora_export(tiny_checkpoint, Path("adapters"))
    code, out, _ = treegrpo(model, *SHORT, "--reward", REWARD, "--json", "s.json")
    assert code == 0
    assert f"sampling {tiny_checkpoint}" in out.replace("\n", "")
    summary = json.loads(Path("s.json").read_text())
    assert summary["base"] == str(tiny_checkpoint)
    assert summary["rewards"][REWARD]["difference"] != 0


def test_a_runs_model_is_compared_with_what_it_was_trained_from(
    treegrpo: Run, tiny_checkpoint: Path
) -> None:
    shutil.copytree(tiny_checkpoint, "runs/x/model")
    sampling = {"steps": 3, "height": 48, "width": 16}  # as it was trained
    Path("runs/x/model/sampling.json").write_text(json.dumps(sampling))
    Path("runs/x/config.yaml").write_text(yaml.safe_dump({"model": {"path": str(tiny_checkpoint)}}))
    arguments = ("--max-prompts", 1, "--reward", REWARD, "--json", "s.json")
    code, _, _ = treegrpo("runs/x/model/", *arguments)
    assert code == 0
    summary = json.loads(Path("s.json").read_text())
    assert summary["base"] == str(tiny_checkpoint)
    assert summary["sampling"].items() >= sampling.items()
    assert summary["rewards"][REWARD]["difference"] == 0
    code, _, _ = treegrpo("runs/x/model", "--base", "none", *arguments)
    assert json.loads(Path("s.json").read_text())["base"] is None
    Path("runs/x/config.yaml").write_text("model: {path: ./moved}")
    code, _, err = treegrpo("runs/x/model", *arguments)
    assert code == 2
    assert "config.yaml (--base names another): no folder ./moved" in err


# --- the page ---


class Page(HTMLParser):
    """Text, and by their descriptions the images of a page that loads nothing."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.text = ""
        self.images: dict[str, list[Image.Image]] = {}
        self.keys: list[list[float]] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        assert tag != "link" and "onclick" not in values
        if tag == "article":
            self.keys.append(json.loads(values["data-keys"] or ""))
        if source := values.get("src"):
            kind, _, data = source.partition(";base64,")
            assert kind in ("data:image/png", "data:image/jpeg")
            image = Image.open(io.BytesIO(base64.b64decode(data)))
            self.images.setdefault(values["alt"] or "", []).append(image.convert("RGB"))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_both_images_of_every_prompt(
    treegrpo: Run, gray: Callable[..., Path]
) -> None:
    prompts = ['a "red" circle <script>alert(1)</script>', "blue & green"]
    Path("prompts.txt").write_text("\n".join(prompts))
    code, out, _ = treegrpo(
        gray(0.8),
        *("--base", gray(0.2), "--prompts", "prompts.txt", "--reward", REWARD),
        *("--images-per-prompt", 1, "--steps", 2, "--page", "report"),
    )
    assert code == 0
    assert "wrote report/index.html" in out
    page = Page(Path("report/index.html"))
    for prompt in prompts:
        assert prompt in page.text
        (base,), (trained,) = (page.images[f"{role}: {prompt}"] for role in ("base", "trained"))
        assert base.getpixel((16, 16)) == (51, 51, 51)
        assert trained.getpixel((16, 16)) == (204, 204, 204)
    assert len(page.images) == 4
    assert page.keys == [[pytest.approx(0.6)]] * 2
    for words in ("0.2000", "0.8000", "+0.6000", "100.0%", version("torch"), "2 prompts"):
        assert words in page.text


def test_a_page_of_many_prompts_says_which_it_shows(
    treegrpo: Run, gray: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "PICTURED_PROMPTS", 2)
    Path("prompts.txt").write_text("\n".join("abcdef"))
    treegrpo(
        gray(0.8),
        *("--prompts", "prompts.txt", "--reward", REWARD, "--images-per-prompt", 3),
        *("--steps", 2, "--seeds", 2, "--max-batch", 6, "--page", "alone.HTML"),
    )
    page = Page(Path("alone.HTML"))
    assert "2 of 6 prompts" in page.text
    assert {name: len(images) for name, images in page.images.items()} == {
        "trained: b": 2,
        "trained: e": 2,
    }


def test_large_images_become_small_files() -> None:
    gradient = torch.linspace(0, 1, 1024).expand(3, 512, 1024)
    kind, _, data = comparison.thumbnail(gradient).partition(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (kind, image.size) == ("data:image/jpeg", (320, 160))


def test_a_videos_middle_frame_is_shown(treegrpo: Run) -> None:
    tiny_checkpoints.wan.build(Path("wan"))
    Path("prompts.txt").write_text("a cat")
    arguments = ("--prompts", "prompts.txt", "--images-per-prompt", 1, "--steps", 2)
    code, _, _ = treegrpo("wan", *arguments, "--reward", REWARD, "--page", "p.html")
    assert code == 0
    policy = load(Path("wan"))
    (video,) = sample(policy, ["a cat"], Draws(images_per_prompt=1, steps=2))[0]
    assert len(video) == 5
    expected = (video[2] * 255).round().byte().permute(1, 2, 0)
    (shown,) = Page(Path("p.html")).images["trained: a cat"]
    assert torch.equal(torch.tensor(np.asarray(shown)), expected)


# --- what goes wrong ---


@pytest.mark.slow
def test_a_failing_reward_costs_neither_the_others_nor_its_own_scores(
    treegrpo: Run, gray: Callable[..., Path]
) -> None:
    failing = f"{__name__}:fails_on_bright_images"
    code, out, err = treegrpo(
        gray(0.8),
        *("--base", gray(0.2), *SHORT, "--rewards", f"{failing},{REWARD}"),
        *("--max-batch", 1, "--json", "s.json", "--page", "p.html"),
    )
    assert code == 2
    assert len(failed) == 1  # and was not asked again
    assert "too bright" in err and "Traceback" not in err
    assert "100.0%" in out
    summary = json.loads(Path("s.json").read_text())
    assert not summary["complete"]
    assert list(summary["rewards"]) == [REWARD]
    assert "too bright" in summary["failures"][failing]
    for one in summary["per_prompt"]:
        assert one["scores"][failing] == {"base": [pytest.approx(0.2)], "trained": [None]}
        assert one["scores"][REWARD]["trained"] == [pytest.approx(0.8)]
    assert "is left out" in Page(Path("p.html")).text
    # Without any reward left, nothing more is sampled; what there is has been written.
    code, out, err = treegrpo(
        gray(0.8), *("--base", gray(0.2), *SHORT, "--reward", failing, "--json", "alone.json")
    )
    assert code == 2
    assert "too bright" in err
    alone = json.loads(Path("alone.json").read_text())
    assert alone["per_prompt"] == [
        {"prompt": one["prompt"], "scores": {failing: one["scores"][failing]}}
        for one in summary["per_prompt"]
    ]


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_weights(*arguments: object, **settings: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(pair, "load_weights", load_weights)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rewards", "composition,compositon"], "--rewards: reward 'compositon' is unknown"),
        (["--rewards", "ocr", "--reward", "ocr"], "--rewards: 'ocr' is given 2 times"),
        (["--rewards", "composition,"], "--rewards: reward '' is unknown"),
        (["--prompts", "prompts.txt"], "--rewards: must be given"),
        (["--prompts", "prompts.txt", "--column", "x", "--reward", "q:r"], "--reward: reward"),
        (["--reward-options", "none.yaml"], "--reward-options: none.yaml does not exist"),
        (["--reward-options", "prompts.txt"], "--reward-options: prompts.txt must hold options"),
        (["--reward-options", "hpsv2.yaml"], "--reward-options: hpsv2.yaml has options of 'hpsv2'"),
        (
            ["--reward-options", "hpsv2.yaml", "--reward", "hpsv2"],
            "--reward: reward 'hpsv2': unknown option 'pth'; did you mean 'path'?",
        ),
        (["--seeds", "0"], "Invalid value for '--seeds'"),
        (["--dtype", "float16"], "Invalid value for '--dtype'"),
        (["--json", "folder"], "--json: folder is a folder; must be a file"),
        (["--json", "locked/s.json"], "--json: the folder locked may not be written to"),
        (["--page", "no/folder/at/all"], "--page: no folder no/folder/at to write all in"),
        (["--page", "prompts.txt"], "--page: prompts.txt is a file; must be a folder, or"),
        (["--page", "locked"], "--page: the folder locked may not be written to"),
        (["--base", "./nothing"], "--base: no folder ./nothing"),
        (["--base", "other"], "--base: other is a StableDiffusionPipeline, "),
        (["--base", "deeper"], "--base: deeper starts from noise of shape [8, "),
        (
            ["--reward", f"{__name__}:RefusesColor"],
            f"reward '{__name__}:RefusesColor': prompt 'a red",
        ),
    ],
)
def test_mistakes_are_refused_before_weights_are_read(
    arguments: list[str],
    message: str,
    treegrpo: Run,
    tiny_checkpoint: Path,
    no_weights: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("prompts.txt").write_text("a cat")
    Path("hpsv2.yaml").write_text("hpsv2: {pth: x}")
    Path("folder").mkdir()
    Path("locked").mkdir()
    # Not by permissions: whoever runs the tests may have all of them.
    access = os.access
    monkeypatch.setattr(
        os,
        "access",
        lambda path, mode: access(path, mode) and (mode != os.W_OK or str(path) != "locked"),
    )
    if "other" in arguments:
        tiny_checkpoints.stable_diffusion.build_1_5(Path("other"))
    if "deeper" in arguments:
        shutil.copytree(tiny_checkpoint, "deeper")
        for part in ("transformer", "vae"):
            file = Path("deeper") / part / "config.json"
            config = json.loads(file.read_text())
            key = "in_channels" if part == "transformer" else "latent_channels"
            file.write_text(json.dumps({**config, key: 8}))
    code, out, err = treegrpo(tiny_checkpoint, *MINIATURES, *arguments)
    assert code == 2
    assert out == ""
    assert message in " ".join(err.replace("│", " ").split())
    assert not Path("s.json").exists()


# --- the run that a model is of ---


def test_prompts_and_rewards_are_those_of_the_models_run(
    treegrpo: Run, tiny_checkpoint: Path
) -> None:
    lines = [json.dumps({"text": f"no {n}", "weight": n / 4}) for n in range(4)]
    Path("prompts.jsonl").write_text("\n".join(lines))
    label, options = "mine", {"color": "pink"}
    rewards = [
        {"name": REWARD, "label": label, "frames": 3},
        {"name": f"{__name__}:RefusesColor", "options": options, "weight": 0},
    ]
    config = {
        "model": {"path": str(tiny_checkpoint)},
        "prompts": {"train": "miniature", "held_out": "prompts.jsonl", "column": "text"},
        "rewards": rewards,
        "evaluation": {"max_prompts": 3},
    }
    shutil.copytree(tiny_checkpoint, "runs/x/model")
    Path("runs/x/config.yaml").write_text(yaml.safe_dump(config))
    own = ("--steps", 2, "--images-per-prompt", 1, "--json", "s.json")

    def summary(*arguments: object) -> dict[str, Any]:
        code, _, err = treegrpo(*arguments, *own)
        assert code == 0, err
        told: dict[str, Any] = json.loads(Path("s.json").read_text())
        return told

    for model in ("runs/x", "runs/x/model"):
        told = summary(model)
        assert [one["prompt"] for one in told["per_prompt"]] == ["no 0", "no 1", "no 2"]
        assert list(told["rewards"]) == [label, f"{__name__}:RefusesColor"]
        assert told["reward_options"] == {f"{__name__}:RefusesColor": options}
        assert told["model"] == "runs/x/model" and told["base"] == str(tiny_checkpoint)
        # The prompts' metadata reach the reward.
        assert told["per_prompt"][0]["scores"][label]["trained"] == [0]
    # Each is the run's until it is given.
    told = summary("runs/x", "--rewards", f"jpeg_compressibility,{label}")
    assert list(told["rewards"]) == ["jpeg_compressibility", label]
    assert len(told["per_prompt"]) == 3
    told = summary("runs/x", "--prompts", "miniature", "--max-prompts", 1)
    assert list(told["rewards"]) == [label, f"{__name__}:RefusesColor"]
    assert len(told["per_prompt"]) == 1 and not told["per_prompt"][0]["prompt"].startswith("no")
    told = summary("runs/x", "--max-prompts", 2)
    assert len(told["per_prompt"]) == 2


@pytest.mark.parametrize("name", EMBEDDED)
def test_an_embedded_model_brings_its_prompts_and_rewards(treegrpo: Run, name: str) -> None:
    code, _, err = treegrpo(name, "--max-prompts", 1, "--steps", 2, "--json", "summary.json")
    assert code == 0, err
    told = json.loads(Path("summary.json").read_text(encoding="utf-8"))
    assert list(told["rewards"]) == ["composition", "composition_accuracy"]


def test_without_a_run_prompts_and_rewards_are_asked_for(
    treegrpo: Run, tiny_checkpoint: Path
) -> None:
    code, out, err = treegrpo(tiny_checkpoint)
    assert (code, out) == (2, "")
    for option in ("prompts", "rewards"):
        assert f"\n  --{option}: must be given, such as --{option} " in err
    Path("runs/x").mkdir(parents=True)
    Path("runs/x/config.yaml").write_text("model: {}")
    code, _, err = treegrpo("runs/x")
    assert code == 2
    assert "MODEL: the run in runs/x has no model yet" in err


def test_a_model_that_is_not_finite_is_named(treegrpo: Run, tiny_checkpoint: Path) -> None:
    shutil.copytree(tiny_checkpoint, "broken")
    file = Path("broken/transformer/diffusion_pytorch_model.safetensors")
    weights = load_file(file)
    weights["proj_out.bias"][0] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    for model, base, whose in (
        ("broken", tiny_checkpoint, "the trained model (broken)"),
        (tiny_checkpoint, "broken", "the base model (broken)"),
    ):
        code, _, err = treegrpo(model, "--base", base, *SHORT, "--reward", REWARD)
        assert code == 2
        assert f"error: {whose}: the network's output at step 0" in err


def test_a_device_is_chosen(treegrpo: Run, tiny_checkpoint: Path) -> None:
    for device in ("gpu", "meta"):
        code, _, err = treegrpo(tiny_checkpoint, *SHORT, "--reward", REWARD, "--device", device)
        assert code == 2
        assert f"error: --device: got '{device}'" in err


def test_a_base_that_has_moved_is_named(treegrpo: Run, tiny_checkpoint: Path) -> None:
    shutil.copytree(tiny_checkpoint, "here")
    model = lora_export(Path("here"), Path("adapters"))
    arguments = (model, *SHORT, "--reward", REWARD, "--json", "s.json")
    treegrpo(*arguments)
    expected = json.loads(Path("s.json").read_text())["rewards"]
    Path("here").rename("there")
    code, out, err = treegrpo(*arguments)
    assert (code, out) == (2, "")
    assert "base_model in adapters/sampling.json: " in err
    assert "; --base-model says where it is now" in err
    for moved in (("--base-model", "there"), ("--base-model", "there", "--base", "none")):
        code, _, err = treegrpo(*arguments, *moved)
        assert code == 0, err
        told = json.loads(Path("s.json").read_text())
        assert told["base"] == (None if "none" in moved else "there")
        assert told["rewards"][REWARD]["mean"] == expected[REWARD]["mean"]
    # Weights that say nothing of themselves are sampled as their model is.
    Path("adapters/sampling.json").unlink()
    code, _, err = treegrpo(*arguments)
    assert code == 2 and "adapters/sampling.json" in err
    code, _, err = treegrpo(*arguments, "--base-model", "there")
    assert code == 0, err
    told = json.loads(Path("s.json").read_text())["rewards"]
    assert told[REWARD]["mean"] == expected[REWARD]["mean"]
    code, _, err = treegrpo("there", *SHORT, "--reward", REWARD, "--base-model", "there")
    assert code == 2 and "--base-model: got there, but there holds no LoRA weights" in err

"""What is not finite is refused where it is made, by a message that names the stage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import CommandLine
from safetensors.torch import load_file, save_file

from treegrpo.advantage import leaf_advantages
from treegrpo.checkpoint import load_state
from treegrpo.config import Config, ModelConfig, load_config, method_of
from treegrpo.errors import UserError
from treegrpo.finite import NotFiniteError, Watched, check_finite
from treegrpo.models.opening import open_policy
from treegrpo.objective import Loss
from treegrpo.run_folder import read_lines
from treegrpo.training.build import Run, build
from treegrpo.training.loop import iterate, train
from treegrpo.training.metrics import UpdateMetrics

REWARD = "jpeg_compressibility"  # which sees bytes, in which NaN is a color
SETTINGS = [
    "rollout.steps=4",
    "rollout.branching=2",
    "rollout.window_size=2",
    "rollout.prompts_per_iteration=2",
    "train.warmup_iterations=0",
    "evaluation.max_prompts=2",
    "evaluation.images_per_prompt=1",
    "model.device=cpu",
    f"rewards=[{{name: {REWARD}}}]",
]
UNTRAINED = "before the first step of training: look at the weights of model.path"


@pytest.fixture
def configure(tiny_checkpoint: Path, tmp_path: Path) -> Callable[..., Config]:
    def build(*changes: str) -> Config:
        paths = [f"model.path={tiny_checkpoint}", f"output={tmp_path / 'run'}"]
        return load_config(None, [*SETTINGS, *paths, *changes])

    return build


@pytest.mark.parametrize(
    ("file", "tensor", "stage"),
    [
        (
            "vae/diffusion_pytorch_model.safetensors",
            "decoder.conv_norm_out.weight",
            "the decoder's images are not finite (NaN or infinite)",
        ),
        (
            "transformer/diffusion_pytorch_model.safetensors",
            "proj_out.bias",
            "the network's output at step 0 (of 0 to 3) is not finite (NaN or infinite)",
        ),
        (
            "text_encoder/model.safetensors",
            "text_model.final_layer_norm.bias",
            "the prompts' embeddings are not finite (NaN or infinite)",
        ),
    ],
)
def test_a_damaged_checkpoint_is_told_by_every_command(
    treegrpo: CommandLine,
    tiny_checkpoint: Path,
    tmp_path: Path,
    file: str,
    tensor: str,
    stage: str,
) -> None:
    model = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    weights = load_file(model / file)
    weights[tensor][0] = torch.nan
    save_file(weights, model / file, {"format": "pt"})
    drawn = ["--max-prompts", "1", "--steps", "4"]
    prompt = ["--prompt", "a red circle", "--count", "1", "--out", "x.png"]
    assert _told(treegrpo("sample", str(model), *prompt, *drawn)) == stage
    assert not Path("x.png").exists()
    given = ("--prompts", "miniature", "--rewards", REWARD)
    assert _told(treegrpo("evaluate", str(model), *given, *drawn)) == stage
    paths = [f"model.path={model}", "output=run", "model.embedding_cache=null"]
    told = _told(treegrpo("train", *SETTINGS, *paths))
    assert told.startswith(f"{stage}, {UNTRAINED}")
    assert "diverged" not in told


def _told(result: tuple[int, str, str]) -> str:
    code, _, err = result
    assert code == 2
    return err.splitlines()[-1].removeprefix("error: ")


def _poisoned(run: Run) -> None:
    with torch.no_grad():
        run.learner.parameters[-1].fill_(torch.nan)


def test_the_stage_is_told_apart_by_whether_training_has_begun(
    configure: Callable[..., Config],
) -> None:
    run = build(configure("train.ema_decay=null"))
    _poisoned(run)
    for work in (run.measure, lambda: iterate(run)):
        with pytest.raises(NotFiniteError, match=rf"step 0 \(of 0 to 3\) is not .* {UNTRAINED}"):
            work()
    run = build(configure("train.ema_decay=null"))
    iterate(run)
    _poisoned(run)
    for work in (run.measure, lambda: iterate(run)):
        with pytest.raises(NotFiniteError, match=r"after 1 iterations: training has diverged"):
            work()


def test_a_diverged_run_keeps_its_last_sound_state_and_goes_on_from_it(
    configure: Callable[..., Config],
) -> None:
    steady = ("train.ema_decay=null", "train.learning_rate_schedule=constant", "train.save_every=1")
    first = configure(*steady, "train.iterations=2", "train.learning_rate=1e-3")
    train(first)
    files = {path.name for path in first.output.iterdir()}
    sound = load_state(first.output)
    wild = configure(*steady, "train.iterations=6", "train.learning_rate=1e30")
    # The third iteration's step is taken and its state is saved; the fourth cannot sample.
    message = (
        r"after 3 iterations: training has diverged; lower .*; --resume continues from the state "
        r"after 2 iterations, and allows another train\.learning_rate, "
    )
    with pytest.raises(NotFiniteError, match=message):
        train(wild, resume=True)
    kept = load_state(first.output)
    assert kept["iteration"] == 2
    assert all(map(torch.equal, kept["parameters"], sound["parameters"]))
    assert {path.name for path in first.output.iterdir()} == files
    gentle = ("train.learning_rate=1e-4", "train.max_grad_norm=0.5", "objective.clip_low=0.001")
    assert train(configure(*steady, "train.iterations=4", *gentle), resume=True).iterations == 4
    assert {path.name for path in first.output.iterdir()} == files
    text = (first.output / "config.yaml").read_text()
    assert text.splitlines()[-4:] == [
        "# changed at iteration 2: train.learning_rate was 0.001, now 1e+30",
        "# changed at iteration 2: objective.clip_low was 0.0001, now 0.001",
        "# changed at iteration 2: train.learning_rate was 1e+30, now 0.0001",
        "# changed at iteration 2: train.max_grad_norm was 1.0, now 0.5",
    ]
    records = read_lines(first.output / "metrics.jsonl")
    assert [record["learning_rate"] for record in records] == [1e-3, 1e-3, 1e-4, 1e-4]


def test_a_run_that_diverges_at_once_leaves_no_broken_state(
    configure: Callable[..., Config],
) -> None:
    config = configure("train.ema_decay=null", "train.save_every=1", "train.learning_rate=1e30")
    with pytest.raises(NotFiniteError, match="no earlier state was saved: start again with --over"):
        train(config)
    assert not list(config.output.glob("checkpoint*"))


def test_infinite_statistics_of_a_reward_are_refused(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build(configure())
    monkeypatch.setitem(
        run.rewards, REWARD, lambda images, *_: 1e30 * torch.arange(len(images)).float()
    )
    message = rf"the variance of the reward '{REWARD}' \(scores from 0 to 7e\+30\) is not finite"
    with pytest.raises(NotFiniteError, match=message):
        iterate(run)


def test_a_first_ratio_that_is_no_number_is_refused(configure: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match="the first update's ratio is off 1 by nan"):
        method_of(configure()).check_first_update({"ratio_error": torch.nan})


@pytest.mark.parametrize("values", [(torch.nan, 1.0, 2.0), (1.0, torch.nan, 2.0)])
def test_extremes_of_the_record_do_not_hide_what_is_no_number(values: tuple[float, ...]) -> None:
    metrics = UpdateMetrics()
    for value in map(torch.tensor, values):
        metrics.add(Loss(value, 1, True, {}, least={"least": value}, most={"most": value}))
    record = torch.tensor(list(metrics.record().values()))
    assert record.isnan().all()


def test_advantages_of_rewards_that_nearly_cancel_keep_what_is_no_number() -> None:
    rewards = [torch.tensor([[0.0, 1.0, torch.nan]]), torch.tensor([[1.0, 0.0, 0.5]])]
    assert leaf_advantages(rewards, [1.0, 1.0]).isnan().all()


def test_integers_are_always_finite() -> None:
    check_finite("masks are", torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool))
    with pytest.raises(NotFiniteError, match=r"^halves are not finite \(NaN or infinite\)$"):
        check_finite("halves are", torch.ones(1), torch.tensor([1e9]).half())


def test_the_first_step_is_named() -> None:
    def predict(x: torch.Tensor, step: int, prompt_index: torch.Tensor) -> torch.Tensor:
        return x / (step - 2) if len(x) == 1 else x

    watched, index = Watched(predict), torch.zeros(1, dtype=torch.int64)
    for step in range(4):
        for rows in (1, 2):  # a later part of the batch does not hide the first
            watched(torch.ones(rows), step, index)
    with pytest.raises(NotFiniteError, match=r"at step 2 \(of 0 to 3\)"):
        watched.check()


def test_an_infinite_pixel_does_not_pass_for_white(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelConfig(path=str(tiny_checkpoint), embedding_cache=None)
    policy = open_policy(model, device=torch.device("cpu"))
    pixels = torch.tensor([-torch.inf, -3.0, 0.0, 3.0, torch.inf, torch.nan])
    monkeypatch.setattr(policy, "decode_latents", lambda latents: pixels.expand(1, 3, 1, -1))
    images = policy.decode(torch.zeros(1, *policy.latent_shape), 1)
    assert images[0, 0, 0, 1:4].tolist() == [0.0, 0.5, 1.0]
    assert images.isfinite().sum() == 3 * 3

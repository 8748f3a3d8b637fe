"""The embedded models: their prompts, their size, and how good base models they are."""

from __future__ import annotations

from importlib import resources
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import CommandLine
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

from treegrpo.batch_size import BatchSize
from treegrpo.config import ModelConfig
from treegrpo.evaluation.measure import evaluate
from treegrpo.evaluation.sampling import Draws, prompts_noises, sample
from treegrpo.miniature import EMBEDDED, pretrain, scenes
from treegrpo.models.folder import resolve
from treegrpo.models.opening import load_policy
from treegrpo.prompts import load_prompts
from treegrpo.rewards import load_reward
from treegrpo.run_folder import read_lines


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


def folders() -> list[Path]:
    return [Path(resolve(name)) for name in EMBEDDED]


@pytest.mark.slow
@pytest.mark.parametrize("name", EMBEDDED)
def test_a_checkpoint_is_an_honest_base_model(name: str) -> None:
    """Between 35% and 65% right before training: room to learn, and something to learn from."""
    model = ModelConfig(path=name, embedding_cache=None)
    policy = load_policy(model, device=torch.device("cpu"))
    accuracy = {"accuracy": load_reward("composition_accuracy")}
    prompts = load_prompts("miniature", "held_out")
    rows: list[int] = []
    policy.network.register_forward_hook(lambda *given: rows.append(len(given[-1][0])))
    draws = Draws(images_per_prompt=2, steps=10, seed=1, max_batch=BatchSize(256))
    result = evaluate(policy, prompts, accuracy, draws)
    assert 0.35 < result.mean("accuracy") < 0.65
    assert sum(rows) == len(prompts) * 2 * 10


def test_both_belong_to_the_same_world() -> None:
    """They share the tokenizer, and what a decoder makes of its latents."""
    flow, diffusion = folders()
    for file in (flow / "tokenizer").iterdir():
        assert (diffusion / "tokenizer" / file.name).read_bytes() == file.read_bytes()
    one, other = (AutoencoderKL.from_pretrained(folder / "vae") for folder in (flow, diffusion))
    rng = np.random.default_rng(0)
    drawn = rng.choice(np.array(scenes.all_compositions(), dtype=object), 64)
    images = [scenes.render(scenes.place(composition, rng)) for composition in drawn]
    pixels = torch.from_numpy(np.stack(images)) * 2 - 1
    with torch.no_grad():
        expected, latents = (vae.encode(pixels).latent_dist for vae in (one, other))
        torch.testing.assert_close(other.decode(latents.mean), one.decode(expected.mean))
        difference = (latents.logvar - expected.logvar).flatten(2)
        std, mean = torch.std_mean(latents.mean, (0, 2, 3))
    assert difference.std(2).max() < 1e-4  # a channel's factor
    torch.testing.assert_close(mean, torch.zeros(4), atol=0.1, rtol=0)
    torch.testing.assert_close(std, torch.ones(4), atol=0.1, rtol=0)


@pytest.mark.slow
def test_the_diffusion_model_is_stable_diffusion_1_5_for_diffusers() -> None:
    """Without an argument beside the folder, and drawn as our rollout draws it."""
    prompts = ["two red circles", "a green triangle above a yellow square"]
    policy = load_policy(
        ModelConfig(path="miniature-diffusion", embedding_cache=None), device=torch.device("cpu")
    )
    pipeline = StableDiffusionPipeline.from_pretrained(resolve("miniature-diffusion"))
    pipeline.set_progress_bar_config(disable=True)
    assert policy.pipeline_name == type(pipeline).__name__
    assert pipeline.safety_checker is None
    assert policy.sampling.size == (scenes.IMAGE_SIZE, scenes.IMAGE_SIZE)
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == torch.float32
    noise = torch.stack(list(islice(prompts_noises(policy, Draws(1, 10)), 2)))[:, 0]
    expected = pipeline(
        prompts, latents=noise, num_inference_steps=10, guidance_scale=1.0, output_type="pt"
    ).images
    torch.testing.assert_close(
        sample(policy, prompts, Draws(1, 10))[:, 0], expected, atol=1e-5, rtol=0
    )


@pytest.mark.slow
def test_the_recipe_trains_the_diffusion_model(treegrpo: CommandLine) -> None:
    changes = ("train.iterations=2", "rollout.prompts_per_iteration=2", "rollout.steps=4")
    quick = ("evaluation.max_prompts=2", "evaluation.images_per_prompt=1", "model.device=cpu")
    code, _, err = treegrpo("train", "miniature-diffusion", *changes, *quick, "output=run")
    assert code == 0, err
    records = read_lines(Path("run/metrics.jsonl"))
    assert all(record["gradient_norm"] > 0 for record in records)
    trained = StableDiffusionPipeline.from_pretrained("run/model")
    base = StableDiffusionPipeline.from_pretrained(resolve("miniature-diffusion"))
    weights = base.unet.state_dict()
    assert any(
        not torch.equal(values, weights[name]) for name, values in trained.unet.state_dict().items()
    )


@pytest.mark.slow
def test_the_script_makes_a_pipeline_that_it_can_go_on_with(tmp_path: Path) -> None:
    sizes = ("--images=64", "--curated-images=32", "--batch-size=8", "--curated-steps=1")
    pretrain.main([str(tmp_path / "raw"), "--kind=diffusion", "--raw-steps=1", *sizes])
    start = f"--start={tmp_path / 'raw'}"
    pretrain.main([str(tmp_path / "curated"), "--kind=diffusion", start, *sizes])
    made, shipped = tmp_path / "curated", Path(resolve("miniature-diffusion"))
    weights = [file.relative_to(shipped) for file in shipped.rglob("*.safetensors")]
    assert len(weights) == 3
    for name in weights:
        one, other = (load_file(folder / name) for folder in (made, shipped))
        assert one.keys() == other.keys()
        for key, tensor in other.items():
            assert (one[key].shape, one[key].dtype) == (tensor.shape, tensor.dtype), key
    schedulers = [DDIMScheduler.from_pretrained(folder / "scheduler") for folder in (made, shipped)]
    assert schedulers[0].config == schedulers[1].config
    # What is written names no folder of the machine that it was made on.
    for file in made.rglob("*.json"):
        assert "_name_or_path" not in file.read_text(encoding="utf-8"), file
    StableDiffusionPipeline.from_pretrained(made)

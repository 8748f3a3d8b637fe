"""The model adapter against diffusers' own pipeline: samples, embeddings, counts and exports."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from treegrpo.batch_size import BatchSize
from treegrpo.config import ModelConfig, load_config
from treegrpo.evaluation.sampling import Draws, sample
from treegrpo.models import text
from treegrpo.models.adapters import add_lora
from treegrpo.models.components import Components
from treegrpo.models.export import export, export_bytes
from treegrpo.models.folder import ModelError
from treegrpo.models.opening import load_policy, load_weights, open_policy
from treegrpo.models.policy import Policy
from treegrpo.models.sd3 import StableDiffusion3
from treegrpo.models.text import PromptEncoder
from treegrpo.objective import losses
from treegrpo.plan import tree_grpo
from treegrpo.rollout import rollout
from treegrpo.training.build import build
from treegrpo.transition import transitions

PROMPTS = ["a red circle", "two blue squares"]
STEPS = 5
# Of images in [0, 1], after five steps of a float32 model and its decoder.
ROUND_OFF = 1e-5


def load(path: Path, *, steps: int | None = STEPS, **settings: Any) -> Policy:
    model = ModelConfig(path=str(path), **{"embedding_cache": None, **settings})
    return load_policy(model, device=torch.device("cpu"), steps=steps)


def diffusers_pipeline(path: Path) -> Any:
    pipeline = StableDiffusion3Pipeline.from_pretrained(path, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipeline_images(pipeline: Any, noise: torch.Tensor, **settings: Any) -> torch.Tensor:
    images: torch.Tensor = pipeline(
        PROMPTS,
        latents=noise,
        num_inference_steps=STEPS,
        output_type="pt",
        **{"guidance_scale": 1.0, "max_sequence_length": 1, **settings},
    ).images
    return images


def policy_images(policy: Policy) -> torch.Tensor:
    """One image per prompt, from the noises that `noise_of` gives."""
    return sample(
        policy, PROMPTS, Draws(images_per_prompt=1, steps=STEPS, max_batch=BatchSize(64))
    )[:, 0]


def noise_of(policy: Policy) -> torch.Tensor:
    return policy.noise(len(PROMPTS), torch.Generator().manual_seed(0))


def perturb(parameters: list[torch.nn.Parameter]) -> None:
    """Stands in for training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def test_a_schedule_that_depends_on_the_size_is_the_pipelines(tiny_checkpoint: Path) -> None:
    settings = {"height": 32, "width": 48}
    policy, pipeline = load(tiny_checkpoint, **settings), diffusers_pipeline(tiny_checkpoint)
    for scheduler in (pipeline.scheduler, policy.scheduler):
        scheduler.register_to_config(use_dynamic_shifting=True)
    expected = pipeline_images(pipeline, noise_of(policy), **settings)
    assert expected.std() > 0.01
    assert (policy_images(policy) - expected).abs().max() < ROUND_OFF


def test_text_encoders_are_loaded_once_for_all_runs(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [f"a circle {number}" for number in range(40)]
    cache = str(tmp_path)
    policy = load(tiny_checkpoint, embedding_cache=cache)
    policy.prepare(prompts)
    assert policy.text.pipeline is None
    expected, _, pooled, _ = diffusers_pipeline(tiny_checkpoint).encode_prompt(
        prompts, None, None, max_sequence_length=1, do_classifier_free_guidance=False
    )
    again = load(tiny_checkpoint, embedding_cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(PromptEncoder, "_encode_new", _nothing_new)
        for one in (policy, again):
            conditioning = one.encode([*prompts[5:], *prompts[:5]])
            torch.testing.assert_close(conditioning["embeddings"].roll(5, 0), expected)
            torch.testing.assert_close(conditioning["pooled"].roll(5, 0), pooled)
    # Another prompt brings the encoders back; another prompt length is another embedding.
    assert again.encode(["new"])["pooled"].shape == (1, 64)
    longer = load(tiny_checkpoint, embedding_cache=cache, max_sequence_length=3)
    assert longer.encode(prompts[:1])["embeddings"].shape[1] == expected.shape[1] + 2


def _nothing_new(encoder: PromptEncoder, prompts: list[str]) -> None:
    assert not prompts


@pytest.mark.parametrize("library", ["diffusers", "transformers", "ftfy"])
def test_embeddings_of_other_versions_are_never_taken(
    library: str, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key() -> str:
        return text.model_key(tiny_checkpoint, ["text_encoder", "tokenizer"], "float32")

    now = key()
    assert key() == now
    monkeypatch.setattr(
        "treegrpo.versions.version", lambda name: "0.0.1" if name == library else version(name)
    )
    assert key() != now


def _wide_encoder(folder: Path) -> None:
    """One whose attention is over a MiB away from both ends of its file, as CLIP's is."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    part = folder / "text_encoder"
    config = CLIPTextConfig.from_pretrained(part)
    config.hidden_size, config.num_attention_heads, config.projection_dim = 1024, 2, 512
    torch.manual_seed(0)
    CLIPTextModelWithProjection(config).save_pretrained(part)


@pytest.mark.parametrize("change", ["all weights", "the middle of a file", "another class"])
def test_embeddings_of_other_encoders_are_never_taken(
    change: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    shutil.copytree(tiny_checkpoint, one)
    _wide_encoder(one)
    shutil.copytree(one, other)
    if change == "another class":
        index = json.loads((other / "model_index.json").read_text())
        index["tokenizer"] = ["transformers", "CLIPTokenizerFast"]
        (other / "model_index.json").write_text(json.dumps(index))
    else:
        weights = other / "text_encoder" / "model.safetensors"
        part = "q_proj.weight" if change == "the middle of a file" else ""
        tensors = load_file(weights)
        scaled = {name: t * 1.5 if part in name else t for name, t in tensors.items()}
        save_file(scaled, weights, {"format": "pt"})
    cache = str(tmp_path / "cache")
    first, second = (load(path, embedding_cache=cache) for path in (one, other))
    assert first.text.store.folder != second.text.store.folder
    if change != "another class":
        with torch.no_grad():
            pooled = [policy.encode(PROMPTS)["pooled"] for policy in (first, second)]
        assert not pooled[0].equal(pooled[1])


def _zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:20]),
        _zeros,
    ],
    ids=["empty", "short by a byte", "short", "zeros"],
)
def test_damaged_embeddings_are_computed_anew(
    tiny_checkpoint: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    cache = str(tmp_path)
    policy = load(tiny_checkpoint, embedding_cache=cache)
    policy.prepare(PROMPTS)
    expected = policy.encode(PROMPTS)
    files = sorted(tmp_path.glob("embeddings/*/*.safetensors"))
    whole = [file.read_bytes() for file in files]
    for prepared in (False, True):
        for file in files:
            damage(file)
        again = load(tiny_checkpoint, embedding_cache=cache)
        if prepared:
            again.prepare(PROMPTS)
        for name, values in again.encode(PROMPTS).items():
            torch.testing.assert_close(values, expected[name])
        again.negative()
        assert [file.read_bytes() for file in files] == whole


def test_embeddings_that_cannot_be_written_are_told(tiny_checkpoint: Path, tmp_path: Path) -> None:
    policy = load(tiny_checkpoint, embedding_cache=str(tmp_path))
    policy.prepare(PROMPTS)
    for file in tmp_path.glob("embeddings/*/*.safetensors"):
        file.unlink()
        file.mkdir()
    again = load(tiny_checkpoint, embedding_cache=str(tmp_path))
    with pytest.raises(ModelError, match=r"^model\.embedding_cache: .* cannot be written"):
        again.encode(PROMPTS)
    assert not list(tmp_path.rglob("*.partial"))


def test_embeddings_that_would_fill_the_disk_are_refused(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load(tiny_checkpoint, embedding_cache=str(tmp_path))
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = r"model\.embedding_cache: .* has 0\.0 GiB free, but .* of 5,000 prompts need"
    with pytest.raises(ModelError, match=message):
        policy.prepare([str(number) for number in range(5000)])


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_forwards_are_the_plans(tiny_checkpoint: Path, guidance_scale: float) -> None:
    policy = load(tiny_checkpoint, guidance_scale=guidance_scale)
    rows = {True: 0, False: 0}

    def count(module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        rows[torch.is_grad_enabled()] += len(keywords["hidden_states"])

    policy.network.register_forward_pre_hook(count, with_kwargs=True)
    plan = tree_grpo(STEPS, branching=2, window_size=2, window_start=1, trees=2)
    schedule = policy.schedule(STEPS)
    predict = policy.predictor(policy.encode(PROMPTS), STEPS)
    noise = noise_of(policy)[:, None].expand(-1, plan.roots, -1, -1, -1)
    forest = rollout(
        predict,
        noise,
        plan,
        schedule,
        transitions(schedule, plan.stochastic),
        generator=torch.Generator().manual_seed(0),
        max_batch=7,
    )
    advantages = [torch.ones_like(level.log_prob) for level in forest.levels]
    parts = losses(predict, forest, advantages, micro_batch=3)
    torch.autograd.backward([part.value for part in parts])
    copies = len(PROMPTS) * (2 if guidance_scale > 1 else 1)
    assert rows == {False: copies * plan.rollout_forwards, True: copies * plan.update_forwards}


def test_a_trained_model_is_a_diffusers_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    policy = load(tiny_checkpoint, guidance_scale=2.0)
    untrained = policy_images(policy)
    perturb(list(policy.network.parameters()))
    trained = policy_images(policy)
    assert (trained - untrained).abs().max() > 0.01
    export(policy, tmp_path, base_model=str(tiny_checkpoint))

    exported = pipeline_images(diffusers_pipeline(tmp_path), noise_of(policy), guidance_scale=2.0)
    assert (exported - trained).abs().max() < ROUND_OFF
    # Its own settings came along, so that nobody has to repeat them.
    again = load(tmp_path, steps=None)
    assert again.sampling == policy.sampling
    assert torch.equal(policy_images(again), trained)


# An alpha that is not the rank: a loader that does not know it would get the strength wrong.
@pytest.mark.parametrize(("rank", "alpha"), [(2, 2.0), (2, 8.0), (3, 5.0)])
def test_trained_lora_weights_load_with_diffusers(
    tiny_checkpoint: Path, tmp_path: Path, rank: int, alpha: float
) -> None:
    policy = load(tiny_checkpoint)
    untrained = policy_images(policy)
    base = {name: p.clone() for name, p in policy.network.named_parameters()}
    add_lora(policy, ModelConfig(lora_rank=rank, lora_alpha=alpha))
    assert torch.equal(policy_images(policy), untrained)
    adapters = [p for p in policy.network.parameters() if p.requires_grad]
    assert sum(p.numel() for p in adapters) == 2 * 8 * rank * (32 + 32) - rank * (32 + 32)
    perturb(adapters)
    trained = policy_images(policy)
    assert (trained - untrained).abs().max() > 0.01
    export(policy, tmp_path, base_model=str(tiny_checkpoint))
    assert {path.name for path in tmp_path.iterdir()} == {
        "pytorch_lora_weights.safetensors",
        "sampling.json",
    }

    model = ModelConfig(path=str(tmp_path), embedding_cache=None)
    with pytest.raises(ModelError, match=r"model\.path: .* holds LoRA weights"):
        load_weights(open_policy(model, device=torch.device("cpu")), model, train=True)

    pipeline = diffusers_pipeline(tiny_checkpoint)
    pipeline.load_lora_weights(str(tmp_path))
    exported = pipeline_images(pipeline, noise_of(policy))
    assert (exported - trained).abs().max() < ROUND_OFF
    assert (policy_images(load(tmp_path, steps=None)) - trained).abs().max() < ROUND_OFF
    pipeline.unload_lora_weights()
    for name, parameter in pipeline.transformer.named_parameters():
        assert torch.equal(parameter, base[name])


@pytest.mark.parametrize("rank", [0, 3], ids=["full", "lora"])
def test_trained_weights_are_float32_and_nothing_else_is_trained(
    rank: int, tiny_checkpoint: Path
) -> None:
    model = ModelConfig(
        path=str(tiny_checkpoint), dtype="bfloat16", lora_rank=rank, embedding_cache=None
    )
    policy = open_policy(model, device=torch.device("cpu"))
    load_weights(policy, model, train=True)
    network = dict(policy.network.named_parameters())
    trained = {name for name, parameter in network.items() if parameter.requires_grad}
    assert trained == {name for name in network if ".lora_" in name or not rank}
    assert {network[name].dtype for name in trained} == {torch.float32}
    others = [network[name] for name in network.keys() - trained] + [*policy.vae.parameters()]
    assert {parameter.dtype for parameter in others} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in policy.vae.parameters())
    modules = [*policy.network.modules(), *policy.vae.modules()]
    assert not any(module.training for module in modules)
    if rank:  # an alpha that is not given is twice the rank
        adapted = cast(Any, policy.network)
        assert adapted.peft_config["default"].lora_alpha == 6


@pytest.mark.parametrize("rank", [0, 64], ids=["full", "lora"])
def test_the_disk_is_checked_for_what_an_export_writes(
    rank: int, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    policy = load(tiny_checkpoint)
    if rank:
        add_lora(policy, ModelConfig(lora_rank=rank))
    export(policy, tmp_path, base_model=str(tiny_checkpoint))
    written = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert export_bytes(policy) == pytest.approx(written, rel=0.05)  # but for headers


def _break_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def _other_pipeline(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "LattePipeline"}))


def _damage_index(folder: Path) -> None:
    (folder / "model_index.json").write_text("{")


def _lose_weights(folder: Path) -> None:
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()


def _lose_config(folder: Path) -> None:
    (folder / "text_encoder" / "config.json").unlink()


def _lose_shard(folder: Path) -> None:
    whole = folder / "text_encoder" / "model.safetensors"
    whole.rename(whole.with_name("model-00001-of-00002.safetensors"))
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "text_encoder" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": shards})
    )


def _truncate_weights(folder: Path) -> None:
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def _lose_tensors(part: str) -> Callable[[Path], None]:
    """A whole file, in which half of the weights are missing."""

    def lose(folder: Path) -> None:
        (file,) = (folder / part).glob("*.safetensors")
        tensors = load_file(file)
        kept = {name: tensors[name] for name in list(tensors)[::2]}
        save_file(kept, file, {"format": "pt"})

    return lose


def _lose_vocabulary(folder: Path) -> None:
    (folder / "tokenizer_2" / "tokenizer.json").unlink()


def _truncate_pickle(folder: Path) -> None:
    weights = folder / "text_encoder" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    whole = weights.with_name("pytorch_model.bin").read_bytes()
    weights.with_name("pytorch_model.bin").write_bytes(whole[:-1000])


def _keep_a_variant(folder: Path) -> None:
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))


def _foreign_part(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"] = ["no_such_library", "Network"]
    (folder / "model_index.json").write_text(json.dumps(index))


def _damage_sampling(folder: Path) -> None:
    (folder / "sampling.json").write_text('{"step": 10}')


def _wrong_sampling(folder: Path) -> None:
    (folder / "sampling.json").write_text('{"height": "large"}')


def _lose_key(part: str, key: str, null: bool = False) -> Callable[[Path], None]:
    def lose(folder: Path) -> None:
        file = folder / part / "config.json"
        values = json.loads(file.read_text())
        del values[key]
        file.write_text(json.dumps(values | ({key: None} if null else {})))

    return lose


def _lose_decoder(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    del index["vae"]
    (folder / "model_index.json").write_text(json.dumps(index))


def _wrong_config(folder: Path) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_train_timesteps": "many"}))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (_break_index, ["has no model_index.json", "diffusers folder format"]),
        (_other_pipeline, ["LattePipeline", "supported are FluxPipeline, QwenImagePipeline"]),
        (_damage_index, ["model_index.json cannot be read"]),
        (_lose_weights, ["transformer holds no weights", "incomplete"]),
        (_lose_config, ["text_encoder/config.json is missing", "incomplete"]),
        (_lose_shard, ["model-00002-of-00002.safetensors is missing", "index.json names"]),
        (_truncate_weights, ["model.safetensors is damaged: it has"]),
        (_damage_sampling, ["sampling.json", "step"]),
        (_wrong_sampling, ["sampling.json: height: got 'large'; Input should be a valid integer"]),
        (
            _lose_key("transformer", "patch_size", True),
            ["transformer/config.json lacks 'patch_siz"],
        ),
        (_lose_key("vae", "block_out_channels", True), ["vae/config.json lacks 'block_out_cha"]),
        (_lose_decoder, ["model_index.json lacks 'vae'"]),
        (_wrong_config, ["cannot load", "/scheduler: TypeError: "]),
        (_lose_vocabulary, ["tokenizer_2 holds no vocabulary (tokenizer.json,", "incomplete"]),
        (_truncate_pickle, ["pytorch_model.bin is no file of weights, or is damaged"]),
        (_keep_a_variant, ["a variant of the weights only (diffusion_pytorch_model.fp16"]),
        (_foreign_part, ["cannot load", "No module named 'no_such_library'"]),
        (_lose_tensors("transformer"), ["lack ", "of those of SD3Transformer2DModel, among them"]),
        (_lose_tensors("vae"), ["lack ", "of those of AutoencoderKL, among them"]),
        (_lose_tensors("text_encoder"), ["lack ", "of those of CLIPTextModelWithProjection, am"]),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_named(
    tiny_checkpoint: Path, tmp_path: Path, fault: Any, words: list[str]
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, folder)
    fault(folder)
    with pytest.raises(ModelError, match=r"^model\.path: ") as caught:
        load(folder).encode(["a red circle"])
    for word in (str(folder), *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.lora_targets=[to_w]", "model.lora_targets: got 'to_w', which no linear or"),
        ("model.attention_backend=quick", "model.attention_backend: got 'quick'; must be one of "),
        ("model.width=20", "model.width: got 20; must be a multiple of 8"),
        ("model.height=72", "model.height: got 72; must be at most 64, the largest for which the"),
        ("model.embedding_cache=/proc/none", "model.embedding_cache: cannot be written to"),
        ("model.frames=5", "model.frames: got 5; StableDiffusion3Pipeline makes images"),
    ],
)
def test_what_a_model_does_not_allow_is_refused_before_its_weights(
    tiny_checkpoint: Path, change: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Components, "read", None)  # calling it would fail
    settings = [f"model.path={tiny_checkpoint}", "model.device=cpu", "model.lora_rank=2", change]
    with pytest.raises(ModelError) as caught:
        build(load_config(None, settings))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("error", [KeyError, AttributeError, TypeError, ValueError, RuntimeError])
@pytest.mark.parametrize(
    "method", ["default_size", "check_sampling", "make_scheduler", "encode_prompts"]
)
def test_a_mistake_in_a_familys_code_is_not_told_as_the_checkpoints(
    method: str,
    error: type[Exception],
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def mistaken(*arguments: Any) -> None:
        raise error("sample_size")

    monkeypatch.setattr(StableDiffusion3, method, mistaken)
    with pytest.raises(error, match="sample_size") as caught:
        load(tiny_checkpoint).encode(PROMPTS)
    assert not isinstance(caught.value, ModelError)

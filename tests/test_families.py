"""Every family against diffusers' own pipeline, and through training and export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import tiny_checkpoints
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import Case, Edits, edited, flow_solver

from treegrpo import cli
from treegrpo.batch_size import BatchSize
from treegrpo.config import ModelConfig
from treegrpo.evaluation.sampling import Draws, sample
from treegrpo.models.folder import SAMPLING_FILE, ModelError
from treegrpo.models.opening import load_policy, open_policy
from treegrpo.models.policy import Policy
from treegrpo.transition import flow_schedule, stochastic

CASES = tiny_checkpoints.cases()
PROMPTS = ["a red circle", "two blue squares and 3 stars"]
STEPS = 4
# Of images in [0, 1]; 1e-5 is some eighty times float32's spacing at 1.
ROUND_OFF = 1e-5

families = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
variations = pytest.mark.parametrize(
    ("case", "variation"),
    [(case, name) for case in CASES for name in case.variations],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
edits = pytest.mark.parametrize(
    ("case", "edit"),
    [(case, name) for case in CASES for name in case.edits],
    ids=lambda value: value if isinstance(value, str) else value.name,
)


class Checkpoints(dict[str, Path]):
    """Case name to its checkpoint, built when first asked for."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory

    def __missing__(self, name: str) -> Path:
        folder = self[name] = self._factory.mktemp("family")
        next(case for case in CASES if case.name == name).build(folder)
        return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory)


def section(folder: Path, **settings: Any) -> ModelConfig:
    return ModelConfig(path=str(folder), embedding_cache=None, **settings)


def load(folder: Path, *, steps: int = STEPS, **settings: Any) -> Policy:
    return load_policy(section(folder, **settings), device=torch.device("cpu"), steps=steps)


def noise_of(policy: Policy) -> torch.Tensor:
    """Prompt by prompt, as `sample` draws it: at once, torch gives other numbers to shapes whose
    size is not a multiple of 16."""
    generator = torch.Generator().manual_seed(0)
    return torch.cat([policy.noise(1, generator) for _ in PROMPTS])


def images_of(policy: Policy) -> torch.Tensor:
    """One per prompt, from the noises that `noise_of` gives."""
    draws = Draws(images_per_prompt=1, steps=policy.sampling.steps, max_batch=BatchSize(64))
    return sample(policy, PROMPTS, draws)[:, 0]


def difference(case: Case, folder: Path, policy: Policy, pipeline: Any | None = None) -> float:
    """Between our images and those of diffusers' pipeline on the folder."""
    pipeline = pipeline or case.pipeline(folder)
    expected = case.call(pipeline, PROMPTS, noise_of(policy), policy.sampling)
    assert expected.std() > 0.01
    images = images_of(policy)
    assert images.shape == expected.shape
    return (images - expected).abs().max().item()


@variations
def test_deterministic_rollouts_are_the_pipelines_samples(
    case: Case, variation: str, checkpoints: Checkpoints
) -> None:
    folder = checkpoints[case.name]
    policy = load(folder, **case.variations[variation])
    assert difference(case, folder, policy) < ROUND_OFF


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of diffusers about what it corrects
@edits
def test_the_checkpoints_settings_are_followed_as_the_pipeline_does(
    case: Case, edit: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    folder = edited(checkpoints[case.name], tmp_path / "edited", case.edits[edit])
    assert difference(case, folder, load(folder)) < ROUND_OFF


@pytest.mark.parametrize(
    ("name", "edits", "message"),
    [
        (
            "FLUX.1 dev",
            {"transformer/config.json": {"in_channels": 24}},
            r"model\.path: the transformer of .* takes 24 channels, but .* latents give 16; must",
        ),
        (
            "FLUX.1 dev",
            {"vae/config.json": {"shift_factor": None}},
            r"model\.path: .*vae/config\.json lacks 'shift_factor'; must be given there",
        ),
        (
            "FLUX.1 dev",
            {"model_index.json": {"text_encoder_2": [None, None]}},
            r"model\.path: .*model_index\.json lacks 'text_encoder_2'; must be given there",
        ),
        (
            "Qwen-Image",
            {"transformer/config.json": {"guidance_embeds": True}},
            r"model\.path: the transformer has guidance_embeds true, .*; must be false",
        ),
        (
            "Qwen-Image",
            {"transformer/config.json": {"use_additional_t_cond": True}},
            r"model\.path: the transformer has use_additional_t_cond true, .*; must be false",
        ),
        (
            "Sana",
            {"transformer/config.json": {"guidance_embeds": True}},
            r"model\.path: the transformer has guidance_embeds true, .*; must be false",
        ),
        (
            "Sana",
            {"vae/config.json": {"latent_channels": 8}},
            r"model\.path: the transformer of .* takes 4 channels, but .* latents give 8; must be",
        ),
        (
            "Stable Diffusion 3.5",
            {"vae/config.json": {"shift_factor": ...}},
            r"model\.path: .*vae/config\.json lacks 'shift_factor'; must be given there",
        ),
        (
            "Stable Diffusion 3.5",
            {"sampling.json": {"max_sequence_length": 513}},
            r"model\.max_sequence_length: got 513; must be at most 512",
        ),
        (
            "Stable Diffusion 1.5",
            {"unet/config.json": {"sample_size": None}},
            r"model\.height: must be given, and model\.width: the unet of .* has no sample_size",
        ),
        (
            "Stable Diffusion 1.5",
            {"unet/config.json": {"in_channels": 9}},
            r"model\.path: the unet of .* takes 9 channels, but .* latents give 4; must be",
        ),
        (
            "Stable Diffusion 1.5",
            {"sampling.json": {"height": 20}},
            r"model\.height: got 20; must be a multiple of 8 ",
        ),
        (
            "Stable Diffusion XL",
            {"unet/config.json": {"projection_class_embeddings_input_dim": 48}},
            r"model\.path: the unet has addition_embed_type 'text_time' and takes 48 .* gives 56",
        ),
        (
            "Wan 2.1",
            {"transformer/config.json": {"rope_max_seq_len": 2}, "sampling.json": {"width": 64}},
            r"model\.width: got 64; must be at most 32, the largest for which .* positions",
        ),
    ],
)
def test_what_the_pipeline_does_not_draw_is_refused_by_name(
    name: str, edits: Edits, message: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    folder = edited(checkpoints[name], tmp_path / "edited", edits)
    with pytest.raises(ModelError, match=message):
        open_policy(section(folder), device=torch.device("cpu"))


# What a solver of several steps says where it is a flow's.
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@pytest.mark.parametrize(
    ("scheduler", "settings", "message"),
    [
        ("FlowMatchLCMScheduler", {}, "got a checkpoint with a FlowMatchLCMScheduler; .* must be"),
        ("FlowMatchHeunDiscreteScheduler", {}, "with a FlowMatchHeunDiscreteScheduler; .* must be"),
        (
            "DDIMScheduler",
            {},
            "got a checkpoint with a DDIMScheduler; the scheduler must be one of",
        ),
        # Never reaches a flow's end: its last level is there twice.
        ("DEISMultistepScheduler", FLOW, "with a DEISMultistepScheduler; .* must be one of DPM"),
        ("SASolverScheduler", FLOW, "got a checkpoint with a SASolverScheduler; .* must be one of"),
        # Needs a package that is not installed; it is refused all the same.
        ("DPMSolverSDEScheduler", {}, "a DPMSolverSDEScheduler; the scheduler must be one of DPM"),
        (
            "FlowMatchEulerDiscreteScheduler",
            {"stochastic_sampling": True},
            "has stochastic_sampling true, .*; must be false",
        ),
        (
            "FlowMatchEulerDiscreteScheduler",
            {"invert_sigmas": True},
            "has invert_sigmas true; must be false: .* is a flow",
        ),
        (
            "DPMSolverMultistepScheduler",
            {**FLOW, "algorithm_type": "sde-dpmsolver++"},
            r"has algorithm_type 'sde-dpmsolver\+\+', .*; must be 'dpmsolver\+\+'",
        ),
        (
            "DPMSolverMultistepScheduler",
            {**FLOW, "thresholding": True},
            "has thresholding true; must be false",
        ),
        (
            "UniPCMultistepScheduler",
            {**FLOW, "prediction_type": "epsilon"},
            'has prediction_type "epsilon"; must be "flow_prediction": .* is a flow',
        ),
        (
            "UniPCMultistepScheduler",
            {**FLOW, "use_flow_sigmas": False},
            "has use_flow_sigmas false; must be true: .* is a flow",
        ),
    ],
)
@pytest.mark.parametrize("name", ["FLUX.1 dev", "Qwen-Image", "Sana", "Wan 2.1"])
def test_schedulers_whose_steps_are_not_a_flows_ode_are_refused(
    name: str,
    scheduler: str,
    settings: dict[str, Any],
    message: str,
    checkpoints: Checkpoints,
    tmp_path: Path,
) -> None:
    edits = {
        "model_index.json": {"scheduler": ["diffusers", scheduler]},
        "scheduler/scheduler_config.json": settings,
    }
    folder = edited(checkpoints[name], tmp_path / "edited", edits)
    with pytest.raises(ModelError, match=f"model\\.path: .*{message}"):
        open_policy(section(folder), device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "solver", "settings"),
    [
        # No shift is passed to them.
        ("Sana", "FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
        ("Wan 2.1", "UniPCMultistepScheduler", {"use_dynamic_shifting": True}),
        # One is passed, which DPM-Solver++ takes only where it is wanted, and no levels at all.
        ("FLUX.1 dev", "DPMSolverMultistepScheduler", {"use_dynamic_shifting": False}),
        (
            "FLUX.1 dev",
            "DPMSolverMultistepScheduler",
            {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        ),
        ("Qwen-Image", "DPMSolverMultistepScheduler", {"use_dynamic_shifting": True}),
    ],
)
def test_a_scheduler_that_the_pipeline_cannot_set_is_refused(
    name: str,
    solver: str,
    settings: dict[str, Any],
    checkpoints: Checkpoints,
    tmp_path: Path,
) -> None:
    folder = edited(checkpoints[name], tmp_path / "edited", flow_solver(solver, **settings))
    policy = open_policy(section(folder), device=torch.device("cpu"))
    case = next(case for case in CASES if case.name == name)
    with pytest.raises((ValueError, AssertionError)):
        case.call(case.pipeline(folder), PROMPTS, noise_of(policy), policy.sampling)
    message = rf"model\.path: {solver}, .* cannot be set as {policy.pipeline_name} sets it"
    with pytest.raises(ModelError, match=message):
        policy.schedule(STEPS)


@pytest.mark.parametrize("name", ["FLUX.1 dev", "Stable Diffusion 1.5", "Stable Diffusion XL"])
def test_a_tokenizer_without_a_limit_gets_its_encoders(
    name: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """diffusers ends in an OverflowError there; with a limit beyond the encoder's, in another."""
    folder = Path(shutil.copytree(checkpoints[name], tmp_path / "copy"))
    (folder / "tokenizer" / "tokenizer_config.json").unlink()
    if name == "Stable Diffusion XL":
        settings = {"tokenizer_2/tokenizer_config.json": {"model_max_length": 1000}}
        folder = edited(folder, tmp_path / "edited", settings)
    long = ["a red circle " * 30]
    expected, conditioning = (load(path).encode(long) for path in (checkpoints[name], folder))
    for part, values in expected.items():
        assert torch.equal(conditioning[part], values), part


@families
def test_conditioning_is_the_pipelines(case: Case, checkpoints: Checkpoints) -> None:
    folder = checkpoints[case.name]
    policy = load(folder)
    policy.encode(PROMPTS[1:])  # another order and number must not matter
    conditioning = policy.encode([*PROMPTS, PROMPTS[0]])
    expected = case.encode(case.pipeline(folder), [*PROMPTS, PROMPTS[0]], policy.sampling)
    assert conditioning.keys() == expected.keys() == policy.conditioning_shapes().keys()
    for name, values in expected.items():
        torch.testing.assert_close(conditioning[name], values.to(conditioning[name].dtype))
        longest = policy.conditioning_shapes()[name]
        assert values.dim() == 1 + len(longest)
        assert all(size <= most for size, most in zip(values.shape[1:], longest, strict=True))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@families
def test_training_changes_only_what_it_should_and_diffusers_loads_it(
    case: Case,
    lora: bool,
    checkpoints: Checkpoints,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two iterations through the command line, then the export in diffusers alone."""
    folder, output = checkpoints[case.name], tmp_path / "run"
    settings = {
        "model.path": folder,
        "model.device": "cpu",
        "model.lora_rank": 2 if lora else 0,
        "model.lora_alpha": 3.0 if lora else "null",
        "rollout.steps": STEPS,
        "rollout.branching": 2,
        "rollout.window_size": 2,
        "rollout.prompts_per_iteration": 2,
        "train.iterations": 2,
        "train.warmup_iterations": 0,
        "train.learning_rate": 1e-3,
        "train.learning_rate_schedule": "constant",
        "train.ema_decay": "null",
        "train.micro_batch": 3,
        "rewards": "[{name: 'toy_rewards:brightness'}]",
        "evaluation.max_prompts": 2,
        "evaluation.images_per_prompt": 1,
        "output": output,
    }
    monkeypatch.chdir(Path(__file__).parent)  # where toy_rewards is
    arguments = [f"{key}={value}" for key, value in settings.items()]
    monkeypatch.setattr("sys.argv", ["treegrpo", "train", *arguments])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 0
    lines = (output / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert len(metrics) == 2
    assert metrics[0]["ratio_error"] < 1e-5
    assert all(torch.tensor(m["loss"]).isfinite() and m["gradient_norm"] > 0 for m in metrics)

    model = output / "model"
    trained, base = load(model), load(folder)
    assert (images_of(trained) - images_of(base)).abs().max() > 1e-4
    changed = _differing(base.network, trained.network)
    if not lora:
        assert changed
        assert difference(case, model, trained) < ROUND_OFF
        assert not _differing(base.vae, trained.vae)
        return
    assert not changed
    assert {path.name for path in model.iterdir()} == {
        "README.md",
        "before_after.png",
        "pytorch_lora_weights.safetensors",
        SAMPLING_FILE,
    }
    pipeline = case.pipeline(folder)
    pipeline.load_lora_weights(str(model))
    assert difference(case, model, trained, pipeline) < ROUND_OFF


def _differing(first: torch.nn.Module, second: torch.nn.Module) -> list[str]:
    """Names of the first's parameters that the second has otherwise (adapters add their own)."""
    others = {name.replace(".base_layer", ""): value for name, value in second.named_parameters()}
    return [name for name, value in first.named_parameters() if not value.equal(others[name])]


class AsTheModelCardSays:
    """A pipeline that is called with these settings, whatever else it is given but the noise."""

    def __init__(self, pipeline: Any, settings: dict[str, Any]) -> None:
        self._pipeline, self._settings = pipeline, settings

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    def __call__(self, prompts: list[str], **given: Any) -> Any:
        kept = {name: given[name] for name in ("latents", "output_type")}
        return self._pipeline(prompts, **self._settings, **kept)


@pytest.mark.parametrize("negative_prompt", [None, ""], ids=["", "empty negative prompt"])
@families
def test_the_model_cards_call_draws_the_same(
    case: Case, negative_prompt: str | None, checkpoints: Checkpoints
) -> None:
    policy = load(checkpoints[case.name], negative_prompt=negative_prompt)
    pipeline = case.pipeline(checkpoints[case.name])
    as_said = AsTheModelCardSays(pipeline, policy.call_settings())
    assert difference(case, checkpoints[case.name], policy, as_said) < ROUND_OFF


@pytest.mark.parametrize("guidance_scale", [2.0, 3.5])
def test_guidance_of_a_model_that_takes_none_is_refused(
    guidance_scale: float, checkpoints: Checkpoints
) -> None:
    with pytest.raises(
        ModelError, match=r"^model\.guidance_scale: got .*; must be null: this chec"
    ):
        load(checkpoints["FLUX.1 schnell"], guidance_scale=guidance_scale)


@families
def test_bfloat16_computes_nearly_the_same(case: Case, checkpoints: Checkpoints) -> None:
    folder = checkpoints[case.name]
    exact = images_of(load(folder))
    rough = load(folder, dtype="bfloat16")
    assert torch.bfloat16 in {parameter.dtype for parameter in rough.network.parameters()}
    assert 0 < (images_of(rough) - exact).abs().mean() < 0.02


@families
def test_a_size_that_does_not_fit_is_refused(case: Case, checkpoints: Checkpoints) -> None:
    policy = open_policy(section(checkpoints[case.name]), device=torch.device("cpu"))
    multiple = policy.size_multiple(policy.configs)
    size = policy.sampling.size[0] + 1
    with pytest.raises(ModelError, match=rf"model\.height: got {size}; .* multiple of {multiple}"):
        load(checkpoints[case.name], height=size)


@pytest.mark.parametrize(("name", "longest"), [("FLUX.1 dev", 512), ("Qwen-Image", 1024)])
def test_packed_families_have_their_pipelines_size_and_prompt_limit(
    name: str, longest: int, checkpoints: Checkpoints
) -> None:
    folder, case = checkpoints[name], next(case for case in CASES if case.name == name)
    policy, pipeline = (
        open_policy(section(folder), device=torch.device("cpu")),
        case.pipeline(folder),
    )
    size = pipeline.default_sample_size * pipeline.vae_scale_factor
    assert policy.default_size(policy.configs) == (size, size)
    message = rf"model\.max_sequence_length: got {longest + 1}; must be at most {longest}"
    with pytest.raises(ModelError, match=message):
        load(folder, max_sequence_length=longest + 1)


@pytest.mark.parametrize("name", ["Sana", "Wan 2.1"])
def test_a_first_step_from_almost_pure_noise_is_one_from_pure_noise(
    name: str, checkpoints: Checkpoints
) -> None:
    """Their schedulers begin just short of 1, where Flow-GRPO's deviation would grow tenfold."""
    policy = open_policy(section(checkpoints[name]), device=torch.device("cpu"))
    levels = policy.schedule(STEPS)
    assert 0.99 < levels.sigma[0] < 1
    pure = flow_schedule([1.0, *levels.sigma[1:]])
    first, expected = (stochastic(schedule, 0, "flow_sde", 0.7).std for schedule in (levels, pure))
    assert first == pytest.approx(expected, rel=0.01)
    assert first == pytest.approx(0.7, rel=0.02)


@pytest.mark.filterwarnings("ignore:.*script_method")  # of torch.compile about torch
def test_switches_are_diffusers_own(checkpoints: Checkpoints) -> None:
    def states(**switches: Any) -> list[bool]:
        policy = load(checkpoints["FLUX.1 dev"], **switches)
        network = cast(Any, policy.network)
        block = network.transformer_blocks[0]
        return [
            network.is_gradient_checkpointing,
            block.attn.processor._attention_backend is not None,
            block._compiled_call_impl is not None,
            policy.vae.use_tiling,
        ]

    assert states() == [False] * 4
    switches = {
        "gradient_checkpointing": True,
        "attention_backend": "_native_math",
        "compile": True,
        "vae_tiling": True,
    }
    for number, (name, value) in enumerate(switches.items()):
        assert states(**{name: value}) == [place == number for place in range(4)]


def test_weights_under_other_published_names_are_read(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Older files name CLIP's and T5's tensors otherwise; none of them is missing for that."""
    original = checkpoints["Stable Diffusion 3.5"]
    folder = Path(shutil.copytree(original, tmp_path / "older"))
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        (file,) = (folder / part).glob("*.safetensors")
        tensors = load_file(file)
        if "shared.weight" in tensors:
            tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
        else:
            plain = {name.removeprefix("text_model."): value for name, value in tensors.items()}
            projection = {"text_projection.weight": plain.pop("text_projection.weight")}
            tensors = {f"text_model.{name}": value for name, value in plain.items()} | projection
            tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        save_file(tensors, file, {"format": "pt"})
    expected, conditioning = (load(path).encode(PROMPTS) for path in (original, folder))
    for name, values in expected.items():
        assert torch.equal(conditioning[name], values), name

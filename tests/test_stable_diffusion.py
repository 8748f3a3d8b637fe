"""Stable Diffusion's levels under every scheduler that a checkpoint may come with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from command_line import CommandLine
from tiny_checkpoints import edited, stable_diffusion, stable_diffusion_xl
from tiny_checkpoints.stable_diffusion import BETAS, SCHEDULER
from torch import Tensor

from treegrpo.config import ModelConfig, load_config, method_of
from treegrpo.models.folder import ModelError
from treegrpo.models.opening import open_policy
from treegrpo.models.policy import Policy
from treegrpo.plan import PlanError, RolloutPlan, tree_grpo
from treegrpo.rollout import rollout
from treegrpo.transition import (
    TransitionKind,
    clean_and_noise,
    flow_schedule,
    transitions,
)

# diffusers about settings that its pipeline changes, and about numpy.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:__array__")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stable_diffusion")
    stable_diffusion.build_2_1(folder)
    return folder


def changed(source: Path, folder: Path, scheduler: str, **settings: Any) -> Path:
    """A checkpoint in a folder of its own, with another scheduler."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    getattr(diffusers, scheduler)(**settings).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", scheduler]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def opened(folder: Path, steps: int = 10) -> Policy:
    model = ModelConfig(path=str(folder), embedding_cache=None)
    return open_policy(model, device=torch.device("cpu"), steps=steps)


def model(x: Tensor, timestep: float) -> Tensor:
    """Stands in for the network: a bounded function of what it is given."""
    return torch.sin(1.3 * x + timestep / 300)


# The scheduler, its settings, and what makes a first-order solver of it in diffusers.
DDIM: tuple[str, dict[str, Any]] = ("DDIMScheduler", {})
EULER: tuple[str, dict[str, Any]] = ("EulerDiscreteScheduler", {})
SAME = ("", {"solver_order": 1})
SCHEDULERS = [
    ("DDIMScheduler", {**BETAS, "clip_sample": True}, None),
    ("DDIMScheduler", {**SCHEDULER, "prediction_type": "sample"}, None),
    ("DDPMScheduler", {**BETAS, "clip_sample": False}, DDIM),
    ("PNDMScheduler", {**BETAS, "skip_prk_steps": True}, ("DDIMScheduler", {"clip_sample": False})),
    ("EulerDiscreteScheduler", {**BETAS, "timestep_spacing": "leading"}, None),
    ("EulerDiscreteScheduler", {**BETAS, "use_karras_sigmas": True}, None),
    (
        "EulerDiscreteScheduler",
        {**BETAS, "prediction_type": "v_prediction", "timestep_type": "continuous"},
        None,
    ),
    ("EulerAncestralDiscreteScheduler", {**BETAS, "timestep_spacing": "trailing"}, EULER),
    ("LMSDiscreteScheduler", BETAS, EULER),
    ("DPMSolverMultistepScheduler", {**BETAS, "use_karras_sigmas": True}, SAME),
    ("DPMSolverMultistepScheduler", {**BETAS, "prediction_type": "v_prediction"}, SAME),
    ("DPMSolverMultistepScheduler", {**BETAS, "final_sigmas_type": "sigma_min"}, SAME),
    ("DEISMultistepScheduler", BETAS, SAME),
    (
        "UniPCMultistepScheduler",
        BETAS,
        ("", {"solver_order": 1, "disable_corrector": list(range(10))}),
    ),
]


@pytest.mark.parametrize(("name", "settings", "first_order"), SCHEDULERS)
def test_deterministic_steps_are_those_of_the_pipelines_scheduler(
    name: str,
    settings: dict[str, Any],
    first_order: tuple[str, dict[str, Any]] | None,
    source: Path,
    tmp_path: Path,
) -> None:
    folder = changed(source, tmp_path, name, **settings)
    # The pipeline changes some of the settings.
    scheduler = diffusers.DiffusionPipeline.from_pretrained(folder).scheduler
    if first_order is not None:
        solver, changes = first_order
        scheduler = getattr(diffusers, solver or name).from_config(scheduler.config, **changes)
    scheduler.set_timesteps(10)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        output = model(scheduler.scale_model_input(expected, timestep), float(timestep))
        expected = scheduler.step(output, timestep, expected, return_dict=False)[0]

    policy = opened(folder)
    schedule, timesteps = policy.noise_levels(10)
    plan = RolloutPlan(2, (1,) * 10, (False,) * 10)
    leaves = rollout(
        lambda x, step, prompt_index: model(x, timesteps[step]),
        policy.noise(2, torch.Generator().manual_seed(0))[None],
        plan,
        schedule,
        transitions(schedule, plan.stochastic),
    ).leaves[0]
    # float32, in coordinates that reach 15 with Euler's schedulers.
    torch.testing.assert_close(leaves, expected, rtol=1e-5, atol=2e-5)


def test_ddpos_steps_are_those_of_diffusers(tmp_path: Path) -> None:
    """Stable Diffusion 1.5, 50 steps, eta 1: every step has a density, the last one too."""
    stable_diffusion.build_1_5(tmp_path)
    schedule, timesteps = opened(tmp_path).noise_levels(50)
    reference = diffusers.DDIMScheduler(**SCHEDULER)
    # Its float32 levels lose 1 - alpha / alpha' to cancellation.
    reference.alphas_cumprod = reference.alphas_cumprod.double()
    reference.final_alpha_cumprod = reference.final_alpha_cumprod.double()
    reference.set_timesteps(50)
    assert timesteps == reference.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    x, output, noise = torch.randn(3, 1, 4, 8, 8, dtype=torch.float64, generator=generator)
    for step, transition in enumerate(transitions(schedule, (True,) * 50, "ddim", 1.0)):
        expected = reference.step(
            output, int(timesteps[step]), x, eta=1.0, variance_noise=noise, return_dict=False
        )[0]
        mean = transition.mean(*clean_and_noise(output, x, schedule, step))
        torch.testing.assert_close(mean + transition.std * noise, expected, rtol=1e-9, atol=1e-9)


def test_euler_levels_need_a_deterministic_last_step(tmp_path: Path) -> None:
    stable_diffusion_xl.build(tmp_path)
    schedule = opened(tmp_path).schedule(10)
    with pytest.raises(PlanError, match=r"step 9: a ddim transition .* standard deviation 0"):
        transitions(schedule, (True,) * 10, "ddim", 1.0)
    assert len(transitions(schedule, (True,) * 9 + (False,), "ddim", 1.0)) == 10


@pytest.mark.parametrize(
    ("scheduler", "settings", "message"),
    [
        ("HeunDiscreteScheduler", BETAS, "got a checkpoint with a HeunDiscreteScheduler; .* must"),
        (
            "DPMSolverMultistepScheduler",
            {**BETAS, "prediction_type": "flow_prediction"},
            "prediction_type 'flow_prediction'; must be epsilon",
        ),
        (
            "LCMScheduler",
            BETAS,
            "got a checkpoint with a LCMScheduler; the scheduler must be one of",
        ),
        (
            "TCDScheduler",
            BETAS,
            "got a checkpoint with a TCDScheduler; the scheduler must be one of",
        ),
        (
            "DPMSolverMultistepScheduler",
            {**BETAS, "algorithm_type": "sde-dpmsolver++"},
            r"has algorithm_type 'sde-dpmsolver\+\+', .*; must be 'dpmsolver\+\+'",
        ),
        (
            "UniPCMultistepScheduler",
            {**BETAS, "use_flow_sigmas": True},
            "has use_flow_sigmas true; must be false",
        ),
        ("DDIMScheduler", {**SCHEDULER, "thresholding": True}, "has thresholding true; must be"),
        (
            "DDIMScheduler",
            {**SCHEDULER, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            "pure noise .* must be v_prediction or sample",
        ),
    ],
)
def test_what_has_no_such_steps_is_refused(
    scheduler: str, settings: dict[str, Any], message: str, source: Path, tmp_path: Path
) -> None:
    folder = changed(source, tmp_path, scheduler, **settings)
    with pytest.raises(ModelError, match=f"model.path: .*{message}"):
        opened(folder).schedule(10)


@pytest.mark.parametrize(
    ("name", "stands_in"),
    [
        ("DDPMScheduler", "DDIMScheduler"),
        ("EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler"),
        ("EulerDiscreteScheduler", None),
        ("DDIMScheduler", None),
    ],
)
def test_a_schedulers_noise_that_is_left_out_is_told(
    name: str,
    stands_in: str | None,
    source: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    opened(changed(source, tmp_path, name, **BETAS))
    told = f"a {name}, adds noise at every step; steps without noise are {stands_in}'s on"
    assert (told in caplog.text) == bool(caplog.text) == (stands_in is not None)


def test_clipping_is_refused_where_the_pipeline_does_it(tmp_path: Path) -> None:
    stable_diffusion_xl.build(tmp_path / "source")
    folder = changed(tmp_path / "source", tmp_path / "clipping", "DDIMScheduler", **BETAS)
    with pytest.raises(ModelError, match=r"model\.path: .* has clip_sample true; must be false"):
        opened(folder)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
@pytest.mark.parametrize("version", [..., "0.6.0", "0.8.1", "0.9.0.dev0", "0.10.2", "1.0"])
@pytest.mark.parametrize("size", [8, 64, 96, [8, 12]])
def test_the_size_is_the_pipelines_own(
    name: str, version: Any, size: Any, source: Path, tmp_path: Path
) -> None:
    """diffusers before 0.9 wrote 32 where 64 was meant; only the older pipeline corrects it."""
    if name == "StableDiffusionXLPipeline":
        source = tmp_path / "xl"
        stable_diffusion_xl.build(source)
    settings = {"sample_size": size, "_diffusers_version": version}
    folder = edited(source, tmp_path / "edited", {"unet/config.json": settings})
    latents = diffusers.DiffusionPipeline.from_pretrained(folder).unet.config.sample_size
    expected = (2 * latents,) * 2 if isinstance(latents, int) else tuple(2 * x for x in latents)
    assert opened(folder).sampling.size == expected


def test_settings_that_stable_diffusion_lacks_are_refused(source: Path) -> None:
    with pytest.raises(
        ModelError, match=r"model\.attention_backend: got 'native'; the unet of .* n"
    ):
        model = ModelConfig(path=str(source), attention_backend="native")
        open_policy(model, device=torch.device("cpu"))
    with pytest.raises(ModelError, match=r"model\.max_sequence_length: got 64; .* must be null"):
        model = ModelConfig(path=str(source), max_sequence_length=64)
        open_policy(model, device=torch.device("cpu"))
    with pytest.raises(ModelError, match="steps: got 1000; must be less than the 1000 levels"):
        opened(source).schedule(1000)


def test_the_stochastic_step_is_the_familys_own(source: Path, treegrpo: CommandLine) -> None:
    schedule, config = opened(source).schedule(10), load_config(None, [])
    plan = tree_grpo(10, branching=3, window_size=3)
    kinds: tuple[TransitionKind, ...] = ("ddim", "flow_sde")
    for levels, kind in zip(
        (schedule, flow_schedule([1 - n / 10 for n in range(11)])), kinds, strict=True
    ):
        steps = method_of(config).transitions(levels, plan)
        assert steps == transitions(levels, plan.stochastic, kind, config.rollout.noise_level)
    # Another family's is refused before torch is imported, let alone a reward's weights read.
    for command in ("train", "plan"):
        for kind in ("flow_sde", "dance_sde"):
            arguments = (f"model.path={source}", f"rollout.transition={kind}")
            message = treegrpo.refusal(command, *arguments)
            assert message.startswith(f"rollout.transition: got {kind}, which is for flow models; ")
    # Of a hub's checkpoint nothing is known before it is here.
    wrong = method_of(load_config(None, ["rollout.transition=dance_sde"]))
    with pytest.raises(PlanError, match=r"^rollout\.transition: got dance_sde"):
        wrong.transitions(schedule, plan)

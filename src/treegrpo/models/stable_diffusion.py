"""Stable Diffusion 1, 2 and XL: variance-preserving diffusion on a UNet.

The checkpoint's own scheduler says which levels there are. Our states are what the network takes,
`alpha * clean + sigma * noise` with `alpha^2 + sigma^2 = 1`, whatever form the scheduler keeps its
own in, and the deterministic step is DDIM's with eta 0 (arXiv 2010.02502), which is also what every
first-order solver's (Euler's) comes to. Solvers of a higher order (PNDM, DPM-Solver++) mix several
predictions into a step; of them we take the levels only.

Left out: consistency sampling, inpainting, the refiner of SDXL and safety checkers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from treegrpo.models.folder import ModelError, loading
from treegrpo.models.latents import ImageLatents, decode
from treegrpo.models.policy import Conditioning, Configs, Sampling
from treegrpo.transition import Schedule, variance_preserving_schedule

# Schedulers that keep their levels as cumulative alphas, and those that keep them as sigma / alpha.
_BY_ALPHAS = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler")
_BY_SIGMAS = (
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LMSDiscreteScheduler",
    "UniPCMultistepScheduler",
)


class StableDiffusion(ImageLatents):
    """`StableDiffusionPipeline`: Stable Diffusion 1.x and 2.x and SD-Turbo.

    The safety checker is not loaded: rewards and evaluations see every image.
    """

    pipeline_name: ClassVar = "StableDiffusionPipeline"
    network_name: ClassVar = "unet"
    lora_targets: ClassVar = ("to_k", "to_out.0", "to_q", "to_v")
    defaults: ClassVar = Sampling(steps=50, guidance_scale=7.5)
    scheduler_changes: ClassVar[Mapping[str, Any]] = {"steps_offset": 1, "clip_sample": False}
    """Scheduler settings that the pipeline sets, whatever the checkpoint says."""

    def make_scheduler(self) -> Any:
        """DDIM for the checkpoint's levels where it keeps them as alphas, else its own solver."""
        scheduler, folder = super().make_scheduler(), self.checkpoint.folder
        config = scheduler.config
        for setting in ("clip_sample", "thresholding"):
            if {**config, **self.scheduler_changes}.get(setting):
                raise ModelError(
                    f"model.path: the scheduler of {folder} has {setting} true; must be "
                    "false, since latents have no bounds"
                )
        solver = type(scheduler)
        if solver.__name__ in _BY_ALPHAS:
            solver = DDIMScheduler
        with loading(folder / "scheduler"):
            return solver.from_config(config, **self.scheduler_changes)

    @classmethod
    def default_size(cls, configs: Configs) -> tuple[int, int] | None:
        """The network's `sample_size`, but at least 64 where diffusers wrote it before 0.9."""
        unet = configs["unet"]
        size, written_by = unet.get("sample_size"), unet.get("_diffusers_version", "1.0")
        is_old = tuple(map(int, written_by.split(".")[:2])) < (0, 9)
        if is_old and isinstance(size, int) and size < 64:
            size = 64 * cls.pixels_per_latent(configs)
            return size, size
        return super().default_size(configs)

    @classmethod
    def size_multiple(cls, configs: Configs) -> int:
        """A latent in pixels, and the pipeline's own."""
        return math.lcm(8, cls.pixels_per_latent(configs))

    @classmethod
    def check_sampling(cls, sampling: Sampling, configs: Configs) -> None:
        """A prompt length is refused, and schedulers and networks without DDIM steps."""
        super().check_sampling(sampling, configs)
        if sampling.max_sequence_length is not None:
            raise ModelError(
                f"model.max_sequence_length: got {sampling.max_sequence_length}; "
                f"{cls.pipeline_name}'s text encoders have no choice, so it must be null"
            )
        scheduler = configs["scheduler"]
        name, prediction = scheduler.get("_class_name"), scheduler.get("prediction_type", "epsilon")
        if name not in (*_BY_ALPHAS, *_BY_SIGMAS):
            raise ModelError(
                f"model.path: got a checkpoint with a {name}; the scheduler must be one of "
                f"{', '.join(sorted((*_BY_ALPHAS, *_BY_SIGMAS)))}"
            )
        if prediction not in ("epsilon", "v_prediction", "sample"):
            raise ModelError(
                f"model.path: got a checkpoint with prediction_type {prediction!r}; must be "
                "epsilon, v_prediction or sample"
            )
        if configs["unet"].get("time_cond_proj_dim") is not None:
            raise ModelError(
                "model.path: got a latent consistency model (its unet has time_cond_proj_dim); "
                "must be a diffusion model, since consistency sampling has no DDIM steps"
            )

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """CLIP's tokens, in SDXL of both encoders side by side."""
        encoders = [c for name, c in self.configs.items() if name.startswith("text_encoder")]
        tokens = encoders[0]["max_position_embeddings"]
        return {"embeddings": (tokens, sum(encoder["hidden_size"] for encoder in encoders))}

    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        """By CLIP."""
        embeddings, _ = pipeline.encode_prompt(prompts, self.device, 1, False)
        return {"embeddings": embeddings}

    def noise_levels(self, steps: int) -> tuple[Schedule, list[float]]:
        """Each step ends at the next timestep's level.

        diffusers' DDIM ends `trained // steps` timesteps on, which differs where the timesteps are
        unevenly apart: linspace ones, and trailing ones whose number does not divide 1000.
        """
        trained = self.scheduler.config.num_train_timesteps
        if steps >= trained:
            raise ModelError(
                f"steps: got {steps}; must be less than the {trained} levels that the model was "
                "trained on"
            )
        self.scheduler.set_timesteps(steps)
        timesteps = self.scheduler.timesteps
        if isinstance(self.scheduler, DDIMScheduler):
            kept = self.scheduler.alphas_cumprod[timesteps].tolist()
            # The last level may hold a little noise, which the decoder then gets to see.
            alphas_cumprod = [*kept, float(self.scheduler.final_alpha_cumprod)]
        else:
            alphas_cumprod = [1 / (1 + sigma**2) for sigma in self.scheduler.sigmas.tolist()]
        prediction = self.scheduler.config.prediction_type
        if alphas_cumprod[0] == 0 and prediction == "epsilon":
            raise ModelError(
                f"model.path: the scheduler of {self.checkpoint.folder} begins at pure noise "
                "(rescale_betas_zero_snr), where a prediction of the noise says nothing about the "
                "image; prediction_type must be v_prediction or sample"
            )
        return variance_preserving_schedule(alphas_cumprod, prediction), timesteps.float().tolist()

    def noise(self, count: int, generator: torch.Generator | None) -> Tensor:
        """States at the first level, of the variance that the pipeline's own have there.

        That is 1, but for Euler's schedulers with linspace or trailing timesteps `sigma^2`: they
        leave out what little of the image the first level holds.
        """
        noise = super().noise(count, generator)
        self.scheduler.set_timesteps(self.sampling.steps)
        first: Tensor = self.scheduler.scale_model_input(
            noise * self.scheduler.init_noise_sigma, self.scheduler.timesteps[0]
        )
        return first

    def forward(
        self, network: nn.Module, x: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """What the scheduler's `prediction_type` says."""
        output: Tensor = network(
            x,
            timestep,
            encoder_hidden_states=conditioning["embeddings"],
            added_cond_kwargs=self.added_conditioning(conditioning),
            return_dict=False,
        )[0]
        return output

    def added_conditioning(self, conditioning: Conditioning) -> Conditioning | None:
        """What the network gets beside the text's embeddings."""
        return None

    def decode_latents(self, latents: Tensor) -> Tensor:
        """With the decoder's factor, and no shift, whether it has one or not."""
        return decode(self.vae, latents / self.vae.config.scaling_factor)


class StableDiffusionXL(StableDiffusion):
    """`StableDiffusionXLPipeline`: Stable Diffusion XL and SDXL-Turbo.

    The network is told the image's size, as if nothing had been cropped off.
    """

    pipeline_name: ClassVar = "StableDiffusionXLPipeline"
    defaults: ClassVar = Sampling(steps=50, guidance_scale=5.0)
    kept_layers: ClassVar = ("text_encoder", "text_encoder_2")
    scheduler_changes: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def default_size(cls, configs: Configs) -> tuple[int, int] | None:
        """The network's `sample_size`, whoever wrote it."""
        return super(StableDiffusion, cls).default_size(configs)

    @classmethod
    def check_sampling(cls, sampling: Sampling, configs: Configs) -> None:
        """A network that is told something other than the pooled embedding and sizes is refused."""
        super().check_sampling(sampling, configs)
        unet, pooled = configs["unet"], configs["text_encoder_2"]["projection_dim"]
        given = 6 * unet["addition_time_embed_dim"] + pooled
        taken = unet["projection_class_embeddings_input_dim"]
        if unet["addition_embed_type"] != "text_time" or given != taken:
            raise ModelError(
                f"model.path: the unet has addition_embed_type {unet['addition_embed_type']!r} and "
                f"takes {taken} numbers beside the text, but the pipeline gives {given} as "
                "text_time; must be a base model of Stable Diffusion XL (not a refiner)"
            )

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """And the second encoder's pooled embedding."""
        pooled = self.configs["text_encoder_2"]["projection_dim"]
        return {**super().conditioning_shapes(), "pooled": (pooled,)}

    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        """By both CLIP encoders."""
        embeddings, _, pooled, _ = pipeline.encode_prompt(
            prompts, device=self.device, do_classifier_free_guidance=False
        )
        return {"embeddings": embeddings, "pooled": pooled}

    def negative(self) -> Conditioning:
        """Zeros for an empty prompt, where the pipeline's index says so."""
        conditioning, index = super().negative(), self.checkpoint.index
        if self.sampling.negative_prompt or not index.get("force_zeros_for_empty_prompt", True):
            return conditioning
        return {name: torch.zeros_like(values) for name, values in conditioning.items()}

    def added_conditioning(self, conditioning: Conditioning) -> Conditioning:
        """The second encoder's pooled embedding, and the sizes."""
        pooled = conditioning["pooled"]
        size = self.sampling.size
        # The original size, the corner of the crop, the size to draw.
        time_ids = torch.tensor([*size, 0, 0, *size], dtype=torch.float32, device=pooled.device)
        return {"text_embeds": pooled, "time_ids": time_ids.expand(len(pooled), -1)}

    def decode_latents(self, latents: Tensor) -> Tensor:
        """With the decoder's means and deviations as well, where it has both."""
        config = self.vae.config
        if config.latents_mean is None or config.latents_std is None:
            return super().decode_latents(latents)
        mean, std = (
            torch.tensor(values, device=latents.device).view(-1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return decode(self.vae, latents * std / config.scaling_factor + mean)

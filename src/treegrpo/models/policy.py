"""The model, seen from training and evaluation: `Policy`, and how it is sampled, `Sampling`.

`Policy` holds what every text-to-image model needs: guidance, precision, decoding in batches. A
family file (`sd3.py`) subclasses it and says only what differs; docs/families.md is the guide.

Left out: loading (`opening.py`), text encoders (`text.py`), LoRA (`adapters.py`), `export.py`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from treegrpo.images import evenly_spaced
from treegrpo.models.cache import MANIFEST_FILE, model_folder
from treegrpo.models.components import Components
from treegrpo.models.folder import ModelError
from treegrpo.models.settings import absent_parts, complete, limit_tokenizers
from treegrpo.models.text import (
    Conditioning,
    EmbeddingStore,
    PromptEncoder,
    load_encoders,
    model_key,
    stack,
)
from treegrpo.plan import PlanError
from treegrpo.rollout import Predict
from treegrpo.transition import Schedule

__all__ = ["Conditioning", "Configs", "Policy", "Sampling"]

# Component to its config.json, completed by its class's defaults.
Configs = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Sampling:
    """How a checkpoint is sampled; written beside an exported model as `sampling.json`.

    Attributes:
        steps: denoising steps.
        guidance_scale: classifier-free guidance, or for guidance-distilled models the value that
            they are told; 1 is none.
        negative_prompt: what classifier-free guidance leads away from.
        height, width: of the image, in pixels; None is the model's own size.
        frames: of a video; None for image models.
        max_sequence_length: tokens of the prompt, where the text encoder has a choice.
        base_model: for a folder of LoRA weights, the checkpoint that they belong to.
    """

    steps: int = 28
    guidance_scale: float = 1.0
    negative_prompt: str = ""
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    max_sequence_length: int | None = None
    base_model: str | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, of a policy's sampling, where both are known."""
        assert self.height is not None and self.width is not None
        return self.height, self.width


class Policy(ABC):
    """A text-to-image (or text-to-video) model under training.

    Building one reads configurations only and refuses settings that the checkpoint does not allow;
    `opening.load_weights` reads the weights.

    Attributes:
        network: the model that is trained; the trainer may replace it by a wrapped one.
        sampling: complete: the family's defaults, the checkpoint's values, the caller's.
        text: the text encoders and the embeddings that they gave.
    """

    # --- what a family says ---

    pipeline_name: ClassVar[str]
    """The diffusers pipeline."""
    network_name: ClassVar[str] = "transformer"
    """The component that is trained."""
    lora_targets: ClassVar[tuple[str, ...]]
    """The layers that get an adapter by default: those of diffusers' own training scripts."""
    defaults: ClassVar[Sampling]
    """The pipeline's own defaults."""
    kept_layers: ClassVar[tuple[str, ...]] = ()
    """The text encoders of which the pipeline wants every layer's output."""
    schedulers: ClassVar[tuple[str, ...]]
    """Those whose levels are followed: of deterministic solvers, and what may stand for one."""
    longest_prompt: ClassVar[int | None] = None
    """In tokens: the limit of the pipeline's `check_inputs`, which no configuration holds."""
    optional_parts: ClassVar[tuple[str, ...]] = ()
    """Text encoders and tokenizers that the pipeline can do without."""
    guidance_is_embedded: ClassVar[bool] = False
    """Whether guidance is an input of the network (distilled) instead of a second prediction."""

    @classmethod
    def default_sampling(cls, configs: Configs) -> Sampling:
        """How this checkpoint is sampled where neither it nor the caller says."""
        return cls.defaults

    @classmethod
    def pixels_per_latent(cls, configs: Configs) -> int:
        """In each direction: each level of the decoder but one doubles them."""
        return int(2 ** (len(configs["vae"]["block_out_channels"]) - 1))

    @classmethod
    @abstractmethod
    def default_size(cls, configs: Configs) -> tuple[int, int] | None:
        """Height and width in pixels that the checkpoint was made for, if it says so."""

    @classmethod
    @abstractmethod
    def size_multiple(cls, configs: Configs) -> int:
        """What height and width must be divisible by: the decoder's factor times the patch."""

    @classmethod
    def latent_channels(cls, configs: Configs) -> int:
        """Of the decoder, as the network should take them."""
        return int(configs["vae"]["latent_channels"])

    @classmethod
    def check_sampling(cls, sampling: Sampling, configs: Configs) -> None:
        """Refuse what this family does not allow, beside sizes, with a ModelError."""
        if sampling.frames is not None:
            raise ModelError(
                f"model.frames: got {sampling.frames}; {cls.pipeline_name} makes images, so it "
                "must be null"
            )

    def check_scheduler(self, scheduler: Mapping[str, Any]) -> None:
        """Refuse, with a ModelError, a scheduler for which our steps would be another sampler.

        A rollout's steps without noise are an ODE solver's. Few-step and stochastic samplers draw
        other images from the same levels, and models distilled for them draw poor ones otherwise.
        """
        name, whose = scheduler["_class_name"], f"the scheduler of {self.checkpoint.folder}"
        if name not in self.schedulers:
            raise ModelError(
                f"model.path: got a checkpoint with a {name}; the scheduler must be one of "
                f"{', '.join(sorted(self.schedulers))} (steps without noise are an ODE solver's; "
                "where that suits the weights, name one in model_index.json and in scheduler/)"
            )
        if scheduler.get("thresholding"):
            raise ModelError(
                f"model.path: {whose} has thresholding true; must be false, since latents have no "
                "bounds"
            )
        if scheduler.get("stochastic_sampling"):
            raise ModelError(
                f"model.path: {whose} has stochastic_sampling true, which adds noise at every step "
                "where ours would follow the ODE; must be false, where that suits the weights"
            )
        algorithm = str(scheduler.get("algorithm_type"))
        if algorithm.startswith("sde-"):
            raise ModelError(
                f"model.path: {whose} has algorithm_type {algorithm!r}, which adds noise at every "
                f"step where ours would follow the ODE; must be {algorithm.removeprefix('sde-')!r},"
                " where that suits the weights"
            )

    def make_scheduler(self) -> Any:
        """The checkpoint's scheduler, set as the pipeline sets it."""
        return self.checkpoint.scheduler()

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """Of one state, as the network takes it."""

    @abstractmethod
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of one prompt's conditioning, at its longest; names as `encode_prompts` gives them."""

    def encoder_tokens(self) -> int:
        """Tokens of the longest prompt with what the pipeline puts around it; CLIP's are fixed."""
        return self.sampling.max_sequence_length or 0

    @abstractmethod
    def encode_prompts(
        self, pipeline: Any, prompts: list[str]
    ) -> Mapping[str, Tensor | list[Tensor]]:
        """Conditioning by name, by the `encode_prompt` of a pipeline of text encoders alone.

        A row for each of at most `PROMPTS_PER_ENCODING` prompts, perhaps of several lengths.
        """

    @abstractmethod
    def noise_levels(self, steps: int) -> tuple[Schedule, list[float]]:
        """The schedule, and the timestep that the network is given at each step."""

    @abstractmethod
    def forward(
        self, network: nn.Module, x: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """One network call: what the schedule's `prediction` says, in the shape of x.

        Args:
            x: float32 [rows, *latent_shape], with a row of each conditioning for every row.
            timestep: float32 [rows].
        """

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Finished latents to pixels in about [-1, 1], of the shapes that `decode` says."""

    def guide(self, given: Tensor, without: Tensor) -> Tensor:
        """Classifier-free guidance from the predictions with the prompt and without it."""
        return without + self.sampling.guidance_scale * (given - without)

    def call_settings(self) -> dict[str, Any]:
        """What the diffusers pipeline's `__call__` is given to sample in the same way."""
        settings = {
            "num_inference_steps": self.sampling.steps,
            "guidance_scale": self.sampling.guidance_scale,
            "height": self.sampling.height,
            "width": self.sampling.width,
            "negative_prompt": self.sampling.negative_prompt or None,
            "num_frames": self.sampling.frames,
            "max_sequence_length": self.sampling.max_sequence_length,
        }
        return {name: value for name, value in settings.items() if value is not None}

    @property
    def is_guided(self) -> bool:
        """Whether a forward takes two rows of the network, with the prompt and without."""
        return self.sampling.guidance_scale > 1 and not self.guidance_is_embedded

    def negative(self) -> Conditioning:
        """The conditioning that guidance leads away from: one row."""
        return self.encode([self.sampling.negative_prompt])

    # --- what all share ---

    def __init__(
        self,
        checkpoint: Components,
        sampling: Sampling,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        cache: Path | None = None,
        cache_bytes: float | None = None,
    ) -> None:
        """Made by `opening.open_policy`.

        Args:
            device: of the network, the decoder, the text encoders and the states.
            dtype: what the network computes in.
            cache: where prompt embeddings are kept; None keeps them and the encoders in memory.
            cache_bytes: the most that all models' embeddings there take; None: any.

        Raises:
            ModelError: a setting that the checkpoint or the device does not allow.
        """
        self.checkpoint, self.configs = checkpoint, complete(checkpoint)
        self._absent = absent_parts(checkpoint, self.optional_parts)
        self.device, self.dtype = device, dtype
        emulated = device.type == "cuda" and not torch.cuda.is_bf16_supported(False)
        if dtype == torch.bfloat16 and emulated:
            raise ModelError(
                f"model.dtype: got bfloat16, which {torch.cuda.get_device_name(device)} does not "
                "compute in; must be float32"
            )
        height, width = self.default_size(self.configs) or (None, None)
        self.sampling = replace(
            sampling, height=sampling.height or height, width=sampling.width or width
        )
        self._check_channels()
        self._check_size()
        self._check_prompt_length()
        self.check_sampling(self.sampling, self.configs)
        self.check_scheduler(self.configs["scheduler"])
        self.scheduler: Any = self.make_scheduler()
        self.network: nn.Module
        self.vae: Any = None
        folder = None
        if cache is not None:
            classes = {name: checkpoint.index[name] for name in checkpoint.text_parts}
            # Zeros in the place of an absent encoder are as wide as the network takes them.
            width = self.configs[self.network_name].get("joint_attention_dim")
            length = self.sampling.max_sequence_length
            settings = f"{self.pipeline_name} {classes} {dtype} {length} {width}"
            manifest = cache / MANIFEST_FILE
            key = model_key(checkpoint.folder, checkpoint.text_parts, settings, manifest)
            try:
                folder = model_folder(cache, key, checkpoint.folder)
            except OSError as error:
                message = f"model.embedding_cache: cannot be written to ({error})"
                raise ModelError(message) from error
        store = EmbeddingStore(folder, cache_bytes)
        self.text = PromptEncoder(self._load_encoders, self.encode_prompts, store, device)

    def _check_channels(self) -> None:
        taken = self.configs[self.network_name]["in_channels"]
        channels = self.latent_channels(self.configs)
        if taken != channels:
            raise ModelError(
                f"model.path: the {self.network_name} of {self.checkpoint.folder} takes {taken} "
                f"channels, but the decoder's latents give {channels}; must be a checkpoint that "
                "draws from text alone (networks for inpainting or editing take more)"
            )

    def _check_size(self) -> None:
        multiple = self.size_multiple(self.configs)
        if self.sampling.height is None or self.sampling.width is None:
            raise ModelError(
                f"model.height: must be given, and model.width: the {self.network_name} of "
                f"{self.checkpoint.folder} has no sample_size"
            )
        for name, value in zip(("height", "width"), self.sampling.size, strict=True):
            if value % multiple:
                below = value // multiple * multiple
                near = [size for size in (below, below + multiple) if size > 0]
                raise ModelError(
                    f"model.{name}: got {value}; must be a multiple of {multiple} (the decoder's "
                    f"factor and the network's patches), such as {' or '.join(map(str, near))}"
                )

    def _check_prompt_length(self) -> None:
        length, most = self.sampling.max_sequence_length, self.longest_prompt
        if length is not None and most is not None and length > most:
            raise ModelError(f"model.max_sequence_length: got {length}; must be at most {most}")

    def _load_encoders(self) -> Any:
        # Some pipelines look into these two for sizes.
        network = self.checkpoint.without_weights(self.network_name)
        present = {"scheduler": self.scheduler, self.network_name: network}
        pipeline = load_encoders(
            self.checkpoint, {**self._absent, **present}, self.dtype, self.device
        )
        limit_tokenizers(pipeline)
        return pipeline

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts to conditioning on the device, [prompts, ...] by name; see `PromptEncoder`."""
        return self.text.encode(prompts)

    def prepare(
        self,
        prompts: Sequence[str],
        say: Callable[[str], None] = print,
        others: Sequence[str] = (),
    ) -> None:
        """`PromptEncoder.prepare` for all prompts of a run, and the negative one."""
        self.negative()
        self.text.prepare(prompts, say, [self.sampling.negative_prompt, *others])

    def noise(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Standard normal float32 [count, *latent_shape]: states at the first level."""
        return torch.randn(count, *self.latent_shape, generator=generator, device=self.device)

    def schedule(self, steps: int) -> Schedule:
        """The checkpoint's own levels; ModelError: they are none that a rollout can follow."""
        try:
            return self.noise_levels(steps)[0]
        except PlanError as error:
            raise ModelError(
                f"model.path: {type(self.scheduler).__name__}, the scheduler of "
                f"{self.checkpoint.folder}, has noise levels that cannot be used: {error}"
            ) from error

    def predictor(
        self, conditioning: Conditioning, steps: int, network: nn.Module | None = None
    ) -> Predict:
        """The model as the algorithm calls it, for these prompts; guidance happens inside.

        `network` stands in for the policy's own, such as a reference model.
        """
        timesteps = self.noise_levels(steps)[1]
        negative = self.negative() if self.is_guided else None

        def predict(x: Tensor, step: int, prompt_index: Tensor) -> Tensor:
            chosen = {name: values[prompt_index] for name, values in conditioning.items()}
            if negative is None:
                return self._call(x, timesteps[step], chosen, network)
            # Both halves in one call.
            both = {
                name: stack([*negative[name].expand(len(x), *negative[name].shape[1:]), *values])
                for name, values in chosen.items()
            }
            without, given = self._call(torch.cat([x, x]), timesteps[step], both, network).chunk(2)
            return self.guide(given, without)

        return predict

    def _call(
        self, x: Tensor, timestep: float, conditioning: Conditioning, network: nn.Module | None
    ) -> Tensor:
        with torch.autocast(
            self.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False
        ):
            timesteps = torch.full((len(x),), float(timestep), device=x.device)
            return self.forward(network or self.network, x, timesteps, conditioning).float()

    @torch.no_grad()
    def decode(self, latents: Tensor, max_batch: int, frames: int | None = None) -> Tensor:
        """Finished latents [rows, *latent_shape] to pixels in [0, 1], `max_batch` rows at once.

        Float32 images [rows, 3, height, width], or videos [rows, frames, 3, height, width] with so
        many evenly spaced frames: whole videos fill the memory.
        """
        images = []
        for part in torch.split(latents, max_batch):
            decoded = self.decode_latents(part.to(self.device))
            if decoded.dim() == 5 and frames is not None:
                decoded = decoded[:, evenly_spaced(decoded.shape[1], frames)]
            pixels = decoded.float() / 2 + 0.5
            # An infinite pixel stays no number: clamped, it would pass for black or white.
            images.append(pixels.clamp(0, 1).masked_fill_(pixels.isinf(), math.nan))
        return torch.cat(images)

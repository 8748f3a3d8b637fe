"""The model, seen from the trainer: `Policy`, and `load_policy`, which makes one of a checkpoint.

`Policy` holds what every text-to-image model needs: embeddings, guidance, precision, adapters,
decoding in batches, export. A family file (`sd3.py`) subclasses it and says only what differs.
Families are recognised from the checkpoint's own `model_index.json`. docs/families.md is the guide
to adding one.
"""

from __future__ import annotations

import difflib
import gc
import importlib
import json
import math
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from treegrpo.errors import reason
from treegrpo.images import evenly_spaced
from treegrpo.models.embeddings import EmbeddingStore, model_key
from treegrpo.models.folder import (
    FAMILIES,
    INDEX_FILE,
    LORA_FILE,
    SAMPLING_FILE,
    ModelError,
    check_family,
    check_folder,
    component_configs,
    components,
    read_json,
    resolve,
)
from treegrpo.plan import PlanError
from treegrpo.rollout import Predict
from treegrpo.transition import Schedule, flow_schedule

# Component to its config.json.
Configs = Mapping[str, Mapping[str, Any]]
# What the text encoders give, by name: [prompts, ...] each.
Conditioning = dict[str, Tensor]

PROMPTS_PER_ENCODING = 32
_LETTERS_PER_TOKEN = 4.5  # of English, in today's vocabularies
# Of a hub's checkpoint, where its weights are not needed.
_CONFIG_FILES = ["model_index.json", "*/config.json", "scheduler/scheduler_config.json"]


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
    `load` reads the weights.

    Attributes:
        network: the model that is trained; the trainer may replace it by a wrapped one.
        vae: its decoder.
        scheduler: the checkpoint's own, for its noise levels.
        sampling: complete: the family's defaults, the checkpoint's values, the caller's.
        configs: the components' configurations.
        folder: the checkpoint on disk.
        forwards: rows that have gone through the network.
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
    guidance_is_embedded: ClassVar[bool] = False
    """Whether guidance is an input of the network (distilled) instead of a second prediction."""

    @classmethod
    def default_sampling(cls, configs: Configs) -> Sampling:
        """How this checkpoint is sampled where neither it nor the caller says."""
        return cls.defaults

    @classmethod
    @abstractmethod
    def default_size(cls, configs: Configs) -> tuple[int, int]:
        """Height and width in pixels that the checkpoint was made for."""

    @classmethod
    @abstractmethod
    def size_multiple(cls, configs: Configs) -> int:
        """What height and width must be divisible by: the decoder's factor times the patch."""

    @classmethod
    def check_sampling(cls, sampling: Sampling, configs: Configs) -> None:
        """Refuse what this family does not allow, beside sizes (raises ModelError)."""
        if sampling.frames is not None:
            raise ModelError(
                f"model.frames: got {sampling.frames}; {cls.pipeline_name} makes images, so it "
                "must be null"
            )

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """Of one state, as the network takes it."""

    @abstractmethod
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of one prompt's conditioning, at its longest; names as `encode_prompts` gives them."""

    def encoder_tokens(self) -> int:
        """Of the longest prompt, with what the pipeline puts around it, for text encoders whose
        prompts have no fixed length."""
        return self.sampling.max_sequence_length or 0

    @abstractmethod
    def encode_prompts(
        self, pipeline: Any, prompts: list[str]
    ) -> Mapping[str, Tensor | list[Tensor]]:
        """Conditioning by name, a row per prompt, from a pipeline of text encoders alone, by its
        `encode_prompt`. Rows may differ in their first dimension."""

    @abstractmethod
    def noise_levels(self, steps: int) -> tuple[Schedule, list[float]]:
        """The schedule, and the timestep that the network is given at each step."""

    @abstractmethod
    def forward(
        self, network: nn.Module, x: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """One network call.

        Args:
            x: float32 [rows, *latent_shape].
            timestep: float32 [rows].

        Returns:
            [rows, *latent_shape]: what the schedule's `prediction` says.
        """

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """[rows, *latent_shape] to images in about [-1, 1]: [rows, 3, height, width], or for
        videos [rows, frames, 3, height, width]."""

    def guide(self, given: Tensor, without: Tensor) -> Tensor:
        """Classifier-free guidance from the predictions with the prompt and without it."""
        return without + self.sampling.guidance_scale * (given - without)

    def call_settings(self) -> dict[str, Any]:
        """What the diffusers pipeline's `__call__` is given to sample in the same way."""
        sampling = self.sampling
        settings: dict[str, Any] = {
            "num_inference_steps": sampling.steps,
            "guidance_scale": sampling.guidance_scale,
            "height": sampling.height,
            "width": sampling.width,
        }
        if sampling.negative_prompt:
            settings["negative_prompt"] = sampling.negative_prompt
        if sampling.frames is not None:
            settings["num_frames"] = sampling.frames
        if sampling.max_sequence_length is not None:
            settings["max_sequence_length"] = sampling.max_sequence_length
        return settings

    def negative(self) -> Conditioning:
        """The conditioning that guidance leads away from: one row."""
        return self.encode([self.sampling.negative_prompt])

    # --- what all share ---

    def __init__(
        self,
        folder: Path,
        index: Mapping[str, Any],
        sampling: Sampling,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        cache: Path | None = None,
    ) -> None:
        """
        Args:
            sampling: the checkpoint's values and the caller's; from `open_policy`.
            dtype: what the network computes in.
            cache: where prompt embeddings are kept; None keeps them and the encoders in memory.

        Raises:
            ModelError: a setting that the checkpoint or the device does not allow.
        """
        self.folder, self.index = folder, dict(index)
        self.device, self.dtype = device, dtype
        emulated = device.type == "cuda" and not torch.cuda.is_bf16_supported(False)
        if dtype == torch.bfloat16 and emulated:
            raise ModelError(
                f"model.dtype: got bfloat16, which {torch.cuda.get_device_name(device)} does not "
                "compute in; must be float32"
            )
        self.configs: Configs = component_configs(folder, self.index)
        height, width = self.default_size(self.configs)
        self.sampling = replace(
            sampling, height=sampling.height or height, width=sampling.width or width
        )
        self._check_sampling()
        self.scheduler: Any = self.part_class("scheduler").from_pretrained(
            folder, subfolder="scheduler"
        )
        self.network: nn.Module
        self.vae: Any = None
        self.forwards = 0
        self._uses_lora = False
        self._lora_folder: Path | None = None
        self._encoders: Any = None
        self.text_parts = [
            name for name in components(self.index) if name.startswith(("text_", "tokenizer"))
        ]
        if cache is not None:
            settings = f"{self.pipeline_name} {dtype} {self.sampling.max_sequence_length}"
            cache = cache / "embeddings" / model_key(folder, self.text_parts, settings)
        try:
            self.store = EmbeddingStore(cache)
        except OSError as error:
            raise ModelError(f"model.embedding_cache: cannot be written to ({error})") from error

    def _check_sampling(self) -> None:
        sampling, multiple = self.sampling, self.size_multiple(self.configs)
        for name, value in (("height", sampling.height), ("width", sampling.width)):
            if value is not None and value % multiple:
                below = value // multiple * multiple
                near = [size for size in (below, below + multiple) if size > 0]
                raise ModelError(
                    f"model.{name}: got {value}; must be a multiple of {multiple} (the decoder's "
                    f"factor and the network's patches), such as {' or '.join(map(str, near))}"
                )
        self.check_sampling(sampling, self.configs)

    def part_class(self, name: str) -> Any:
        library, class_name = self.index[name]
        return getattr(importlib.import_module(library), class_name)

    @property
    def _pipeline_class(self) -> Any:
        return getattr(importlib.import_module("diffusers"), self.pipeline_name)

    def skeleton(self) -> nn.Module:
        """The network without weights (on the meta device), to count and to look at."""
        with torch.device("meta"):
            network: nn.Module = self.part_class(self.network_name).from_config(
                dict(self.configs[self.network_name])
            )
        return network

    def load(self, *, master_weights: bool = False) -> None:
        """Read the network's and the decoder's weights.

        Args:
            master_weights: keep the network's weights in float32 whatever it computes in, as
                training all of them needs.
        """
        weights = torch.float32 if master_weights else self.dtype
        network = self._read(self.network_name, weights)
        if self._lora_folder is not None:
            network.load_lora_adapter(
                str(self._lora_folder), prefix=self.network_name, weight_name=LORA_FILE
            )
        self.network = network.to(self.device)
        self.vae = self._read("vae", self.dtype)
        self.vae.requires_grad_(False).eval().to(self.device)
        # Two-dimensional convolutions run up to twice as fast with the channels last.
        if all(parameter.dim() < 5 for parameter in self.vae.parameters()):
            self.vae.to(memory_format=torch.channels_last)

    def count_tokens(self, text: str) -> int:
        """Of a text, by the checkpoint's tokenizer, or roughly where its files are not here (of a
        hub's checkpoint of which nothing but the configurations is needed)."""
        folder = self.folder / "tokenizer"
        if not any(folder.glob("*")):
            return math.ceil(len(text) / _LETTERS_PER_TOKEN)
        return len(self.part_class("tokenizer").from_pretrained(folder)(text).input_ids)

    def _read(self, name: str, dtype: torch.dtype) -> Any:
        """A component with its weights.

        Raises:
            ModelError: some are missing, which would stay random.
        """
        part, report = self.part_class(name).from_pretrained(
            self.folder, subfolder=name, dtype=dtype, output_loading_info=True
        )
        missing = sorted(report["missing_keys"])
        if missing:
            raise ModelError(
                f"model.path: the weights in {self.folder / name} lack {len(missing)} of those of "
                f"{type(part).__name__}, among them {missing[0]!r}"
            )
        return part

    # --- prompts ---

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts to conditioning on the device, [prompts, ...] by name.

        Each prompt is computed once and kept. The text encoders are loaded when a prompt is new,
        and stay until `release_encoders`. Shorter sequences are padded with zeros.
        """
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.store]
        self._encode_new(missing)
        rows = [self.store.get(prompt) for prompt in prompts]
        return {
            name: _stack([row[name] for row in rows]).to(self.device, non_blocking=True)
            for name in rows[0]
        }

    def prepare(self, prompts: Sequence[str], say: Callable[[str], None] = print) -> None:
        """Encode all prompts that a run will need, then let the text encoders go.

        Args:
            say: told where that may take a while.

        Raises:
            ModelError: the disk has no room for them.
        """
        self.negative()
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.store]
        if len(new) > PROMPTS_PER_ENCODING:
            where = f", kept in {self.store.folder}" if self.store.folder else ""
            say(f"encoding {len(new):,} prompts{where}")
        self._encode_new(new[:PROMPTS_PER_ENCODING])
        if self.store.folder is not None and new:
            each = sum(t.numel() * t.element_size() for t in self.store.get(new[0]).values())
            free = shutil.disk_usage(self.store.folder).free
            if each * len(new) > free:
                raise ModelError(
                    f"model.embedding_cache: {self.store.folder} has {free / 2**30:.1f} GiB free, "
                    f"but the embeddings of {len(new):,} prompts need {each * len(new) / 2**30:.1f}"
                    " GiB; name a folder with room, or null to keep the text encoders in memory"
                )
        self._encode_new(new[PROMPTS_PER_ENCODING:])
        if self.store.folder is not None:
            self.release_encoders()

    def release_encoders(self) -> None:
        self._encoders = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def _encode_new(self, prompts: Sequence[str]) -> None:
        for start in range(0, len(prompts), PROMPTS_PER_ENCODING):
            part = list(prompts[start : start + PROMPTS_PER_ENCODING])
            encoded = self.encode_prompts(self._load_encoders(), part)
            for row, prompt in enumerate(part):
                self.store.put(prompt, {name: values[row] for name, values in encoded.items()})

    def _load_encoders(self) -> Any:
        """A pipeline of the text encoders and tokenizers alone."""
        if self._encoders is None:
            absent = {
                name: None
                for name, value in self.index.items()
                if isinstance(value, list) and name not in self.text_parts
            }
            # Some pipelines look into these two for sizes.
            present = {"scheduler": self.scheduler, self.network_name: self.skeleton()}
            encoders = [name for name in self.text_parts if name in self.configs]
            try:
                read = {name: self._read(name, self.dtype) for name in encoders}
                pipeline = self._pipeline_class.from_pretrained(
                    self.folder, dtype=self.dtype, **{**absent, **present, **read}
                )
            except ModelError:
                raise
            except (OSError, ValueError, RuntimeError) as error:
                raise ModelError(
                    f"model.path: cannot load the text encoders of {self.folder}: {error}"
                ) from error
            for part in read.values():
                part.requires_grad_(False).eval().to(self.device)
            self._encoders = pipeline
        return self._encoders

    # --- sampling ---

    def noise(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Standard normal float32 [count, *latent_shape]: states at the first level."""
        return torch.randn(count, *self.latent_shape, generator=generator, device=self.device)

    def schedule(self, steps: int) -> Schedule:
        """The checkpoint's own noise levels for so many steps.

        Raises:
            ModelError: they are none that a rollout can follow.
        """
        try:
            return self.noise_levels(steps)[0]
        except PlanError as error:
            raise ModelError(
                f"model.path: {type(self.scheduler).__name__}, the scheduler of {self.folder}, has "
                f"noise levels that cannot be used: {error}"
            ) from error

    def predictor(
        self, conditioning: Conditioning, steps: int, network: nn.Module | None = None
    ) -> Predict:
        """The model as the algorithm calls it, for these prompts; guidance happens inside.

        `network` stands in for the policy's own, for a reference model.
        """
        timesteps = self.noise_levels(steps)[1]
        guided = self.sampling.guidance_scale > 1 and not self.guidance_is_embedded
        negative = self.negative() if guided else None

        def predict(x: Tensor, step: int, prompt_index: Tensor) -> Tensor:
            chosen = {name: values[prompt_index] for name, values in conditioning.items()}
            if negative is None:
                return self._call(x, timesteps[step], chosen, network)
            # Both halves in one call.
            both = {
                name: _stack([*negative[name].expand(len(x), *negative[name].shape[1:]), *values])
                for name, values in chosen.items()
            }
            without, given = self._call(torch.cat([x, x]), timesteps[step], both, network).chunk(2)
            return self.guide(given, without)

        return predict

    def _call(
        self, x: Tensor, timestep: float, conditioning: Conditioning, network: nn.Module | None
    ) -> Tensor:
        self.forwards += len(x)
        with torch.autocast(
            self.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False
        ):
            timesteps = torch.full((len(x),), timestep, device=x.device)
            return self.forward(network or self.network, x, timesteps, conditioning).float()

    @torch.no_grad()
    def decode(self, latents: Tensor, max_batch: int, frames: int | None = None) -> Tensor:
        """Finished latents [rows, ...] to float32 images [rows, 3, height, width] in [0, 1], or
        videos [rows, frames, 3, height, width]; at most `max_batch` rows at once.

        Args:
            frames: keep only so many of a video's, evenly spaced: whole ones fill the memory.
        """
        images = []
        for part in torch.split(latents, max_batch):
            decoded = self.decode_latents(part.to(self.device))
            if decoded.dim() == 5 and frames is not None:
                decoded = decoded[:, evenly_spaced(decoded.shape[1], frames)]
            images.append((decoded.float() / 2 + 0.5).clamp(0, 1))
        return torch.cat(images)

    # --- training ---

    def check_lora_targets(self, targets: Sequence[str]) -> None:
        """Refuse names that no layer has, before weights are read.

        Raises:
            ModelError: names the target and layers like it.
        """
        layers = [
            name
            for name, module in self.skeleton().named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d)
        ]
        # Blocks are alike: their names without numbers, each once.
        kinds = list(dict.fromkeys(re.sub(r"^.*\.\d+\.(?=[a-z])", "", name) for name in layers))
        for target in targets:
            if not any(name == target or name.endswith(f".{target}") for name in layers):
                near = difflib.get_close_matches(target, kinds, n=3, cutoff=0.3) or kinds[:5]
                raise ModelError(
                    f"model.lora_targets: got {target!r}, which no linear or convolutional layer "
                    f"of the {self.network_name} is named; there are {', '.join(near)}, ..."
                )

    def add_lora(self, rank: int, alpha: float, targets: Sequence[str] | None) -> None:
        """Freeze the network and put trainable float32 LoRA weights on it."""
        from peft import LoraConfig

        network: Any = self.network
        network.requires_grad_(False)
        adapter = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            init_lora_weights="gaussian",
            target_modules=list(targets or self.lora_targets),
        )
        try:
            network.add_adapter(adapter)
        except ValueError as error:
            raise ModelError(
                f"model.lora_targets: got {list(targets or self.lora_targets)} with lora_rank "
                f"{rank}, on which no adapter can be put: {error}"
            ) from error
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self._uses_lora = True

    def configure(
        self,
        *,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        attention_backend: str | None = None,
        vae_tiling: bool = False,
    ) -> None:
        """Switch on what diffusers offers; none of it changes what is computed, but for rounding
        and, at the seams of large images, tiling."""
        network: Any = self.network
        if gradient_checkpointing:
            network.enable_gradient_checkpointing()
        if attention_backend is not None:
            processors = [getattr(module, "processor", None) for module in network.modules()]
            if not any(hasattr(processor, "_attention_backend") for processor in processors):
                raise ModelError(
                    f"model.attention_backend: got {attention_backend!r}; the {self.network_name} "
                    f"of {self.pipeline_name} has no choice, so it must be null"
                )
            network.set_attention_backend(attention_backend)
        if compile:
            if getattr(network, "_repeated_blocks", None):
                network.compile_repeated_blocks()
            else:
                network.compile()
        if vae_tiling:
            self.vae.enable_tiling()

    # --- export ---

    def export_bytes(self) -> int:
        """About what `save` writes."""
        if self._uses_lora:
            return sum(
                p.numel() * p.element_size() for p in self.network.parameters() if p.requires_grad
            )
        copied = sum(path.stat().st_size for path in self._copied_files())
        return copied + sum(p.numel() * p.element_size() for p in self.network.parameters())

    def save(self, folder: Path, base_model: str) -> None:
        """Write what diffusers loads: the whole pipeline, or the LoRA weights alone, which belong
        to `base_model`."""
        network: Any = self.network
        folder.mkdir(parents=True, exist_ok=True)
        if self._uses_lora:
            from peft.utils import get_peft_model_state_dict

            config = network.peft_config["default"]
            # A loader takes an alpha that it is not told to be the rank, so the scale must be in
            # the weights.
            state = {
                name: weight * (config.lora_alpha / config.r) if ".lora_B." in name else weight
                for name, weight in get_peft_model_state_dict(network).items()
            }
            layers = {f"{self.network_name}_lora_layers": state}
            self._pipeline_class.save_lora_weights(folder, **layers)
        else:
            # Only the network was trained: everything else is the checkpoint's own files.
            for path in self._copied_files():
                copy = folder / path.relative_to(self.folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
            network.save_pretrained(folder / self.network_name, safe_serialization=True)
        sampling = replace(self.sampling, base_model=base_model if self._uses_lora else None)
        text = json.dumps(asdict(sampling), indent=2)
        (folder / SAMPLING_FILE).write_text(text + "\n", encoding="utf-8")

    def _copied_files(self) -> list[Path]:
        parts = [name for name, value in self.index.items() if isinstance(value, list)]
        files = [self.folder / INDEX_FILE]
        for part in sorted(set(parts) - {self.network_name}):
            files += sorted(p for p in (self.folder / part).rglob("*") if p.is_file())
        return files


def flow_levels(
    scheduler: Any, steps: int, sigmas: Sequence[float] | None = None, **settings: Any
) -> tuple[Schedule, list[float]]:
    """A rectified flow's schedule and timesteps, as the scheduler sets them.

    Args:
        sigmas: the levels before the scheduler's own shift; None: its own spacing.
        settings: more for `set_timesteps`, such as `mu`.
    """
    # FlowMatchEuler schedulers have no such key; others can be a flow's or not.
    if not scheduler.config.get("use_flow_sigmas", True):
        raise ModelError(
            "model.path: the scheduler's use_flow_sigmas is false; must be a flow's scheduler"
        )
    if sigmas is None:
        scheduler.set_timesteps(steps, **settings)
    else:
        scheduler.set_timesteps(sigmas=list(sigmas), **settings)
    return flow_schedule(scheduler.sigmas.tolist()), scheduler.timesteps.tolist()


def _stack(rows: Sequence[Tensor]) -> Tensor:
    """[rows, ...]; where the rows' first dimensions differ, padded with zeros to the longest."""
    if all(row.shape == rows[0].shape for row in rows):
        return torch.stack(list(rows))
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def open_policy(
    path: str,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    cache: Path | None = None,
    weights: bool = True,
    **overrides: Any,
) -> Policy:
    """Find a checkpoint and check it without reading weights; `load` then reads them.

    Args:
        path: "miniature", a diffusers folder, a folder of LoRA weights or a hub name.
        dtype: what the network computes in.
        cache: see `Policy`.
        weights: whether they must be there; otherwise a hub's checkpoint is not downloaded but for
            its configurations.
        overrides: fields of `Sampling` that replace the checkpoint's own; None keeps them.

    Raises:
        ModelError: the folder is missing or incomplete, its pipeline class is not supported, or a
            setting is not allowed.
    """
    quiet_libraries()
    folder = Path(resolve(path))
    stored = read_json(folder / SAMPLING_FILE) if (folder / SAMPLING_FILE).is_file() else {}
    unknown = sorted(set(stored) - {field.name for field in fields(Sampling)})
    if unknown:
        raise ModelError(f"model.path: {folder / SAMPLING_FILE} has an unknown key {unknown[0]!r}")
    changes = {name: value for name, value in overrides.items() if value is not None}
    has_lora = (folder / LORA_FILE).is_file()
    base = resolve(stored.get("base_model") or path) if has_lora else str(folder)
    source = _local_folder(base, weights)
    check_folder(source, weights=weights)
    index = read_json(source / INDEX_FILE)
    module, _, name = FAMILIES[check_family(str(source), index)].partition(":")
    family: type[Policy] = getattr(importlib.import_module(module), name)
    try:
        defaults = family.default_sampling(component_configs(source, index))
        sampling = Sampling(**{**asdict(defaults), **stored, **changes})
        policy = family(source, index, sampling, device=device, dtype=dtype, cache=cache)
    except ModelError:
        raise
    except (OSError, KeyError, AttributeError, ImportError, TypeError, ValueError) as error:
        raise ModelError(
            f"model.path: cannot use {source}: {type(error).__name__}: {error}"
        ) from error
    if has_lora:
        policy._lora_folder = folder
    return policy


def load_policy(
    path: str,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    cache: Path | None = None,
    **overrides: Any,
) -> Policy:
    """`open_policy` with its weights read, for sampling.

    Raises:
        ModelError: as `open_policy`, or the weights cannot be read.
    """
    policy = open_policy(path, device=device, dtype=dtype, cache=cache, **overrides)
    load_weights(policy)
    return policy


def load_weights(policy: Policy, *, master_weights: bool = False) -> None:
    """`policy.load`, with the libraries' errors told as ours (ModelError)."""
    try:
        policy.load(master_weights=master_weights)
    except ModelError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, AttributeError) as error:
        raise ModelError(f"model.path: cannot load {str(policy.folder)!r}: {error}") from error


def check_attention_backend(name: str) -> None:
    """Refuse an attention backend that diffusers does not know or that cannot run here.

    Raises:
        ModelError: names what is allowed, or what is missing.
    """
    from diffusers.models import attention_dispatch

    names = [backend.value for backend in attention_dispatch.AttentionBackendName]
    if name not in names:
        raise ModelError(
            f"model.attention_backend: got {name!r}; must be one of {', '.join(names)}"
        )
    try:
        attention_dispatch._check_attention_backend_requirements(
            attention_dispatch.AttentionBackendName(name)
        )
    except RuntimeError as error:
        raise ModelError(f"model.attention_backend: got {name!r}: {error}") from error


def _local_folder(source: str, weights: bool) -> Path:
    """The checkpoint on this machine, downloaded if it is a hub name."""
    if Path(source).is_dir():
        return Path(source)
    from diffusers import DiffusionPipeline
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        check_family(source, read_json(Path(hf_hub_download(source, INDEX_FILE))))
        if weights:
            return Path(DiffusionPipeline.download(source))
        return Path(snapshot_download(source, allow_patterns=_CONFIG_FILES))
    except ModelError:
        raise
    except Exception as error:  # the hub's client, its transports and the disk have many
        raise ModelError(
            f"model.path: {source!r} is no local folder and cannot be downloaded from the hub "
            f"({reason(error)}); fetch it where there is a connection with `hf download {source} "
            "--local-dir FOLDER` (after `hf auth login` where the model asks for consent) and name "
            "that folder"
        ) from error


def quiet_libraries() -> None:
    """Keep diffusers and transformers from mixing progress bars and advice into our own display."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()

"""A model against rewards on held-out prompts: deterministic sampling from fixed noises."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from treegrpo.config import ModelConfig
from treegrpo.device import default_device
from treegrpo.errors import UserError
from treegrpo.images import as_pictures, middle_frames
from treegrpo.models.folder import ModelError
from treegrpo.models.opening import load_weights, open_policy
from treegrpo.models.policy import Policy
from treegrpo.plan import RolloutPlan
from treegrpo.prompts import Prompt
from treegrpo.rewards import Reward, RewardError, closing, load_reward, score
from treegrpo.rollout import rollout
from treegrpo.transition import transitions
from treegrpo.versions import versions

if TYPE_CHECKING:
    from treegrpo.report.comparison import Comparison, Pictures

FRAMES = 4
"""Of a video, that a reward is asked about."""

# A decoder takes gigabytes per million pixels; more of them at once are hardly faster.
_SECONDS_PER_WRITE = 5.0  # of the JSON, whose scores grow with every batch
_DECODED_PIXELS = 2**21


@dataclass(frozen=True)
class Evaluation:
    """Scores of one model.

    Attributes:
        prompts: P prompts.
        scores: reward name to float32 [P, images per prompt].
        kept: indices of the prompts whose images were kept, in the list of all prompts.
        images: float32 [kept, images per prompt, 3, height, width]; a video's middle frame.
        seconds: wall time.
    """

    prompts: tuple[str, ...]
    scores: dict[str, Tensor]
    kept: tuple[int, ...]
    images: Tensor
    seconds: float

    def mean(self, name: str) -> float:
        return self.scores[name].mean().item()

    def standard_error(self, name: str) -> float:
        """Of the mean over prompts (images of one prompt are not independent)."""
        means = self.scores[name].mean(1)
        return float(means.std(correction=min(1, len(means) - 1)) / len(means) ** 0.5)

    @staticmethod
    def join(parts: Sequence[Evaluation]) -> Evaluation:
        """Of all prompts, from evaluations of consecutive shares of them, made at the same time."""
        return Evaluation(
            tuple(prompt for part in parts for prompt in part.prompts),
            {name: torch.cat([part.scores[name] for part in parts]) for name in parts[0].scores},
            tuple(index for part in parts for index in part.kept),
            torch.cat([part.images for part in parts]),
            max(part.seconds for part in parts),
        )


def sample(
    policy: Policy,
    prompts: Sequence[str],
    *,
    images_per_prompt: int,
    steps: int,
    generator: torch.Generator,
    max_batch: int,
    decode_batch: int | None = None,
    frames: int | None = None,
) -> Tensor:
    """Deterministic samples: float32 [prompts, images_per_prompt, 3, height, width] in [0, 1], or
    videos [prompts, videos_per_prompt, frames, 3, height, width]."""
    plan = RolloutPlan(images_per_prompt, (1,) * steps, (False,) * steps)
    schedule = policy.schedule(steps)
    noise = _draw_noise(policy, len(prompts), images_per_prompt, generator)
    forest = rollout(
        policy.predictor(policy.encode(prompts), steps),
        noise,
        plan,
        schedule,
        transitions(schedule, plan.stochastic),
        max_batch=max_batch,
    )
    leaves = forest.leaves.flatten(0, 1)
    images = policy.decode(leaves, decode_batch or max_batch, frames)
    return images.view(len(prompts), images_per_prompt, *images.shape[1:])


def _draw_noise(
    policy: Policy, prompts: int, images_per_prompt: int, generator: torch.Generator
) -> Tensor:
    """[prompts, images_per_prompt, *latent_shape], drawn prompt by prompt, so that it does not
    depend on batches."""
    return torch.stack([policy.noise(images_per_prompt, generator) for _ in range(prompts)])


def sample_in_parts(
    policy: Policy,
    prompts: Sequence[Prompt],
    *,
    images_per_prompt: int,
    steps: int,
    seed: int,
    max_batch: int,
    decode_batch: int | None = None,
    share: range | None = None,
) -> Iterator[tuple[range, Tensor]]:
    """`sample` as many prompts at a time as `max_batch` allows: their indices, and their images.

    The noises depend on the seed, the prompts and `images_per_prompt`, not on the model.

    Args:
        share: the consecutive prompts that are sampled; None: all.
    """
    generator = torch.Generator(policy.device).manual_seed(seed)
    share = range(len(prompts)) if share is None else share
    for _ in range(share.start):
        _draw_noise(policy, 1, images_per_prompt, generator)  # the other prompts'
    count = max(1, max_batch // images_per_prompt)
    for start in range(share.start, share.stop, count):
        indices = range(start, min(start + count, share.stop))
        images = sample(
            policy,
            [prompts[index].text for index in indices],
            images_per_prompt=images_per_prompt,
            steps=steps,
            generator=generator,
            max_batch=max_batch,
            decode_batch=decode_batch,
        )
        yield indices, images


def score_images(
    name: str,
    reward: Reward,
    images: Tensor,
    prompts: Sequence[Prompt],
    keep_folder: Path | None,
    frames: int = FRAMES,
) -> Tensor:
    """A reward's scores of what `sample` gives: float32 [prompts, images_per_prompt].

    Raises:
        RewardError: it failed; its images are left in `keep_folder`.
    """
    count = images.shape[1]
    texts = [prompt.text for prompt in prompts for _ in range(count)]
    metadata = [dict(prompt.metadata) for prompt in prompts for _ in range(count)]
    pictures = as_pictures(images.flatten(0, 1))
    values = score(name, reward, pictures, texts, metadata, keep_folder, frames)
    return values.view(len(prompts), count)


def evaluate(
    policy: Policy,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, Reward],
    *,
    images_per_prompt: int,
    steps: int,
    seed: int,
    max_batch: int,
    decode_batch: int | None = None,
    keep: Sequence[int] = (),
    keep_folder: Path | None = None,
    frames: Mapping[str, int] | None = None,
    share: range | None = None,
) -> Evaluation:
    """Score a model on prompts; the same seed gives every model the same noises.

    Args:
        keep: indices of prompts whose images are kept.
        keep_folder: where a failing reward leaves its images.
        frames: by reward, how many of a video's it is asked about; `FRAMES` if not given.
        share: evaluate only these consecutive prompts, as a part for `Evaluation.join`.

    Raises:
        RewardError: a reward failed.
    """
    start = time.perf_counter()
    share = range(len(prompts)) if share is None else share
    # Of no prompts at first: a process's share may be empty.
    scores = {name: [torch.empty(0, images_per_prompt)] for name in rewards}
    kept = [torch.empty(0, images_per_prompt, 3, *policy.sampling.size)]
    for indices, images in sample_in_parts(
        policy,
        prompts,
        images_per_prompt=images_per_prompt,
        steps=steps,
        seed=seed,
        max_batch=max_batch,
        decode_batch=decode_batch,
        share=share,
    ):
        part = [prompts[index] for index in indices]
        for name, reward in rewards.items():
            count = (frames or {}).get(name, FRAMES)
            values = score_images(name, reward, images, part, keep_folder, count)
            scores[name].append(values.cpu())
        wanted = [index - indices.start for index in sorted(keep) if index in indices]
        kept.append(middle_frames(images[wanted]).cpu())
    return Evaluation(
        tuple(prompts[index].text for index in share),
        {name: torch.cat(parts) for name, parts in scores.items()},
        tuple(index for index in sorted(keep) if index in share),
        torch.cat(kept),
        time.perf_counter() - start,
    )


def _decode_batch(policy: Policy) -> int:
    height, width = policy.sampling.size
    return max(1, _DECODED_PIXELS // (height * width * (policy.sampling.frames or 1)))


def sample_grid(
    model: str,
    prompts: Sequence[str],
    *,
    count: int,
    seed: int,
    steps: int | None,
    guidance_scale: float | None,
    dtype: Literal["float32", "bfloat16"],
    out: Path,
) -> None:
    """`treegrpo sample`: a picture of `count` samples per prompt."""
    from treegrpo.report.pictures import image_grid

    section = ModelConfig(path=model, dtype=dtype, guidance_scale=guidance_scale)
    policy = open_policy(section, device=default_device(), steps=steps)
    policy.prepare(prompts)
    load_weights(policy, section, train=False)
    images = sample(
        policy,
        prompts,
        images_per_prompt=count,
        steps=policy.sampling.steps,
        generator=torch.Generator(policy.device).manual_seed(seed),
        max_batch=16,
        decode_batch=_decode_batch(policy),
    )
    image_grid(out, prompts, middle_frames(images).cpu())
    print(f"wrote {out}")


def evaluate_command(
    model: str,
    *,
    base: str | None,
    prompts: Sequence[Prompt],
    source: str,
    rewards: Mapping[str, Mapping[str, Any]],
    seeds: int,
    images_per_prompt: int,
    steps: int | None,
    guidance_scale: float | None,
    max_batch: int,
    dtype: Literal["float32", "bfloat16"],
    json_file: Path | None,
    page: Path | None,
) -> Comparison:
    """`treegrpo evaluate`: score a model and its base on the same noises, and report.

    Args:
        base: what the model is compared with; None: it is scored alone.
        source: where the prompts come from; for the report.
        rewards: names and their options.
        seeds: of the noises: 0 up to this.
        json_file: written anew every few seconds and at the end, however it comes.
        page: the HTML file.

    Raises:
        UserError: something that cannot be used; nothing was sampled.
        RewardError: a reward failed. The others were finished and reported.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from treegrpo.checkpoint import FAILED_REWARD_FOLDER
    from treegrpo.console import plain_console
    from treegrpo.report import comparison as report

    section = ModelConfig(path=model, dtype=dtype, guidance_scale=guidance_scale)
    policies = _open(section, base, steps)
    loaded = {name: load_reward(name, options) for name, options in rewards.items()}
    check_prompts(loaded, prompts)
    comparison = report.Comparison.empty(
        model,
        base,
        [prompt.text for prompt in prompts],
        list(rewards),
        seeds * images_per_prompt,
        {
            "source": source,
            "seeds": seeds,
            "images_per_prompt": images_per_prompt,
            "max_batch": max_batch,
            **_sampling(policies[-1]),
            "dtype": dtype,
            "reward_options": {name: dict(of) for name, of in rewards.items() if of},
            "versions": versions(),
        },
    )
    shown = [] if page is None else report.pictured(len(prompts))
    pictures: Pictures = {index: {role: [] for role in comparison.roles} for index in shown}
    folder = next((path.parent for path in (json_file, page) if path is not None), None)
    keep_folder = None if folder is None else folder / FAILED_REWARD_FOLDER

    console = plain_console()
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    failures = 0
    for role in comparison.roles:
        console.print(f"sampling {base if role == report.BASE else model}")
        with (
            closing(loaded),
            _writing(json_file, comparison) as write_now_and_then,
            Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        ):
            task = progress.add_task(role, total=len(prompts) * seeds * images_per_prompt)
            # Popped, so that nothing keeps the first model in memory.
            for indices, noises, images in _score_in_parts(
                comparison, role, section, policies.pop(0), prompts, loaded, keep_folder
            ):
                write_now_and_then()
                if comparison.failures.keys() == rewards.keys():
                    raise RewardError("; ".join(comparison.failures.values()))
                for message in list(comparison.failures.values())[failures:]:
                    console.print(f"error: {message}; going on without it")
                failures = len(comparison.failures)
                wanted = max(0, report.PICTURED_PAIRS - noises.start)
                for index, row in zip(indices, middle_frames(images), strict=True):
                    if index in pictures:
                        pictures[index][role] += [report.thumbnail(one) for one in row[:wanted]]
                progress.advance(task, len(indices) * len(noises))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    console.print(report.table(comparison))
    if json_file is not None:
        console.print(f"wrote {json_file}")
    if page is not None:
        page.parent.mkdir(exist_ok=True)
        report.write_page(page, comparison, pictures)
        console.print(f"wrote {page}")
    if comparison.failures:
        raise RewardError("; ".join(comparison.failures.values()))
    return comparison


@contextmanager
def _writing(json_file: Path | None, comparison: Comparison) -> Iterator[Callable[[], None]]:
    """Yields what writes the file, if it was not written lately; whatever ends the work, all that
    was scored is left in it."""
    from treegrpo.checkpoint import write_atomically
    from treegrpo.report.comparison import to_json

    written = time.monotonic()

    def write(pause: float = _SECONDS_PER_WRITE) -> None:
        nonlocal written
        if json_file is not None and time.monotonic() - written >= pause:
            write_atomically(json_file, to_json(comparison))
            written = time.monotonic()

    try:
        yield write
    finally:
        write(pause=0)


def check_prompts(rewards: Mapping[str, Reward], prompts: Sequence[Prompt]) -> None:
    """Let each reward refuse prompts that it cannot score.

    Raises:
        UserError: names the reward and the prompt.
    """
    texts = [prompt.text for prompt in prompts]
    metadata = [dict(prompt.metadata) for prompt in prompts]
    for name, reward in rewards.items():
        check = getattr(reward, "check", None)
        if check is not None:
            try:
                check(texts, metadata)
            except UserError as error:
                raise UserError(f"reward {name!r}: {error}") from error
            except Exception as error:
                raise UserError(
                    f"reward {name!r}: its check of the prompts raised {type(error).__name__}: "
                    f"{error}"
                ) from error


def _open(model: ModelConfig, base: str | None, steps: int | None) -> list[Policy]:
    """The base, if any, and the model, without weights, both sampled as the model is."""
    device = default_device()
    trained = open_policy(model, device=device, steps=steps)
    if base is None:
        return [trained]
    sampling = asdict(trained.sampling)
    steps = sampling.pop("steps")
    sampling.pop("base_model")
    alone = ModelConfig(path=base, dtype=model.dtype)
    try:
        # What is not of the same family has other settings, which would be refused first.
        family = open_policy(alone, device=device).pipeline_name
        if family != trained.pipeline_name:
            raise ModelError(
                f"{base} is a {family}, {model.path} a {trained.pipeline_name}; they cannot be "
                "compared"
            )
        policy = open_policy(alone.model_copy(update=sampling), device=device, steps=steps)
    except ModelError as error:
        raise ModelError(f"--base: {str(error).removeprefix('model.path: ')}") from error
    if policy.latent_shape != trained.latent_shape:
        raise ModelError(
            f"--base: {base} starts from noise of shape {list(policy.latent_shape)}, {model.path} "
            f"from {list(trained.latent_shape)}; they cannot be compared"
        )
    return [policy, trained]


def _score_in_parts(
    comparison: Comparison,
    role: str,
    model: ModelConfig,
    policy: Policy,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, Reward],
    keep_folder: Path | None,
) -> Iterator[tuple[range, range, Tensor]]:
    """Load a policy and score it into `comparison`: after every batch its prompts, its noises and
    its images.

    A reward that fails is noted and not asked again.
    """
    settings = comparison.settings
    count: int = settings["images_per_prompt"]
    policy.prepare(comparison.prompts)
    load_weights(policy, model, train=False)
    for seed in range(settings["seeds"]):
        noises = range(seed * count, (seed + 1) * count)
        for indices, images in sample_in_parts(
            policy,
            prompts,
            images_per_prompt=count,
            steps=policy.sampling.steps,
            seed=seed,
            max_batch=settings["max_batch"],
            decode_batch=_decode_batch(policy),
        ):
            part = [prompts[index] for index in indices]
            place = slice(indices.start, indices.stop), slice(noises.start, noises.stop)
            for name, reward in rewards.items():
                if name in comparison.failures:
                    continue
                try:
                    scores = score_images(name, reward, images, part, keep_folder)
                except RewardError as error:
                    comparison.failures[name] = str(error)
                else:
                    comparison.scores[name][role][place] = scores.double().cpu()
            yield indices, noises, images


def _sampling(policy: Policy) -> dict[str, Any]:
    """How and where images are made; for the report."""
    values = asdict(policy.sampling)
    del values["base_model"]
    device = policy.device
    return {
        "pipeline": policy.pipeline_name,
        "sampling": {name: value for name, value in values.items() if value is not None},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }

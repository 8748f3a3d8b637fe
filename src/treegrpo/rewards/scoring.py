"""Asking a reward without trusting it.

Left out: naming and making rewards (`registry.py`), what becomes of scores (`advantage.py`).
"""

from __future__ import annotations

import copy
import inspect
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treegrpo.errors import UserError, own_traceback
from treegrpo.images import evenly_spaced, to_uint8
from treegrpo.rewards.registry import Metadata, Reward
from treegrpo.rewards.state import kept_state, take_state

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from treegrpo.prompts import Prompt


class RewardError(RuntimeError):
    """A reward failed, or returned something that is not one finite number per image."""


def check_prompts(rewards: Mapping[str, Reward], prompts: Sequence[Prompt]) -> None:
    """Let each reward refuse, with a UserError, a run's prompts that it cannot score."""
    texts = [prompt.text for prompt in prompts]
    metadata = [dict(prompt.metadata) for prompt in prompts]
    for name, reward in rewards.items():
        check = getattr(reward, "check", None)
        if check is None:
            continue
        try:
            check(texts, metadata)
        except UserError as error:
            raise UserError(f"reward {name!r}: {error}") from error
        except Exception as error:
            raise UserError(
                f"reward {name!r}: its check of the prompts raised {type(error).__name__}: {error}"
                f"{own_traceback(error)}"
            ) from error


TRIAL_PICTURES = 2  # with one, a reward that drops the dimension of the batch would pass


def try_reward(
    name: str,
    reward: Reward,
    prompt: Prompt,
    size: tuple[int, int] | None,
    device: torch.device | str,
) -> None:
    """Ask a reward about gray pictures, so that a fault in it shows before any are drawn.

    What it remembers of them, it is made to forget where it has a state (`state.py`).

    Args:
        prompt: that they are said to be of.
        size: height and width of the pictures; None: any.
        device: where they are.

    Raises:
        UserError: it raised or gave no finite number per picture, or its state cannot be kept.
    """
    import torch

    images = torch.full((TRIAL_PICTURES, 3, *(size or (512, 512))), 127 / 255, device=device)
    metadata = [dict(prompt.metadata) for _ in range(TRIAL_PICTURES)]
    try:
        state = kept_state(name, reward)
        score(name, reward, images, [prompt.text] * TRIAL_PICTURES, metadata, None)
        kept_state(name, reward)
        take_state(name, reward, state)
    except RewardError as error:
        told = str(error).replace("; the batch's images were not kept", "")
        whose = f"reward {name!r}"
        tried = f"{whose}, tried on {TRIAL_PICTURES} gray pictures,"
        raise UserError(told.replace(whose, tried, 1)) from error


@contextmanager
def closing(rewards: Mapping[str, Reward]) -> Iterator[None]:
    """On a failure, let rewards give up what they are waiting for."""
    try:
        yield
    except BaseException:
        for reward in rewards.values():
            with suppress(Exception):  # the failure itself must be told
                getattr(reward, "close", lambda: None)()
        raise


def score(
    name: str,
    reward: Reward,
    images: Tensor,
    prompts: list[str],
    metadata: Metadata,
    keep_folder: Path | None,
    frames: int = 1,
) -> Tensor:
    """Ask a reward and check its answer: float32 [N] on the images' device.

    Args:
        name: the reward's name in error messages.
        images: from `as_pictures`, [N, 3, H, W], or videos [N, all frames, 3, H, W].
        keep_folder: where the images and prompts of a failed batch are saved, if anywhere.
        frames: of a video, evenly spaced, each scored as an image; their mean is its score.

    Raises:
        RewardError: the reward raised or gave no N finite numbers; it says where the images are.
    """
    import torch

    if images.dim() == 5:
        chosen = evenly_spaced(images.shape[1], frames)
        repeated = [prompt for prompt in prompts for _ in chosen]
        each = None if metadata is None else [one for one in metadata for _ in chosen]
        flat = images[:, chosen].flatten(0, 1)
        values = score(name, reward, flat, repeated, each, keep_folder)
        return values.view(len(images), len(chosen)).mean(1)

    def failure(problem: str) -> RewardError:
        kept = _keep(name, images, prompts, keep_folder) if keep_folder else "were not kept"
        return RewardError(f"reward {name!r} {problem}; the batch's images {kept}")

    of_prompts = f"for {len(prompts)} prompts, of which the first is {prompts[:1]}"
    given, is_ours = images, _is_ours(reward)
    if not is_ours:
        # Whatever it writes into what it is given is its own: other rewards get the same.
        given, metadata = images.clone(), copy.deepcopy(metadata)
    try:
        with torch.no_grad():
            answer = reward(given, list(prompts), metadata)
    except Exception as error:
        told = failure(f"raised {type(error).__name__} {of_prompts}: {error}")
        where = "" if is_ours or isinstance(error, UserError) else own_traceback(error)
        raise RewardError(f"{told}{where}") from error
    try:
        scores = _as_tensor(answer)
    except Exception as error:
        raise failure(
            f"returned {type(answer).__name__} {_shortened(answer)} {of_prompts}; expected "
            f"{len(images)} numbers ({type(error).__name__}: {error})"
        ) from error
    if scores.shape != (len(images),) or scores.is_complex():
        raise failure(
            f"returned {str(scores.dtype).removeprefix('torch.')} of shape {list(scores.shape)} "
            f"{of_prompts}; expected real numbers of shape [{len(images)}]"
        )
    scores = scores.float().to(images.device)
    faults = (~scores.isfinite()).nonzero().flatten().tolist()
    if faults:
        raise failure(
            f"returned {scores[faults[0]].item()} for the prompt {prompts[faults[0]]!r} "
            f"(image {faults[0]} of {len(images)}; {len(faults)} of the values are not finite)"
        )
    return scores


def _is_ours(reward: Reward) -> bool:
    kind = reward if inspect.isfunction(reward) else type(reward)
    return kind.__module__.startswith("treegrpo.")


def _as_tensor(answer: Any) -> Tensor:
    """A reward's answer, copied: its own buffer may hold the next answer soon."""
    import numpy as np
    import torch

    try:
        scores = torch.as_tensor(answer)
    except (TypeError, ValueError):
        if not hasattr(answer, "__array__"):
            raise
        # An array with a negative stride or a foreign byte order, or of objects; a table's column.
        scores = torch.from_numpy(np.array(answer, dtype=np.float64))
    return scores.detach().clone()


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _keep(name: str, images: Tensor, prompts: list[str], folder: Path) -> str:
    """Save a failed batch and say where; a full disk must not hide the reward's own failure."""
    import numpy as np

    pixels = to_uint8(images)
    stem = re.sub(r"[^\w.-]", "_", name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number in itertools.count():
            path = folder / f"{stem}-{number}.npz"
            with suppress(FileExistsError), path.open("xb") as file:
                np.savez_compressed(file, images=pixels.cpu().numpy(), prompts=prompts)
                break
    except OSError as error:
        return f"could not be saved ({error})"
    return f"and prompts are in {path}"

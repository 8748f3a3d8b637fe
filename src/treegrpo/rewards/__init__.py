"""Rewards: what one is, how to name one, and how to ask it without trusting it.

A reward is any function `(images, prompts, metadata) -> N numbers`. Adding one needs no code here:
name it `module:function`. This file imports neither torch nor a reward model until one is used.
"""

from __future__ import annotations

import difflib
import importlib
import itertools
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from treegrpo.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

BUILT_IN = {
    "composition": "treegrpo.rewards.composition:composition",
    "composition_accuracy": "treegrpo.rewards.composition:composition_accuracy",
    "jpeg_compressibility": "treegrpo.rewards.jpeg:jpeg_compressibility",
    "jpeg_incompressibility": "treegrpo.rewards.jpeg:jpeg_incompressibility",
}


class RewardError(RuntimeError):
    """A reward failed, or returned something that is not one finite number per image."""


class Reward(Protocol):
    """Scores images: higher is better, on any scale.

    Images are a tensor [N, 3, H, W], float in [0, 1]; `metadata` has one dict per prompt, or is
    None. The N scores may come back as a tensor, a NumPy array or a list. Where a reward wants
    NumPy images, `numpy.asarray(images.cpu())` makes them.
    """

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None, /
    ) -> Tensor | NDArray[Any] | list[float]: ...


def load_reward(name: str) -> Reward:
    """Find a reward by its built-in name or as `module:function`.

    The module may be installed or lie in the current directory.

    Raises:
        UserError: no such built-in, module or function, or the module fails to import.
    """
    target = BUILT_IN.get(name, name)
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        raise UserError(
            f"reward {name!r} is unknown{f' (did you mean {near[0]!r}?)' if near else ''}; "
            f"built in are {', '.join(BUILT_IN)}; your own is written as 'module:function'"
        )
    # A console script does not search the current directory. Last, so that it hides no package.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(
            f"reward {name!r}: the module {module_name!r} cannot be imported "
            f"({type(error).__name__}: {error}); looked in the current directory, {os.getcwd()}, "
            "and the installed packages"
        ) from error
    reward = getattr(module, attribute, None)
    if not callable(reward):
        raise UserError(
            f"reward {name!r}: the module {module_name!r} ({module.__file__}) has no function "
            f"{attribute!r}"
        )
    return cast(Reward, reward)


def score(
    name: str,
    reward: Reward,
    images: Tensor,
    prompts: list[str],
    metadata: list[dict[str, Any]] | None,
    keep_folder: Path | None,
) -> Tensor:
    """Ask a reward and check its answer: float32 [N] on the images' device.

    Args:
        name: the reward's name in error messages.
        reward: the reward.
        images: float [N, 3, H, W] in [0, 1].
        prompts: one per image.
        metadata: one dict per image, or None.
        keep_folder: where the images and prompts of a failed batch are saved, if anywhere.

    Raises:
        RewardError: the reward raised, or did not return N finite numbers. The message names the
            reward, the prompt and the value, and where the images are.
    """
    import torch

    def failure(problem: str) -> RewardError:
        kept = _keep(name, images, prompts, keep_folder) if keep_folder else "were not kept"
        return RewardError(f"reward {name!r} {problem}; the batch's images {kept}")

    of_prompts = f"for {len(prompts)} prompts, of which the first is {prompts[:1]}"
    try:
        answer = reward(images, prompts, metadata)
    except Exception as error:
        raise failure(f"raised {type(error).__name__} {of_prompts}: {error}") from error
    try:
        scores = torch.as_tensor(answer).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise failure(
            f"returned {type(answer).__name__} {_shortened(answer)} {of_prompts}; expected "
            f"{len(images)} numbers"
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


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _keep(name: str, images: Tensor, prompts: list[str], folder: Path) -> str:
    """Save a failed batch and say where; a full disk must not hide the reward's own failure."""
    import numpy as np

    pixels = (images.detach().float().nan_to_num() * 255).round().clamp(0, 255).byte()
    stem = re.sub(r"[^\w.-]", "_", name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number in itertools.count():
            path = folder / f"{stem}-{number}.npz"
            try:
                with path.open("xb") as file:
                    np.savez_compressed(file, images=pixels.cpu().numpy(), prompts=prompts)
                break
            except FileExistsError:
                continue
    except OSError as error:
        return f"could not be saved ({error})"
    return f"and prompts are in {path}"

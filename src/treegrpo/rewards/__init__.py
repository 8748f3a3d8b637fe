"""Rewards: what one is, how to name one, and how to ask it without trusting it.

A reward is anything that is called as `(images, prompts, metadata) -> N numbers`. Adding one needs
no code here: name it `module:function`, or `module:Class` where it has options and a state. This
file imports neither torch nor a reward model until one is used.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
import itertools
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from treegrpo.errors import UserError
from treegrpo.images import evenly_spaced, to_uint8

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

# A function is the reward; a class is constructed with the configuration's options.
BUILT_IN = {
    "aesthetic": "treegrpo.rewards.aesthetic:Aesthetic",
    "clip_score": "treegrpo.rewards.clip_score:CLIPScore",
    "composition": "treegrpo.rewards.composition:Composition",
    "composition_accuracy": "treegrpo.rewards.composition:CompositionAccuracy",
    "geneval": "treegrpo.rewards.geneval:GenEval",
    "hpsv2": "treegrpo.rewards.hpsv2:HPSv2",
    "image_reward": "treegrpo.rewards.image_reward:ImageReward",
    "jpeg_compressibility": "treegrpo.rewards.jpeg:jpeg_compressibility",
    "jpeg_incompressibility": "treegrpo.rewards.jpeg:jpeg_incompressibility",
    "ocr": "treegrpo.rewards.ocr:OCR",
    "pickscore": "treegrpo.rewards.pickscore:PickScore",
    "vlm_judge": "treegrpo.rewards.vlm_judge:VLMJudge",
}
REMOTE = "treegrpo.rewards.remote:Remote"  # any http:// or https:// address


class RewardError(RuntimeError):
    """A reward failed, or returned something that is not one finite number per image."""


class Reward(Protocol):
    """Scores images: higher is better, on any scale.

    Images are a tensor [N, 3, H, W], float in [0, 1]; `metadata` has one dict per prompt, or is
    None. The N scores may come back as a tensor, a NumPy array or a list. Where a reward wants
    NumPy images, `numpy.asarray(images.cpu())` makes them.

    A reward may have, beside being callable,
    - `check(prompts, metadata)`, called before a run with all its prompts; raises UserError for a
      prompt that the reward cannot score;
    - `concurrent = True`: it may be called from a thread while the next images are being made;
    - `close()`: called when a run fails, so that calls under way in threads end soon.
    """

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None, /
    ) -> Tensor | NDArray[Any] | list[float]: ...


def load_reward(name: str, options: Mapping[str, Any] | None = None) -> Reward:
    """Make a reward.

    Args:
        name: built in, `module:function`, `module:Class` (the module may be installed or lie in
            the current directory), or the http:// or https:// address of a reward server.
        options: keyword arguments of the class.

    Raises:
        UserError: no such built-in, module or attribute, the module fails to import, or an option
            is unknown, missing or not allowed.
    """
    options = dict(options or {})
    target = _find(name)
    if name.startswith(("http://", "https://")):
        options = {"url": name, **options}
    _check_options(name, target, options)
    if not isinstance(target, type):
        return cast(Reward, target)
    try:
        return cast(Reward, target(**options))
    except UserError as error:
        raise UserError(f"reward {name!r}: {error}") from error
    except Exception as error:
        raise UserError(
            f"reward {name!r}: cannot be made with the options {options}: "
            f"{type(error).__name__}: {error}"
        ) from error


def check_reward(name: str, options: Mapping[str, Any] | None = None) -> None:
    """Refuse what `load_reward` would, as far as that can be said without loading anything heavy.

    Raises:
        UserError: as `load_reward`.
    """
    if name in BUILT_IN and not options:
        return  # These exist, and importing them takes seconds.
    if name.startswith(("http://", "https://")):
        options = {"url": name, **(options or {})}
    _check_options(name, _find(name), dict(options or {}))


def _find(name: str) -> Any:
    target = REMOTE if name.startswith(("http://", "https://")) else BUILT_IN.get(name, name)
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        near = _similar(name)
        raise UserError(
            f"reward {name!r} is unknown{f' (did you mean {near!r}?)' if near else ''}; "
            f"built in are {', '.join(BUILT_IN)}; your own is written as 'module:function', a "
            "server's as its http:// address"
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
    found = getattr(module, attribute, None)
    if not callable(found):
        raise UserError(
            f"reward {name!r}: the module {module_name!r} ({module.__file__}) has no function "
            f"{attribute!r}"
        )
    return found


def _similar(name: str) -> str | None:
    """The built-in reward that was probably meant."""
    plain = {re.sub(r"[\W_]", "", known): known for known in BUILT_IN}
    wanted = re.sub(r"[\W_]", "", name).lower()
    near = difflib.get_close_matches(wanted, plain, n=1)
    near = near or [one for one in plain if len(wanted) > 2 and (wanted in one or one in wanted)]
    return plain[near[0]] if near else None


def _check_options(name: str, target: Any, options: dict[str, Any]) -> None:
    if not isinstance(target, type):
        if options:
            raise UserError(f"reward {name!r}: got options {sorted(options)}; it takes none")
        return
    declared = inspect.signature(target).parameters.values()
    parameters = {p.name: p for p in declared if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in declared)
    for option in options:
        if option not in parameters and not takes_any:
            near = difflib.get_close_matches(option, parameters, n=1)
            listed = ", ".join(parameters) or "none"
            advice = f"did you mean {near[0]!r}?" if near else f"it takes {listed}"
            raise UserError(f"reward {name!r}: unknown option {option!r}; {advice}")
    for parameter in parameters.values():
        if parameter.default is inspect.Parameter.empty and parameter.name not in options:
            raise UserError(f"reward {name!r}: the option {parameter.name!r} must be given")


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
    metadata: list[dict[str, Any]] | None,
    keep_folder: Path | None,
    frames: int = 1,
) -> Tensor:
    """Ask a reward and check its answer: float32 [N] on the images' device.

    A video's score is the mean over some of its frames, each scored as an image.

    Args:
        name: the reward's name in error messages.
        reward: the reward.
        images: from `as_pictures`, [N, 3, H, W], or videos [N, all frames, 3, H, W].
        prompts: one per image.
        metadata: one dict per image, or None.
        keep_folder: where the images and prompts of a failed batch are saved, if anywhere.
        frames: of a video, evenly spaced, that are asked about.

    Raises:
        RewardError: the reward raised, or did not return N finite numbers. The message names the
            reward, the prompt and the value, and where the images are.
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
    given = images
    if not _is_ours(reward):
        # Whatever it writes into what it is given is its own: other rewards get the same.
        given, metadata = images.clone(), copy.deepcopy(metadata)
    try:
        with torch.no_grad():
            answer = reward(given, list(prompts), metadata)
    except Exception as error:
        raise failure(f"raised {type(error).__name__} {of_prompts}: {error}") from error
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
            try:
                with path.open("xb") as file:
                    np.savez_compressed(file, images=pixels.cpu().numpy(), prompts=prompts)
                break
            except FileExistsError:
                continue
    except OSError as error:
        return f"could not be saved ({error})"
    return f"and prompts are in {path}"

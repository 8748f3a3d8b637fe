"""What a reward is, and how to name one.

A reward is anything that is called as `(images, prompts, metadata) -> N numbers`. Adding one needs
no code here: name it `module:function`, or `module:Class` where it has options and a state.

Left out: asking a reward (`scoring.py`). Nothing heavy is imported until one is looked up.
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

from treegrpo.errors import UserError, own_traceback
from treegrpo.naming import import_attribute
from treegrpo.rewards.checkpoints import check_nearby

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
    "shape_overlap": "treegrpo.rewards.composition:shape_overlap",
    "vlm_judge": "treegrpo.rewards.vlm_judge:VLMJudge",
}
REMOTE = "treegrpo.rewards.remote:Remote"  # any of these:
ADDRESSES = ("http://", "https://")
# Their modules say which, as CHECKPOINTS: by option, repository and files.
WITH_CHECKPOINTS = ("aesthetic", "clip_score", "geneval", "hpsv2", "image_reward", "pickscore")


Metadata = list[dict[str, Any]] | None
"""One dict per prompt, from the prompts' file."""


class Reward(Protocol):
    """Scores images: higher is better, on any scale.

    Images are a tensor [N, 3, H, W], float in [0, 1]; `metadata` has one dict per prompt, or is
    None. The N scores may come back as a tensor, a NumPy array or a list. Where a reward wants
    NumPy images, `numpy.asarray(images.cpu())` makes them.

    A reward may have, beside being callable,
    - `check(prompts, metadata)`, called before a run with all its prompts; raises UserError for a
      prompt that the reward cannot score;
    - `concurrent = True`: it may be called from a thread while the next images are being made;
    - `state_dict()` and `load_state_dict(state)`: what it remembers from call to call, which goes
      into a run's checkpoint and comes back when the run is resumed;
    - `close()`: called when a run fails, so that calls under way in threads end soon.
    """

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: Metadata, /
    ) -> Tensor | NDArray[Any] | list[float]:
        """One finite number per image, whose gradient is not used."""


def load_reward(name: str, options: Mapping[str, Any] | None = None) -> Reward:
    """Make a reward.

    Args:
        name: built in, `module:function`, `module:Class` (the module may be installed or lie in
            the current directory), or the http:// or https:// address of a reward server.
        options: keyword arguments of the class.

    Raises:
        UserError: no such built-in, module or attribute, the module fails to import, an option is
            unknown, missing or not allowed, or a checkpoint is missing or incomplete.
    """
    target, options = _find(name, options)
    if not isinstance(target, type):
        return cast(Reward, target)
    try:
        return cast(Reward, target(**options))
    except UserError as error:
        raise UserError(f"reward {name!r}: {error}") from error
    except Exception as error:
        raise UserError(
            f"reward {name!r}: cannot be made with the options {options}: "
            f"{type(error).__name__}: {error}{own_traceback(error)}"
        ) from error


def check_reward(name: str, options: Mapping[str, Any] | None = None) -> None:
    """Refuse what `load_reward` would, as far as that can be said without loading a model."""
    if name in BUILT_IN and not options:
        return  # These exist, and importing them takes seconds.
    _find(name, options)


def reach_reward(name: str, options: Mapping[str, Any] | None = None) -> None:
    """Refuse a built-in reward or an address that needs what is not there, loading no model.

    Raises:
        UserError: the server does not answer soon, or the checkpoint is neither here nor on a hub
            that answers.
    """
    if name not in (*WITH_CHECKPOINTS, "vlm_judge") and not name.startswith(ADDRESSES):
        return
    target, given = _find(name, options)
    needed = getattr(sys.modules[target.__module__], "CHECKPOINTS", {})
    try:
        for option, (repository, files) in needed.items():
            check_nearby(given.get(option), repository, files, option)
        if not needed:
            target(**given).reach()
    except UserError as error:
        raise UserError(f"reward {name!r}: {error}") from error


def _find(name: str, options: Mapping[str, Any] | None) -> tuple[Any, dict[str, Any]]:
    """The function or class of that name, and the options that the class is made with."""
    target, options = BUILT_IN.get(name, name), dict(options or {})
    if name.startswith(ADDRESSES):
        target, options = REMOTE, {"url": name, **options}
    module, _, attribute = target.partition(":")
    if not module or not attribute:
        near = _similar(name)
        raise UserError(
            f"reward {name!r} is unknown{f' (did you mean {near!r}?)' if near else ''}; "
            f"built in are {', '.join(BUILT_IN)}; your own is written as 'module:function', a "
            "server's as its http:// address"
        )
    found = import_attribute(target, f"reward {name!r}")
    _check_options(name, found, options)
    return found, options


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

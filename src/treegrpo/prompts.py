"""Prompt lists and the order in which training draws from them."""

import hashlib
import io
import random
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Literal

from treegrpo.errors import UserError
from treegrpo.textfile import read_utf8

Split = Literal["train", "held_out"]

_MINIATURE_FILES: dict[Split, str] = {
    "train": "train_prompts.txt",
    "held_out": "heldout_prompts.txt",
}


class PromptError(UserError):
    """A prompt list is missing, empty, not UTF-8, or not the one that a checkpoint belongs to."""


def load_prompts(source: str, split: Split) -> list[str]:
    """Prompts of a source: stripped, without blank lines and duplicates, in the file's order.

    Args:
        source: "miniature" for the embedded list, else a UTF-8 text file with one prompt per line.
        split: which of the embedded lists; a file has only one and ignores it.

    Raises:
        PromptError: the file is missing, not UTF-8 or holds no prompt.
    """
    if source == "miniature":
        path = files("treegrpo.miniature") / _MINIATURE_FILES[split]
        text = path.read_text(encoding="utf-8")
    else:
        text = read_utf8(Path(source).expanduser(), "prompt file", PromptError)
    # StringIO ends lines as text files do; str.splitlines would also split at rarer characters
    # such as U+2028 inside a prompt.
    lines = (line.strip() for line in io.StringIO(text, newline=None))
    prompts = list(dict.fromkeys(line for line in lines if line))
    if not prompts:
        raise PromptError(f"prompt file {source} holds no prompt; must hold one per line")
    return prompts


class PromptSampler:
    """Draws prompts without replacement; when all have been drawn, a new shuffle begins.

    The order of an epoch depends on the seed and the epoch's number alone, so the position in it
    is all that an exact resume needs.
    """

    def __init__(self, prompts: Sequence[str], seed: int) -> None:
        """Raises PromptError where `prompts` is empty."""
        if not prompts:
            raise PromptError("prompts: got none; must be at least one")
        self._prompts = tuple(prompts)
        self._seed = seed
        self._start_epoch(0)

    def next(self, count: int) -> list[str]:
        """The next `count` prompts; a prompt repeats only where an epoch ends among them."""
        drawn: list[str] = []
        while len(drawn) < count:
            if self._position == len(self._order):
                self._start_epoch(self._epoch + 1)
            taken = self._order[self._position :][: count - len(drawn)]
            drawn += [self._prompts[index] for index in taken]
            self._position += len(taken)
        return drawn

    def state_dict(self) -> dict[str, int | str]:
        """What `load_state_dict` needs to continue exactly here; JSON values only."""
        return {
            "seed": self._seed,
            "epoch": self._epoch,
            "position": self._position,
            "prompts": self._fingerprint(),
        }

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Continue where `state_dict` was taken; the state's seed replaces this sampler's.

        Raises:
            PromptError: the state belongs to another prompt list.
        """
        if state["prompts"] != self._fingerprint():
            raise PromptError(
                f"the checkpoint was made with other prompts than these {len(self._prompts)}; "
                "resume with the list it was trained on"
            )
        self._seed = int(state["seed"])
        self._start_epoch(int(state["epoch"]))
        self._position = int(state["position"])

    def _start_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._position = 0
        # Only `Random.random` promises the same numbers in later Python versions; shuffle does not.
        generator = random.Random(f"{self._seed}/{epoch}")
        self._order = sorted(range(len(self._prompts)), key=lambda _: generator.random())

    def _fingerprint(self) -> str:
        return hashlib.sha256("\n".join(self._prompts).encode()).hexdigest()

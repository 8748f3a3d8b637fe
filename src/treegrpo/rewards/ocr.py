"""Whether the text that a prompt asks for can be read in the picture.

As Flow-GRPO's OCR reward (arXiv 2505.05470), with RapidOCR (`pip install 'treegrpo[ocr]'`).

Left out: PaddleOCR, which is the original's reader, and text that stands on its head.
"""

from __future__ import annotations

import importlib
import os
import re
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any

from treegrpo.errors import UserError
from treegrpo.images import to_uint8
from treegrpo.rewards.registry import Metadata

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

# Apostrophes are no quotes: one with letters on both sides never is, a straight single quote opens
# only where a word may begin and closes only where one may end. `12"` is twelve inches.
_QUOTED = re.compile(
    r"""(?<!\d)"([^"]*)"
    | “([^”]*)”
    | (?<!\w)'((?!\s)(?:[^'"“”]|(?<=\w)'(?=\w))+)(?<!\s)'(?!\w)
    | ‘((?:[^‘’]|’(?=\w))+)’""",  # noqa: RUF001
    re.VERBOSE,
)
_STRAIGHT = str.maketrans("‘’“”", "''\"\"")  # noqa: RUF001


def quoted_text(prompt: str) -> str:
    """The parts of a prompt in "double", 'single' or curly quotes, joined by spaces, or ''."""
    parts = (match for match in _QUOTED.finditer(prompt) if match[0] != "'n'")  # rock 'n' roll
    return " ".join("".join(match.groups("")).strip() for match in parts)


def comparable(text: str) -> str:
    """Text without what does not count: case, white space, full-width forms, curly quotes."""
    return "".join(unicodedata.normalize("NFKC", text).translate(_STRAIGHT).casefold().split())


def distance(lines: Sequence[str], target: str) -> int:
    """The edit distance from a target to that run of consecutive lines which is nearest to it.

    Lines before and after the run cost nothing. The run may be empty, so that the distance is at
    most the target's length; with one line it is otherwise the Levenshtein distance.
    """
    nothing_read = list(range(len(target) + 1))
    nearest = len(target)
    row = nothing_read  # from the run that ends here to every beginning of the target
    for line in lines:
        row = [min(pair) for pair in zip(row, nothing_read, strict=True)]
        for letter in line:
            before, row = row, [row[0] + 1]
            for index, wanted in enumerate(target):
                row.append(
                    min(before[index] + (letter != wanted), before[index + 1] + 1, row[-1] + 1)
                )
        nearest = min(nearest, row[-1])
    return nearest


class OCR:
    """1 - edit distance / length, in [0, 1], between the text read and the text asked for.

    The text asked for is `metadata["text"]`, or else the prompt's parts in quotes, joined in
    order. Case and white space do not count. It may stand on several lines, and other lines above
    and below it are free; within it every letter that is wrong, missing or too many counts.

    Flow-GRPO's forgives other text only around an exact match, but then also inside a line: a
    picture of "houses" has all of "house", and "hous" gets 1. Its distance to everything read
    falls to 0 for a nearly right text beside any longer one. It takes the first double quotes
    only, and counts a failure of the reader as an empty picture, which here is an error.
    """

    # Reading happens on the CPU, while the next samples may be drawn on the GPU.
    concurrent = True

    def __init__(self, threads: int | None = None) -> None:
        """Load the reader, or raise a UserError that says how to install it.

        Args:
            threads: pictures read at the same time; None: this process's share of the cores.
        """
        if threads is not None and (not isinstance(threads, int) or threads < 1):
            raise UserError(f"option threads: {threads!r} is not a positive integer, nor null")
        try:
            from rapidocr import RapidOCR

            importlib.import_module("onnxruntime")  # rapidocr itself would only at its first use
        except ImportError as error:
            raise UserError(
                f"the text reader cannot be imported ({error}); install it with "
                "pip install 'treegrpo[ocr]'"
            ) from error
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.threads = threads or max(1, (cores or 1) // processes)
        # Many pictures on one core each are faster than one picture on many cores.
        self._reader: Any = RapidOCR(
            params={
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
                "Global.log_level": "error",  # below it, every picture without text is a warning
            }
        )

    def check(self, prompts: list[str], metadata: Metadata) -> None:
        """Raises UserError for the first prompt that asks for no text, or unreadable one."""
        for prompt, entry in zip(prompts, metadata or [{}] * len(prompts), strict=True):
            unknown = sorted(set(_target(prompt, entry)) - self.letters)
            if unknown:
                raise UserError(
                    f"the prompt {prompt!r} asks for text with {', '.join(map(repr, unknown))}, "
                    "which the reader's alphabet lacks, so that no picture could get 1; leave the "
                    "prompt out, or ask for other text"
                )

    @cached_property
    def letters(self) -> frozenset[str]:
        """What the reader can find of a target: its alphabet, as `comparable` text."""
        import numpy as np

        # The recogniser is loaded when it is first used.
        self._reader(np.zeros((48, 48, 3), np.uint8), use_det=False, use_cls=False)
        alphabet: list[str] = self._reader.text_rec.postprocess_op.character
        # The alphabet's first entry is a word that stands for "no letter".
        return frozenset("".join(comparable(letter) for letter in alphabet if len(letter) == 1))

    def __call__(self, images: Tensor, prompts: list[str], metadata: Metadata) -> list[float]:
        """Read N images, float [N, 3, H, W] in [0, 1], and compare: N numbers in [0, 1]."""
        entries = metadata or [{}] * len(prompts)
        targets = [_target(*pair) for pair in zip(prompts, entries, strict=True)]
        # OpenCV, and with it the reader, has blue first.
        pictures = to_uint8(images).flip(1).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(self._score, pictures, targets))

    def read(self, picture: NDArray[np.uint8]) -> list[str]:
        """The lines of text in a picture, from top to bottom: uint8 [H, W, 3], blue first."""
        # The classifier turns text that stands on its head; the original has it off. The reader
        # remembers what it was last told, so all is said.
        found = self._reader(picture, use_det=True, use_cls=False)
        return list(found.txts or ())

    def _score(self, picture: NDArray[np.uint8], target: str) -> float:
        lines = [comparable(line) for line in self.read(picture)]
        return 1 - distance(lines, target) / len(target)


def _target(prompt: str, entry: dict[str, Any]) -> str:
    """What a picture of a prompt must say, as `comparable` text; else UserError."""
    text = entry.get("text")
    if text is not None and not isinstance(text, str):
        raise UserError(f"the prompt {prompt!r} has the metadata text {text!r}; must be a string")
    target = comparable(quoted_text(prompt) if text is None else text)
    if not target:
        raise UserError(
            f"the prompt {prompt!r} asks for no text: put it in quotes, or give it as the "
            'metadata "text"'
        )
    return target

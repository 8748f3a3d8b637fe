"""Refusing what is not finite where it is made, so that the message names the stage.

Left out: rewards' answers (`rewards/scoring.py`), and gradients (`training/learner.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from treegrpo.errors import UserError

if TYPE_CHECKING:
    from treegrpo.rollout import Predict


class NotFiniteError(UserError):
    """Something that was computed has NaN or infinite values."""


def check_finite(what: str, *values: Tensor) -> None:
    """Refuse values of which some are not finite; one transfer from the device.

    Args:
        what: they are, with a verb, to begin the message with.
        values: integers are not looked at.

    Raises:
        NotFiniteError: names the stage.
    """
    flags = [each.isfinite().all() for each in values if each.is_floating_point()]
    if flags and not torch.stack([flag.to(flags[0].device) for flag in flags]).all():
        raise NotFiniteError(f"{what} not finite (NaN or infinite)")


class Watched:
    """A network that remembers at which steps its output was not finite.

    That takes nothing from the device until `check`, so that a rollout does not wait.
    """

    def __init__(self, predict: Predict) -> None:
        self._predict = predict
        self._finite: dict[int, Tensor] = {}

    def __call__(self, x: Tensor, step: int, prompt_index: Tensor) -> Tensor:
        """The network's output."""
        output = self._predict(x, step, prompt_index)
        finite = output.isfinite().all()
        self._finite[step] = self._finite.get(step, finite) & finite
        return output

    def check(self) -> None:
        """Refuse the outputs so far, if some were not finite.

        Raises:
            NotFiniteError: names the first such step.
        """
        for step, finite in zip(
            self._finite, torch.stack([*self._finite.values()]).tolist(), strict=True
        ):
            if not finite:
                raise NotFiniteError(
                    f"the network's output at step {step} (of 0 to {max(self._finite)}) is not "
                    "finite (NaN or infinite)"
                )

"""How many rows are worked on at once: halved for good where they do not fit into memory.

Left out: which size fits before anything has failed (`memory/advice.py`), and batches of rewards'
own models, which are options of theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from treegrpo.errors import UserError, reason

_Result = TypeVar("_Result")


class OutOfMemoryError(UserError):
    """One row at once does not fit into the device's memory."""


@dataclass
class BatchSize:
    """The most rows of one kind of work at once.

    Attributes:
        rows: now; it only falls.
        key: the setting or option that it comes from.
        advice: what else makes room, for the message where one row is too many.
        warnings: takes what is to be told, once a smaller size did fit.
    """

    rows: int
    key: str = "images at once"
    advice: str = "smaller images or bfloat16"
    warnings: list[str] = field(default_factory=list)

    def fit(self, work: Callable[[int], _Result], most: int) -> _Result:
        """What `work` gives, begun anew with half the rows each time it runs out of memory.

        Args:
            work: takes the number of rows at once, on which its result must not depend. What it
                has changed before it fails, it must set right when it begins.
            most: rows that there are.

        Raises:
            OutOfMemoryError: one row at once is too much.
        """
        from accelerate.utils.memory import clear_device_cache

        began = self.rows
        while True:
            try:
                result = work(self.rows)
                break
            except Exception as error:
                if not _is_out_of_memory(error):
                    raise
                at_once = min(self.rows, most)
                if at_once == 1:
                    raise OutOfMemoryError(
                        f"{self.key}: out of memory with 1 at once ({reason(error)}); make room "
                        f"with {self.advice}"
                    ) from error
            # By now no exception holds on to what the attempt had computed.
            self.rows = at_once // 2
            clear_device_cache(garbage_collection=True)
        if self.rows < began:
            self.warnings.append(
                f"{self.key}: {began} at once did not fit into memory; goes on with {self.rows}, "
                "which changes no result"
            )
        return result


def _is_out_of_memory(error: Exception) -> bool:
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, torch.OutOfMemoryError) or bool(should_reduce_batch_size(error))

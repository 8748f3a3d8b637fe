"""Batch sizes as numbers: those of a configuration, with others where it says auto.

Left out: which of them fit (`advice.py`), and halving them on the way (`treegrpo/batch_size.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from treegrpo.config import Config


@dataclass(frozen=True)
class Batches:
    """How many rows at once; as the settings of the same names."""

    max_batch: int
    decode_batch: int
    micro_batch: int

    @staticmethod
    def of(config: Config, auto: Batches | None = None) -> Batches:
        """Those of a configuration, in which auto is as in `auto`, or the most that it can be."""
        auto, rollout, micro = auto or MOST, config.rollout, config.train.micro_batch
        rows = auto.max_batch if rollout.max_batch == "auto" else rollout.max_batch
        decoded = min(rows, auto.decode_batch)
        return Batches(
            rows,
            decoded if rollout.decode_batch == "auto" else rollout.decode_batch,
            auto.micro_batch if micro == "auto" else micro,
        )


MOST = Batches(512, 512, 128)
"""Beyond these, more rows are hardly faster on any device."""
LEAST = Batches(1, 1, 1)


def automatic(config: Config) -> list[str]:
    """The names of the batch sizes that are auto, in the order of `Batches`."""
    both = {**vars(config.rollout), **vars(config.train)}
    return [field.name for field in fields(Batches) if both[field.name] == "auto"]

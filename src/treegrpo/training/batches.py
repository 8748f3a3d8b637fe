"""A run's batch sizes: what auto is on the device at hand, once, before the network is read.

Left out: the estimate (`memory/`), and halving a size that turns out too large (`batch_size.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from treegrpo.batch_size import BatchSize
from treegrpo.config import Config
from treegrpo.device import free_memory
from treegrpo.memory import Batches, Measurements, automatic, estimate, fitting
from treegrpo.models.policy import Policy
from treegrpo.training.engine import Engine

# A model whose weights would fit so many times needs no measuring, which takes seconds: an image's
# activations are as large as a few dozen copies of a small network at most.
_TIMES_FOR_SURE = 500


@dataclass(frozen=True)
class BatchSizes:
    """How many rows are worked on at once, as the settings of the same names."""

    max_batch: BatchSize
    decode_batch: BatchSize
    micro_batch: BatchSize

    def record(self) -> dict[str, float]:
        """The sizes as they are now."""
        return {name: size.rows for name, size in vars(self).items()}


def batch_sizes(
    config: Config, policy: Policy, engine: Engine, warnings: list[str], say: Callable[[str], None]
) -> BatchSizes:
    """Those of the configuration, and where it says auto, what fits on every process's device.

    Args:
        policy: without its weights, which take a part of the memory.
        warnings: takes what is to be told, now and whenever a size is halved.
        say: is told where finding them takes a while.
    """
    sizes = Batches.of(config)
    free = min(engine.everyones(free_memory(engine.device)))
    if automatic(config) and _TIMES_FOR_SURE * _weight_bytes(policy) > free:
        gib = f"{free / 2**30:.1f} GiB"
        say(f"finding the batch sizes that fit into {gib} of free memory")
        model = config.model.model_copy(update={"device": engine.device.type})
        config = config.model_copy(update={"model": model})
        measured, processes = Measurements(config.rollout.steps), engine.processes
        sizes = fitting(config, free, processes=processes, measurements=measured)
        say(", ".join(f"{name} {getattr(sizes, name)}" for name in automatic(config)))
        needed = estimate(config, sizes, processes=processes, measurements=measured)
        if needed.peak > free:
            warnings.append(
                f"memory may run out: the {needed.fullest.name} is foreseen to take "
                f"{needed.peak / 2**30:.1f} GiB, {gib} are free; `treegrpo plan` with --memory "
                "says what makes room"
            )
    advice = {
        "max_batch": "model.dtype=bfloat16, rollout.offload=true or smaller images",
        "decode_batch": "model.vae_tiling=true, model.dtype=bfloat16 or smaller images",
        "micro_batch": "model.gradient_checkpointing=true, model.lora_rank=32, "
        "model.dtype=bfloat16 or smaller images",
    }
    return BatchSizes(
        **{
            name: BatchSize(
                rows,
                f"{'train' if name == 'micro_batch' else 'rollout'}.{name}",
                f"{advice[name]} (`treegrpo plan` with --memory says what fits)",
                warnings,
            )
            for name, rows in asdict(sizes).items()
        }
    )


def _weight_bytes(policy: Policy) -> int:
    """Of the network's and the decoder's files."""
    folder = policy.checkpoint.folder
    files = [p for part in (policy.network_name, "vae") for p in (folder / part).rglob("*")]
    return sum(path.stat().st_size for path in files if path.is_file())

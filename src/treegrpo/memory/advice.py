"""Batch sizes and settings that make a run fit into the memory at hand.

Left out: fewer prompts, smaller images and whatever else would change the task.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from treegrpo.config import Config, changed, method_of
from treegrpo.memory.batches import LEAST, MOST, Batches, automatic
from treegrpo.memory.estimate import Estimate, estimate
from treegrpo.memory.skeleton import Measurements, planned_device

_LORA_RANK = 32  # what is suggested
# Of the memory at hand: the rest is for what the estimate does not count.
_USED = 0.9
# The phases that a batch size decides, in the order in which the sizes are chosen.
_DECIDES = {
    "max_batch": {"rollout", "evaluation"},
    "decode_batch": {"decode", "evaluation"},
    "micro_batch": {"update", "reference"},
}


def fitting(
    config: Config, limit: int, *, processes: int = 1, measurements: Measurements | None = None
) -> Batches:
    """The batch sizes of a run on a device with `limit` bytes free: what auto is.

    Each is the largest power of two, up to `MOST`, with which its phases take nine tenths of the
    memory at most; 1 where none is. What is a number in the configuration stays.
    """
    measured = measurements or Measurements(config.rollout.steps)
    chosen = LEAST

    def fits(sizes: Batches, phases: set[str]) -> bool:
        needed = estimate(config, sizes, processes=processes, measurements=measured)
        return all(p.peak <= _USED * limit for p in needed.phases if p.name in phases)

    if fits(MOST, set().union(*_DECIDES.values())):  # which most small models do
        return Batches.of(config, MOST)
    for name in automatic(config):
        most = getattr(Batches.of(config, replace(chosen, **{name: getattr(MOST, name)})), name)
        sizes = [replace(chosen, **{name: rows}) for rows in (most, *_halves(most))]
        least = bisect.bisect_left(sizes[:-1], True, key=partial(fits, phases=_DECIDES[name]))
        chosen = sizes[least]
    return Batches.of(config, chosen)


@dataclass(frozen=True)
class Change:
    """A setting that saves memory, and the peak with it and those before it."""

    key: str
    value: Any
    peak: int


@dataclass(frozen=True)
class Advice:
    """What makes a run fit into so much memory.

    Attributes:
        fits: whether it then does.
        changes: in the order of taking them; empty where it fits as it is, or where nothing helps.
    """

    fits: bool
    changes: tuple[Change, ...]


def suggest(
    config: Config, limit: int, *, processes: int = 1, measurements: Measurements | None = None
) -> Advice:
    """The mildest settings, in the order of `_remedies`, whose peak is within `limit` bytes.

    Batch sizes that are auto are at their least.
    """
    measured = measurements or Measurements(config.rollout.steps)

    def with_(changes: Mapping[str, Any]) -> Estimate:
        return estimate(changed(config, changes), LEAST, processes=processes, measurements=measured)

    def excess(changes: Mapping[str, Any]) -> int:
        """Of all phases: to bring down one that is not the fullest may be needed too."""
        return sum(max(0, phase.peak - limit) for phase in with_(changes).phases)

    taken: dict[str, Any] = {}
    remedies = _remedies(config, processes)
    for key, values in remedies.items():
        full = {phase.name for phase in with_(taken).phases if phase.peak > limit}
        if not full & _HELPS.get(key, full):
            continue
        least = excess({**taken, key: values[-1]})
        if least < excess(taken):
            taken[key] = _mildest(key, values, taken, least, excess)
    fits = not excess(taken)
    # Some are stronger than needed, or needed no more, now that others are taken.
    for key in reversed(taken) if fits else ():
        others = {name: value for name, value in taken.items() if name != key}
        if not excess(others):
            taken = others
        else:
            milder = remedies[key][: remedies[key].index(taken[key]) + 1]
            taken[key] = _mildest(key, milder, taken, 0, excess)
    changes, so_far = [], {}
    for key, value in taken.items():
        so_far[key] = value
        changes.append(Change(key, value, with_(so_far).peak))
    return Advice(fits, tuple(changes))


def _mildest(
    key: str,
    values: Sequence[Any],
    others: Mapping[str, Any],
    most: int,
    excess: Callable[[Mapping[str, Any]], int],
) -> Any:
    """The first value with which no more than `most` bytes are missing, as with the last."""

    def fits(value: Any) -> bool:
        return excess({**others, key: value}) <= most

    return values[bisect.bisect_left(values[:-1], True, key=fits)]


# The phases that a remedy can help; those that are not here can help any.
_HELPS = {
    "model.gradient_checkpointing": {"update"},
    "train.micro_batch": {"update", "reference"},
    "rollout.max_batch": {"rollout", "decode", "evaluation"},
    "rollout.decode_batch": {"decode", "evaluation"},
    "rollout.prompts_per_batch": {"rollout", "decode"},
    "model.vae_tiling": {"decode", "evaluation"},
}


def _remedies(config: Config, processes: int) -> dict[str, list[Any]]:
    """Setting to its values, the mildest first, in the order in which they are tried."""
    model, settings, method = config.model, config.rollout, method_of(config)
    batches = Batches.of(config, LEAST)
    prompts = settings.prompts_per_iteration // processes
    has_own_memory = planned_device(model).type != "cpu"
    can_wait = "reference_on_cpu" in method.objective_settings.model_fields
    is_here = has_own_memory and method.needs_reference and can_wait and not method.reference_on_cpu
    remedies: dict[str, list[Any]] = {
        "model.gradient_checkpointing": [] if model.gradient_checkpointing else [True],
        "train.micro_batch": _halves(batches.micro_batch),
        "rollout.max_batch": _halves(batches.max_batch),
        "rollout.decode_batch": _halves(batches.decode_batch),
        "rollout.prompts_per_batch": _halves(min(settings.prompts_per_batch or prompts, prompts)),
        "rollout.offload": [True] if has_own_memory and not settings.offload else [],
        "model.dtype": [] if model.dtype == "bfloat16" else ["bfloat16"],
        "model.lora_rank": [] if model.lora_rank else [_LORA_RANK],
        "model.vae_tiling": [] if model.vae_tiling else [True],
        "objective.reference_on_cpu": [True] if is_here else [],
    }
    return {key: values for key, values in remedies.items() if values}


def _halves(value: int) -> list[int]:
    """Powers of two below a number, from the largest to 1."""
    return [2**exponent for exponent in reversed(range((value - 1).bit_length()))]

"""Where a run's figures go: JSON lines in its folder always, and Accelerate's trackers.

One process of a run writes; on the others nothing happens.

Left out: pictures and tables at the end of a run (`report/run.py`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from treegrpo.config import Config
from treegrpo.errors import UserError
from treegrpo.images import to_uint8
from treegrpo.run_folder import (
    EVALUATIONS_FILE,
    METRICS_FILE,
    TENSORBOARD_FOLDER,
    append_line,
    drop_lines_from,
    read_lines,
)

if TYPE_CHECKING:
    from torch import Tensor

    from treegrpo.evaluation.results import Evaluation

_PROJECT = "treegrpo"  # what runs are collected under, by trackers on other machines


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose package is not installed.

    Raises:
        UserError: names the first one.
    """
    for number, name in enumerate(names):
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"tracking.{number}: got {name!r}, whose package is not installed; run "
                f"`pip install {name.replace('_', '-')}`, or leave it out"
            )


class Tracker:
    """The records of one run.

    Args:
        config: of the run; its output folder exists.
        enabled: whether this process writes.
    """

    def __init__(self, config: Config, *, enabled: bool) -> None:
        check_trackers(config.tracking)
        self._folder, self._enabled = config.output, enabled
        self._trackers = [_start(name, config) for name in config.tracking] if enabled else []

    def metrics(self, record: Mapping[str, float]) -> None:
        """Keep the record of an iteration, which it names."""
        if self._enabled:
            append_line(self._folder / METRICS_FILE, dict(record))
            values = {f"train/{name}": value for name, value in record.items()}
            for tracker in self._trackers:
                tracker.log(values, step=int(record["iteration"]))

    def evaluation(self, iteration: int, evaluation: Evaluation) -> None:
        """Keep what was measured after so many iterations, pictures where a tracker takes them."""
        if not self._enabled:
            return
        means = {name: evaluation.mean(name) for name in evaluation.scores}
        errors = {
            f"{name}_standard_error": evaluation.standard_error(name) for name in evaluation.scores
        }
        path = self._folder / EVALUATIONS_FILE
        # A continued run that ends where it began evaluates again.
        drop_lines_from(path, iteration)
        seconds = evaluation.seconds
        append_line(path, {"iteration": iteration, **means, **errors, "seconds": seconds})
        pictures = _pictures(evaluation.images)
        for tracker in self._trackers:
            tracker.log({f"held_out/{name}": value for name, value in means.items()}, iteration)
            if hasattr(tracker, "log_images") and len(pictures):
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"held_out": pictures}, step=iteration, **options)

    def has_evaluation(self, iteration: int) -> bool:
        """Whether it is on record; where nothing is written, nothing is missing."""
        records = read_lines(self._folder / EVALUATIONS_FILE) if self._enabled else []
        return not self._enabled or any(r["iteration"] == iteration for r in records)

    def finish(self) -> None:
        """Close what is open."""
        for tracker in self._trackers:
            tracker.finish()


def _start(name: str, config: Config) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        tracker = kind(TENSORBOARD_FOLDER, str(config.output))
    elif kind.requires_logging_directory:
        tracker = kind(_PROJECT, str(config.output))
    else:
        tracker = kind(_PROJECT)
    tracker.start()
    if name != "tensorboard":  # which keeps settings as a run of its own
        tracker.store_init_configuration(config.model_dump(mode="json"))
    return tracker


def _pictures(images: Tensor) -> Any:
    """[kept, images per prompt, 3, height, width] to uint8 [kept, height, width, 3]: one each."""
    return to_uint8(images[:, 0]).permute(0, 2, 3, 1).cpu().numpy()

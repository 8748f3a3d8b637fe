"""Where a run's figures go: JSON lines in its folder always, and Accelerate's trackers.

One process of a run writes; on the others nothing happens.

Left out: pictures and tables at the end of a run (`report/run.py`).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from treegrpo.config import Config, to_yaml
from treegrpo.errors import UserError
from treegrpo.images import to_uint8
from treegrpo.run_folder import (
    EVALUATIONS_FILE,
    METRICS_FILE,
    TENSORBOARD_FOLDER,
    append_line,
    drop_lines_from,
    flatten,
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
        resumed_at: after how many iterations the run goes on; None: it is new.
    """

    def __init__(self, config: Config, *, enabled: bool, resumed_at: int | None = None) -> None:
        check_trackers(config.tracking)
        self._folder, self._enabled = config.output, enabled
        self._trackers = []
        if enabled:
            self._trackers = [_start(name, config, resumed_at) for name in config.tracking]

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


def _start(name: str, config: Config, resumed_at: int | None) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        # What the broken run did after its last saved state is done again, and its lines overlap.
        tracker = kind(TENSORBOARD_FOLDER, str(config.output), purge_step=resumed_at)
    elif kind.requires_logging_directory:
        tracker = kind(_PROJECT, str(config.output))
    else:
        tracker = kind(_PROJECT)
    tracker.start()
    if name == "tensorboard":
        _describe_run(tracker, config, resumed_at)
    else:
        tracker.store_init_configuration(config.model_dump(mode="json"))
    return tracker


def _describe_run(tracker: Any, config: Config, resumed_at: int | None) -> None:
    """Give TensorBoard the settings, and again what was purged though it remains.

    Accelerate would keep settings as a run of their own, in a folder named by the time.
    """
    from torch.utils.tensorboard import summary

    leaves = flatten(config.model_dump(mode="json"))
    settings = {".".join(keys): _plain(value) for keys, value in leaves.items()}
    figures = {f"held_out/{reward.key}": 0 for reward in config.rewards}
    make: Any = summary.hparams
    for part in make(settings, figures):
        tracker.writer.file_writer.add_summary(part)
    text = "".join(f"    {line}\n" for line in to_yaml(config).splitlines())
    tracker.writer.add_text("configuration", text, resumed_at or 0)
    # The evaluation after the last iteration that counts stands at the first step that does not.
    for record in read_lines(config.output / EVALUATIONS_FILE):
        if record["iteration"] == resumed_at:
            tracker.log({name: record[name.partition("/")[2]] for name in figures}, resumed_at)


def _plain(value: Any) -> str | bool | int | float:
    return value if isinstance(value, str | bool | int | float) else json.dumps(value)


def _pictures(images: Tensor) -> Any:
    """[kept, images per prompt, 3, height, width] to uint8 [kept, height, width, 3]: one each."""
    return to_uint8(images[:, 0]).permute(0, 2, 3, 1).cpu().numpy()

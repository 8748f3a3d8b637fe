"""Records of a run: JSON lines always, and every tracker that is asked for, through Accelerate."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import accelerate.tracking
import pytest
import torch
from accelerate import PartialState
from command_line import CommandLine
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from treegrpo.config import load_config
from treegrpo.errors import UserError
from treegrpo.evaluation.results import Evaluation
from treegrpo.run_folder import drop_lines_from, read_lines
from treegrpo.tracking import Tracker


class Recorder(accelerate.tracking.GeneralTracker):  # type: ignore[misc]
    """A tracker of Accelerate's form that keeps what it is told."""

    name = "wandb"
    requires_logging_directory = False
    made: list[Recorder]

    def __init__(self, run_name: str, **others: Any) -> None:
        super().__init__()
        self.run_name = run_name
        self.told: list[tuple[str, Any]] = []
        self.made.append(self)

    @property
    def tracker(self) -> None:
        return None

    def start(self) -> None:
        self.told.append(("start", None))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.told.append(("configuration", values))

    def log(self, values: dict[str, Any], step: int | None = None, **others: Any) -> None:
        self.told.append(("log", (values, step)))

    def log_images(self, values: dict[str, Any], step: int | None = None, **others: Any) -> None:
        self.told.append(("images", (values["held_out"], step, others)))

    def finish(self) -> None:
        self.told.append(("finish", None))


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """Those that are made while "wandb" stands for `Recorder`."""
    PartialState()
    Recorder.made = []
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: found("json" if name == "wandb" else name)
    )
    return Recorder.made


def evaluation() -> Evaluation:
    images = torch.stack([torch.zeros(2, 3, 4, 6), torch.ones(2, 3, 4, 6)])
    return Evaluation(("a", "b"), {"x": torch.tensor([[1.0], [3.0]])}, (0, 1), images, 0.5)


def test_every_tracker_gets_figures_pictures_and_the_configuration(
    tmp_path: Path, recorders: list[Recorder]
) -> None:
    config = load_config(None, ["tracking=[tensorboard, wandb]", f"output={tmp_path}"])
    tracker = Tracker(config, enabled=True)
    tracker.evaluation(0, evaluation())
    tracker.metrics({"iteration": 0, "reward": 0.25})
    tracker.finish()

    (recorder,) = recorders
    kinds = [kind for kind, _ in recorder.told]
    assert kinds == ["start", "configuration", "log", "images", "log", "finish"]
    assert recorder.told[1][1]["rollout"]["method"] == "tree_grpo"
    assert recorder.told[2][1] == ({"held_out/x": 2.0}, 0)
    pictures, step, options = recorder.told[3][1]
    assert (pictures.shape, step, options) == ((2, 4, 6, 3), 0, {})
    assert (pictures[0].max(), pictures[1].min()) == (0, 255)
    assert recorder.told[4][1] == ({"train/iteration": 0, "train/reward": 0.25}, 0)

    assert read_lines(tmp_path / "metrics.jsonl") == [{"iteration": 0, "reward": 0.25}]
    (record,) = read_lines(tmp_path / "evaluations.jsonl")
    assert (record["iteration"], record["x"], record["x_standard_error"]) == (0, 2.0, 1.0)
    board: Any = EventAccumulator(str(tmp_path / "tensorboard"))
    tags = board.Reload().Tags()
    assert {"train/reward", "held_out/x"} <= {*tags["scalars"]}
    sizes = [(image.width, image.height) for tag in tags["images"] for image in board.Images(tag)]
    assert sizes == [(12, 4)]  # side by side


def test_tensorboard_knows_the_settings(tmp_path: Path) -> None:
    PartialState()
    rewards = "rewards=[{name: composition, label: x}, {name: ocr, label: y, options: {a: [1]}}]"
    tracker = Tracker(load_config(None, [rewards, f"output={tmp_path}"]), enabled=True)
    tracker.finish()
    board = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "tensorboard")).Reload()
    assert list(board.Runs()) == ["."]  # no run of their own
    found = board.PluginRunToTagToContent("hparams")["."]
    start = HParamsPluginData.FromString(found["_hparams_/session_start_info"]).session_start_info
    assert start.hparams["rollout.method"].string_value == "tree_grpo"
    assert start.hparams["train.learning_rate"].number_value == 2e-4
    assert start.hparams["model.gradient_checkpointing"].bool_value is False
    assert '"a": [1]' in start.hparams["rewards"].string_value
    experiment = HParamsPluginData.FromString(found["_hparams_/experiment"]).experiment
    shown = [info.name.tag for info in experiment.metric_infos]
    assert shown == ["held_out/x", "held_out/y"]  # figures by which runs are compared
    (text,) = (
        EventAccumulator(str(tmp_path / "tensorboard"))
        .Reload()
        .Tensors("configuration/text_summary")
    )
    assert b"method: tree_grpo" in text.tensor_proto.string_val[0]


def test_a_resumed_run_draws_one_line(tmp_path: Path) -> None:
    PartialState()
    config = load_config(None, [f"output={tmp_path}", "rewards=[{name: composition, label: x}]"])
    broken = Tracker(config, enabled=True)
    broken.evaluation(0, evaluation())
    for iteration in range(5):  # the last saved state is that after three
        broken.metrics({"iteration": iteration, "reward": 0.1})
        broken.evaluation(iteration + 1, evaluation())
    broken.finish()
    for name, first in {"metrics.jsonl": 3, "evaluations.jsonl": 4}.items():
        drop_lines_from(tmp_path / name, first)
    time.sleep(1.1)  # files of events are read by the second in which they were begun
    resumed = Tracker(config, enabled=True, resumed_at=3)
    resumed.metrics({"iteration": 3, "reward": 0.2})
    resumed.evaluation(4, evaluation())
    resumed.finish()
    board: Any = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    rewards = [(event.step, round(event.value, 3)) for event in board.Scalars("train/reward")]
    assert rewards == [(0, 0.1), (1, 0.1), (2, 0.1), (3, 0.2)]
    assert [event.step for event in board.Scalars("held_out/x")] == [0, 1, 2, 3, 4]


def test_processes_that_do_not_write_start_nothing(
    tmp_path: Path, recorders: list[Recorder]
) -> None:
    config = load_config(None, ["tracking=[wandb]", f"output={tmp_path}"])
    tracker = Tracker(config, enabled=False)
    tracker.evaluation(0, evaluation())
    tracker.metrics({"iteration": 0, "reward": 0.25})
    tracker.finish()
    assert not recorders
    assert not list(tmp_path.iterdir())
    assert tracker.has_evaluation(7)


def test_a_tracker_that_is_not_installed_is_refused_at_once(treegrpo: CommandLine) -> None:
    message = treegrpo.refusal("train", "tracking=[tensorboard, comet_ml]")
    assert message == (
        "tracking.1: got 'comet_ml', whose package is not installed; run `pip install comet-ml`, "
        "or leave it out"
    )
    with pytest.raises(UserError, match=r"tracking\.0: got 'dvclive'"):
        Tracker(load_config(None, ["tracking=[dvclive]", "output=run"]), enabled=False)
    assert treegrpo.refusal("train", "tracking=[tensorbord]").startswith(
        'tracking.0: got "tensorbord"; must be one of "tensorboard", "wandb"'
    )
    assert not Path("run").exists()

"""Batch sizes: chosen by the memory at hand, halved where it runs out, of no effect on results.

Left out: two processes, one of which halves alone (test_processes.py); what `treegrpo plan` says of
the sizes (test_memory.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import CommandLine
from diffusers import AutoencoderKL, SD3Transformer2DModel

from treegrpo.batch_size import BatchSize, OutOfMemoryError
from treegrpo.config import Config, load_config
from treegrpo.memory import LEAST, Batches, Measurements, estimate, fitting
from treegrpo.run_folder import read_lines
from treegrpo.training.build import build
from treegrpo.training.loop import iterate, train

SMALL = (
    "model.device=cpu",
    "rollout.steps=4",
    "rollout.branching=2",
    "rollout.window_size=2",
    "rollout.window_schedule=fixed",
    "rollout.prompts_per_iteration=4",
    "objective.kl_weight=0.1",
    "rewards=[{name: 'toy_rewards:brightness'}]",
    "evaluation.max_prompts=3",
    "evaluation.images_per_prompt=2",
    "train.iterations=1",
    "train.ema_decay=null",
)


@pytest.fixture
def configure(tiny_checkpoint: Path, tmp_path: Path) -> Callable[..., Config]:
    paths = (f"model.path={tiny_checkpoint}", f"output={tmp_path / 'run'}")
    return lambda *changes: load_config(None, [*SMALL, *paths, *changes])


# --- halving ---


def out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB.")


def of_the_cpu() -> RuntimeError:
    return RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: 7 bytes")


@pytest.mark.parametrize("error", [out_of_memory, of_the_cpu])
def test_a_size_is_halved_until_it_fits_and_stays(error: Callable[[], Exception]) -> None:
    tried: list[int] = []

    def work(rows: int) -> str:
        tried.append(rows)
        if rows > 3:
            raise error()
        return "done"

    size = BatchSize(512, "rollout.max_batch", "")
    assert size.fit(work, 20) == "done"
    # There are but 20 rows: 256, 128, 64 and 32 would be as many.
    assert tried == [512, 10, 5, 2]
    assert size.fit(work, 20) == "done"
    assert tried[4:] == [2]
    assert size.warnings == [
        "rollout.max_batch: 512 at once did not fit into memory; goes on with 2, which changes no "
        "result"
    ]


def test_where_one_is_too_many_the_error_says_what_to_change() -> None:
    def work(rows: int) -> None:
        raise out_of_memory()

    size = BatchSize(4, "train.micro_batch", "model.gradient_checkpointing=true")
    message = r"^train\.micro_batch: out of memory with 1 .* model\.gradient_checkpointing=true$"
    with pytest.raises(OutOfMemoryError, match=message):
        size.fit(work, 100)
    assert size.warnings == []


def test_another_error_is_not_taken_for_little_memory() -> None:
    def work(rows: int) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        BatchSize(4).fit(work, 4)


class LittleMemory:
    """Makes the network and the decoder run out of memory above a number of rows.

    In an update, that is less than half of it, and what fails is not the first micro-batch.

    Attributes:
        failures: how often, by what was done.
    """

    def __init__(self, patch: pytest.MonkeyPatch, rows: int, *, in_backward: bool) -> None:
        self.failures: dict[str, int] = {}
        forward, decode = SD3Transformer2DModel.forward, AutoencoderKL.decode
        calls = 0

        def little_forward(
            module: Any, hidden_states: torch.Tensor, *others: Any, **all: Any
        ) -> Any:
            nonlocal calls
            is_update = torch.is_grad_enabled()
            calls += is_update
            too_many = len(hidden_states) > (rows // 2 if is_update else rows)
            # By the second call, the first one's gradient is there.
            if too_many and (not is_update or (calls > 1 and not in_backward)):
                self._fail("update" if is_update else "forward")
            if too_many and is_update and in_backward and calls > 1:
                # The later layers' parameters have their gradient when the first ones' fails.
                block = module.transformer_blocks[0]
                hook = block.register_forward_hook(
                    lambda _, __, outputs: (
                        outputs[1].register_hook(lambda _: self._fail("backward")) and None
                    )
                )
                try:
                    return forward(module, hidden_states, *others, **all)
                finally:
                    hook.remove()
            return forward(module, hidden_states, *others, **all)

        def little_decode(vae: Any, latents: torch.Tensor, *others: Any, **all: Any) -> Any:
            if len(latents) > rows:
                self._fail("decode")
            return decode(vae, latents, *others, **all)

        patch.setattr(SD3Transformer2DModel, "forward", little_forward)
        patch.setattr(AutoencoderKL, "decode", little_decode)

    def _fail(self, where: str) -> None:
        self.failures[where] = self.failures.get(where, 0) + 1
        raise out_of_memory()


@pytest.mark.parametrize("in_backward", [False, True], ids=["forward", "backward"])
def test_a_run_in_little_memory_computes_the_same(
    in_backward: bool, configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pictures of 256 levels would turn a difference in the last bit into one of a level.
    monkeypatch.setattr("treegrpo.training.collector.as_pictures", lambda images: images)

    def run() -> tuple[torch.Tensor, Any, dict[str, float], list[str]]:
        run = build(configure("rollout.max_batch=8", "train.micro_batch=4"))
        clip = run.engine.clip_gradient
        gradients: list[torch.Tensor] = []

        def keep(parameters: Any, largest: float) -> float:
            gradients.extend(p.grad.flatten().clone() for p in parameters if p.grad is not None)
            return clip(parameters, largest)

        monkeypatch.setattr(run.engine, "clip_gradient", keep)
        evaluation = run.measure()
        record = iterate(run)
        return torch.cat(gradients), evaluation.scores, record, run.warnings

    expected, expected_scores, before, warnings = run()
    assert warnings == []
    assert {name: before[name] for name in vars(LEAST)} == {
        "max_batch": 8,
        "decode_batch": 8,
        "micro_batch": 4,
    }
    with monkeypatch.context() as patch:
        memory = LittleMemory(patch, 3, in_backward=in_backward)
        actual, scores, record, warnings = run()
    assert memory.failures.keys() == {"forward", "decode", "backward" if in_backward else "update"}
    assert expected.norm() > 1e-4
    assert (actual - expected).norm() < 1e-4 * expected.norm()
    for name, values in expected_scores.items():
        torch.testing.assert_close(scores[name], values, rtol=0, atol=1e-3)
    assert {name: record[name] for name in vars(LEAST)} == {
        "max_batch": 3,  # of 6 in the evaluation
        "decode_batch": 3,
        "micro_batch": 1,  # after 2 for the reference
    }
    for name in ("update_forwards", "rollout_forwards"):
        assert record[name] == before[name], name
    assert {warning.partition(":")[0] for warning in warnings} == {
        "rollout.decode_batch",
        "rollout.max_batch",
        "train.micro_batch",
    }


def test_what_does_not_fit_at_all_ends_the_run_in_words(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = configure("rollout.max_batch=2")
    with monkeypatch.context() as patch:
        LittleMemory(patch, 0, in_backward=False)
        with pytest.raises(
            OutOfMemoryError, match=r"^rollout\.max_batch: .* model\.dtype=bfloat16"
        ):
            train(config)
    assert train(config).iterations == 1
    (record,) = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert record["micro_batch"] == 128


# --- what auto is ---


def test_auto_is_the_most_that_fits(configure: Callable[..., Config]) -> None:
    config = configure("rollout.prompts_per_iteration=32", "model.height=32", "model.width=32")
    measured = Measurements(config.rollout.steps)

    def peaks(sizes: Batches) -> dict[str, int]:
        needed = estimate(config, sizes, measurements=measured)
        return {phase.name: phase.peak for phase in needed.phases}

    least, most = peaks(LEAST), peaks(Batches.of(config))
    assert fitting(config, 2 * max(most.values()), measurements=measured) == Batches.of(config)
    assert fitting(config, 1000, measurements=measured) == LEAST
    limit = int(1.4 * max(least.values()))
    sizes = fitting(config, limit, measurements=measured)
    assert LEAST.micro_batch < sizes.micro_batch < 128
    assert LEAST.decode_batch < sizes.decode_batch <= sizes.max_batch < 512
    assert max(peaks(sizes).values()) <= 0.9 * limit
    for name, phases in (
        ("max_batch", ("rollout", "evaluation")),
        ("micro_batch", ("update", "reference")),
    ):
        more = peaks(Batches(**{**vars(sizes), name: 2 * getattr(sizes, name)}))
        assert max(more[phase] for phase in phases) > 0.9 * limit


def test_a_number_stays(configure: Callable[..., Config]) -> None:
    config = configure("rollout.max_batch=6", "train.micro_batch=7")
    assert fitting(config, 1000) == Batches(6, 1, 7)
    assert fitting(config, 2**40) == Batches(6, 6, 7)


def test_a_run_chooses_and_records_what_fits(
    configure: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = configure("rollout.max_batch=5")
    free = int(1.5 * estimate(config, LEAST).peak)
    monkeypatch.setattr("treegrpo.training.batches.free_memory", lambda device: free)
    sizes = fitting(config, free)
    assert 1 < sizes.micro_batch < 128
    told: list[str] = []
    run = build(config, phase=lambda name, *details: told.append(name))
    assert f"decode_batch {sizes.decode_batch}, micro_batch {sizes.micro_batch}" in told
    record = iterate(run)
    assert {name: record[name] for name in vars(sizes)} == vars(sizes)
    assert run.warnings == []


def test_a_run_that_may_not_fit_is_warned_of(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("treegrpo.training.batches.free_memory", lambda device: 10**6)
    (warning,) = build(configure()).warnings
    assert warning.startswith("memory may run out: the update is foreseen to take 0.0 GiB")


def test_the_plan_shows_them(tiny_checkpoint: Path, treegrpo: CommandLine) -> None:
    arguments = ("plan", *SMALL[:-1], f"model.path={tiny_checkpoint}")
    _, out, _ = treegrpo(*arguments)
    assert "max_batch 512, decode_batch 512, micro_batch 128 (auto, for " in out
    _, out, _ = treegrpo(*arguments, "model.device=xpu")  # which is not here
    assert "max_batch 1, decode_batch 1, micro_batch 1 (auto: the least; " in out
    limit = int(1.5 * estimate(load_config(None, list(arguments[1:])), LEAST).peak)
    _, out, _ = treegrpo(*arguments, "rollout.max_batch=5", "--memory", str(limit))
    assert "batch sizes: max_batch 5, " in out
    assert "(auto: decode_batch, micro_batch, for " in out
    assert "\ndisk: embeddings " in out

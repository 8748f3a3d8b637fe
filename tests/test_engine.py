"""What Accelerate would take from its environment, behind the configuration's back."""

from typing import Literal

import pytest
import torch

from treegrpo.config import ModelConfig
from treegrpo.errors import UserError
from treegrpo.training.engine import Engine


@pytest.mark.parametrize(
    ("variable", "value", "instead"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "model.dtype, here float32, says"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "model.dtype, here float32, says"),
        ("ACCELERATE_USE_FSDP", "true", "every process holds the whole model"),
        ("ACCELERATE_USE_DEEPSPEED", "1", "every process holds the whole model"),
        ("ACCELERATE_USE_MEGATRON_LM", "yes", "every process holds the whole model"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "every process holds the whole model"),
    ],
)
def test_what_a_launcher_asks_beside_the_configuration_is_refused(
    variable: str, value: str, instead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError) as caught:
        Engine(ModelConfig(device="cpu"))
    assert str(caught.value).startswith(f"environment variable {variable}: got {value.lower()!r}; ")
    assert instead in str(caught.value)


def test_all_that_is_refused_is_told_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=r"(?s)ACCELERATE_USE_FSDP.*\n.*ACCELERATE_MIXED_PRECISION"):
        Engine(ModelConfig(device="cpu"))


@pytest.mark.parametrize(
    ("variable", "value", "instead"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "train.micro_batch splits"),
        ("ACCELERATE_DYNAMO_BACKEND", "EAGER", "model.compile=true compiles"),
    ],
)
def test_what_would_change_no_result_is_not_followed_and_told(
    variable: str, value: str, instead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    engine = Engine(ModelConfig(device="cpu"))
    assert len(engine.warnings) == 1
    assert engine.warnings[0].startswith(f"environment variable {variable}={value.lower()} ")
    assert instead in engine.warnings[0]
    network = torch.nn.Linear(1, 1)
    engine.backward(network(torch.ones(1, 1)).sum())
    assert network.weight.grad is not None and network.weight.grad.item() == 1.0


@pytest.mark.parametrize(
    ("variable", "value", "dtype"),
    [
        ("ACCELERATE_MIXED_PRECISION", "no", "float32"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "bfloat16"),
        ("ACCELERATE_MIXED_PRECISION", "", "float32"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1", "float32"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "", "float32"),
        ("ACCELERATE_DYNAMO_BACKEND", "NO", "float32"),
        ("ACCELERATE_USE_FSDP", "false", "float32"),
    ],
)
def test_what_a_launcher_always_sets_changes_nothing(
    variable: str,
    value: str,
    dtype: Literal["float32", "bfloat16"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, value)
    engine = Engine(ModelConfig(device="cpu", dtype=dtype))
    accelerator = engine._accelerator
    assert (accelerator.mixed_precision, accelerator.gradient_accumulation_steps) == ("no", 1)
    assert (engine.device.type, engine.warnings) == ("cpu", [])


def test_a_device_of_the_environment_does_not_replace_a_configured_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    monkeypatch.setattr("accelerate.state.PartialState._shared_state", {})
    monkeypatch.setattr("accelerate.state.AcceleratorState._shared_state", {})
    with pytest.raises(UserError, match=r"model\.device: got 'cpu', but .* sets 'meta'"):
        Engine(ModelConfig(device="cpu"))

"""Checkpoints that need another package, or whose weights are no plain floats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from command_line import CommandLine
from safetensors.torch import load_file, save_file

from treegrpo.config import load_config
from treegrpo.models.components import Components
from treegrpo.models.folder import ModelError, check_checkpoint, check_trainable
from treegrpo.training.build import build

Fault = Callable[[Path], None]


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, folder)
    return folder


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says which packages of those in question are there."""

    def only(*packages: str) -> None:
        def known(package: str) -> str:
            if package not in packages:
                raise PackageNotFoundError(package)
            return version(package) if package == "protobuf" else "1.0"

        monkeypatch.setattr("treegrpo.models.folder.version", known)

    return only


def quantised(part: str, **settings: object) -> Fault:
    """In its configuration alone."""

    def change(folder: Path) -> None:
        file = folder / part / "config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "quantization_config": settings}))

    return change


def of_bytes(part: str) -> Fault:
    """One weight as codes, without a word of how to read them."""

    def change(folder: Path) -> None:
        (file,) = (folder / part).glob("*.safetensors")
        tensors = load_file(file)
        name = next(name for name, tensor in tensors.items() if tensor.dim() > 1)
        tensors[name] = tensors[name].to(torch.int8)
        save_file(tensors, file, {"format": "pt"})

    return change


def vocabulary(name: str, start: bytes) -> Fault:
    """Alone, in the place of what is there."""

    def change(folder: Path) -> None:
        for file in ("tokenizer.json", "vocab.json", "merges.txt"):
            (folder / "tokenizer_2" / file).unlink(missing_ok=True)
        (folder / "tokenizer_2" / name).write_bytes(start + b"a\\x00" * 20)

    return change


BITS_4 = quantised("text_encoder", load_in_4bit=True)
TORCHAO = quantised("transformer", quant_method="torchao", quant_type="int8wo")
SPIECE = vocabulary("spiece.model", b"\n\x05")
MISSING = [
    (BITS_4, "bitsandbytes", "text_encoder are quantised (bitsandbytes)"),
    (quantised("vae", quant_method="quanto"), "optimum-quanto", "vae are quantised (quanto)"),
    (quantised("transformer", quant_method="gguf"), "gguf", "transformer are quantised (gguf)"),
    (TORCHAO, "torchao", "transformer are quantised (torchao)"),
    (SPIECE, "sentencepiece", "tokenizer_2 holds its vocabulary as spiece.model alone"),
    (vocabulary("tokenizer.model", b"\n\x05"), "sentencepiece", "as tokenizer.model alone"),
    (vocabulary("tokenizer.model", b"IQ== 0\n"), "tiktoken", "as tokenizer.model alone"),
]


@pytest.mark.parametrize(("fault", "package", "words"), MISSING)
@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_missing_package_is_named_before_any_work(
    command: str,
    fault: Fault,
    package: str,
    words: str,
    checkpoint: Path,
    install: Callable[..., None],
    treegrpo: CommandLine,
) -> None:
    fault(checkpoint)
    install()
    reward = "rewards=[{name: jpeg_compressibility}]"
    message = treegrpo.refusal(command, f"model.path={checkpoint}", "model.lora_rank=2", reward)
    assert message.startswith("model.path: ")
    assert words in message
    assert f"the package {package} is missing; install it (`pip install {package}`)" in message
    assert "\n" not in message


@pytest.mark.parametrize(("fault", "package"), [case[:2] for case in MISSING])
def test_a_package_that_is_there_is_not_missed(
    fault: Fault, package: str, checkpoint: Path, install: Callable[..., None]
) -> None:
    fault(checkpoint)
    install(package, "protobuf")
    for weights in (True, False):
        check_checkpoint(checkpoint, weights=weights)


def test_sentencepiece_needs_a_package_of_its_own(
    checkpoint: Path, install: Callable[..., None]
) -> None:
    SPIECE(checkpoint)
    install("sentencepiece")
    with pytest.raises(ModelError, match="the package protobuf is missing"):
        check_checkpoint(checkpoint)


def test_a_vocabulary_that_needs_nothing_is_preferred(
    checkpoint: Path, install: Callable[..., None]
) -> None:
    (checkpoint / "tokenizer_2" / "spiece.model").write_bytes(b"\n\x05")
    install()
    check_checkpoint(checkpoint)


@pytest.mark.parametrize("method", ["torchao", "a new method"])
def test_quantised_weights_are_not_trained_in_full(
    method: str,
    checkpoint: Path,
    install: Callable[..., None],
    treegrpo: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quantised("transformer", quant_method=method)(checkpoint)
    install("torchao")
    monkeypatch.setattr(Components, "read", None)  # calling it would fail
    model = f"model.path={checkpoint}"
    start = "model.lora_rank: got 0, which trains all weights, but those of "
    for command in ("train", "plan"):
        message = treegrpo.refusal(command, model, "model.lora_rank=0")
        assert message.startswith(start)
        assert f"transformer are quantised ({method})" in message
    with pytest.raises(ModelError, match=start):
        build(load_config(None, [model, "model.device=cpu"]))
    check_trainable(str(checkpoint), in_full=False)


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_what_is_not_trained_may_be_quantised(
    part: str, checkpoint: Path, install: Callable[..., None]
) -> None:
    quantised(part, quant_method="torchao")(checkpoint)
    install("torchao")
    check_checkpoint(checkpoint)
    check_trainable(str(checkpoint), in_full=True)


def test_quantised_weights_are_planned_with_lora(
    checkpoint: Path, install: Callable[..., None], treegrpo: CommandLine
) -> None:
    TORCHAO(checkpoint)
    install("torchao")
    code, _, err = treegrpo("plan", f"model.path={checkpoint}", "model.lora_rank=2")
    assert (code, err) == (0, "")


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_bytes_are_no_weights_unless_it_is_said_how_to_read_them(
    part: str, checkpoint: Path, install: Callable[..., None]
) -> None:
    of_bytes(part)(checkpoint)
    message = rf"{part}/.*\.safetensors holds 1 tensors of bytes, such as .* no quantization_config"
    with pytest.raises(ModelError, match=message):
        check_checkpoint(checkpoint)
    quantised(part, quant_method="torchao")(checkpoint)
    install("torchao")
    check_checkpoint(checkpoint)

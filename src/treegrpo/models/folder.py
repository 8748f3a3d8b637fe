"""Checkpoint folders, looked at without heavy imports, so that mistakes answer at once.

Left out: reading weights (`components.py`), and states of training (`treegrpo/checkpoint.py`).
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from treegrpo import hub
from treegrpo.errors import UserError, reason
from treegrpo.miniature import EMBEDDED

SAMPLING_FILE = "sampling.json"
INDEX_FILE = "model_index.json"
LORA_FILE = "pytorch_lora_weights.safetensors"

# Pipeline class, as a checkpoint's model_index.json names it, to the policy that trains it.
FAMILIES = {
    "FluxPipeline": "treegrpo.models.flux:Flux",
    "QwenImagePipeline": "treegrpo.models.qwen_image:QwenImage",
    "SanaPipeline": "treegrpo.models.sana:Sana",
    "StableDiffusion3Pipeline": "treegrpo.models.sd3:StableDiffusion3",
    "StableDiffusionPipeline": "treegrpo.models.stable_diffusion:StableDiffusion",
    "StableDiffusionXLPipeline": "treegrpo.models.stable_diffusion:StableDiffusionXL",
    "WanPipeline": "treegrpo.models.wan:Wan",
}

# Those of diffusion models; the others are rectified flows.
_DIFFUSION = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")

# What a component's folder must hold: its configuration, and for models one of these weights.
_CONFIGS = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
_WEIGHTS = ("diffusion_pytorch_model", "model", "pytorch_model")
_VOCABULARIES = ("tokenizer.json", "spiece.model", "tokenizer.model")
# How weights are packed, as a configuration's `quant_method`, to the package that unpacks them. Of
# methods that are not here, the libraries themselves say what they need.
_QUANTIZERS = {
    "aqlm": "aqlm",
    "auto-round": "auto-round",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "kernels",
    "gguf": "gguf",
    "gptq": "gptqmodel",
    "higgs": "flute-kernel",
    "hqq": "hqq",
    "modelopt": "nvidia-modelopt",
    "mxfp4": "kernels",
    "nunchaku_lite": "kernels",
    "quanto": "optimum-quanto",
    "quark": "amd-quark",
    "sdnq": "sdnq",
    "spqr": "spqr_quant",
    "torchao": "torchao",
    "vptq": "vptq",
}
_ENDINGS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")


class ModelError(UserError):
    """A checkpoint that cannot be loaded, or a setting it does not allow."""


class ConfigFile(dict[str, Any]):
    """What a JSON file of a checkpoint says.

    Asked for a key that it lacks or leaves null, it raises a ModelError with the file and the key;
    `get` has a default as ever.
    """

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.path = path

    def __getitem__(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ModelError(f"model.path: {self.path} lacks {key!r}; must be given there")
        return value


@contextmanager
def loading(what: Path) -> Iterator[None]:
    """Tell what a library raises inside as a ModelError about a file or folder.

    For libraries' calls alone: an error of our own code must keep its traceback.
    """
    try:
        yield
    except Exception as error:  # each library has its own
        raise ModelError(
            f"model.path: cannot load {what}: {type(error).__name__}: {error}"
        ) from error


def resolve(path: str) -> str:
    """An embedded checkpoint's folder for its name, any other path as it is."""
    if path in EMBEDDED:
        return str(resources.files("treegrpo") / "miniature" / EMBEDDED[path])
    return str(Path(path).expanduser()) if path.startswith("~") else path


def check_checkpoint(folder: Path, field: str = "model.path", *, weights: bool = True) -> None:
    """Refuse a folder that is neither a complete, supported checkpoint nor our LoRA export.

    Weights are not read, but a missing shard or a truncated safetensors file is found.

    Args:
        field: what named the folder, to begin messages with.
        weights: whether they are needed; otherwise the networks' and scheduler's configurations do.

    Raises:
        ModelError: a file is missing or damaged, or the pipeline class is not supported.
    """
    if (folder / LORA_FILE).is_file() and (folder / SAMPLING_FILE).is_file():
        _check_weights(folder / LORA_FILE, field)
        return
    if not (folder / INDEX_FILE).is_file():
        raise ModelError(
            f"{field}: {folder} has no {INDEX_FILE}; it must be a checkpoint in the diffusers "
            f"folder format, or LoRA weights as treegrpo exports them ({LORA_FILE} and "
            f"{SAMPLING_FILE})"
        )
    index = read_json(folder / INDEX_FILE, field)
    check_family(str(folder), index, field)
    for name in components(index):
        if weights or not name.startswith("tokenizer"):
            _check_component(folder / name, field, weights)
        # Its bytes are its vocabulary.
        if name.startswith("tokenizer") and index[name][1] != "ByT5Tokenizer":
            _check_tokenizer(folder / name, field, weights)


def is_diffusion(path: str) -> bool:
    """Whether a checkpoint in a folder is a diffusion model; of a hub's nothing is known here."""
    index = Path(resolve(path)) / INDEX_FILE
    return index.is_file() and read_json(index).get("_class_name") in _DIFFUSION


def lora_file(path: str) -> Path:
    """The file of `model.lora_path`; ModelError: there is none."""
    given = Path(path).expanduser()
    file = given / LORA_FILE if given.is_dir() else given
    if not file.is_file() or file.suffix != ".safetensors":
        raise ModelError(
            f"model.lora_path: got {path}; must be a safetensors file of LoRA weights, or a folder "
            f"with a {LORA_FILE}"
        )
    _check_weights(file, "model.lora_path")
    return file


def check_trainable(path: str, *, in_full: bool = False) -> None:
    """Refuse, with a ModelError, LoRA weights to train, and quantised ones to train in full."""
    folder = Path(resolve(path))
    if (folder / LORA_FILE).is_file():
        raise ModelError(
            f"model.path: {path} holds LoRA weights, which can be sampled and evaluated; to train "
            "them on, continue their run with --resume, or name their base here and them in "
            "model.lora_path"
        )
    # A hub's is looked at once it is here.
    if in_full and (folder / INDEX_FILE).is_file():
        check_full_training(folder)


def check_full_training(folder: Path) -> None:
    """Refuse, with a ModelError, a checkpoint whose network is quantised: it has no gradients."""
    for network in ("transformer", "unet"):
        file = folder / network / "config.json"
        if file.is_file() and (method := _quantization(read_json(file))):
            raise ModelError(
                f"model.lora_rank: got 0, which trains all weights, but those of {folder / network}"
                f" are quantised ({method}) and cannot be changed; must be at least 1, or "
                "model.path a checkpoint that is not quantised"
            )


def _quantization(config: Mapping[str, Any]) -> str | None:
    """The method by which a component's weights are quantised; None: they are plain."""
    settings = config.get("quantization_config")
    if not isinstance(settings, dict):
        return None
    by_size = settings.get("load_in_4bit") or settings.get("load_in_8bit")
    return str(settings.get("quant_method") or ("bitsandbytes" if by_size else "unknown method"))


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def check_family(path: str, index: Mapping[str, Any], field: str = "model.path") -> str:
    """The pipeline class of a checkpoint's index; ModelError: it is not supported."""
    family = index.get("_class_name")
    if family not in FAMILIES:
        raise ModelError(
            f"{field}: {path!r} is a {family}; supported are {', '.join(sorted(FAMILIES))}"
        )
    # Here, before a hub's hundred gigabytes are downloaded.
    second = (index.get("transformer_2") or [None])[0]
    if second or index.get("boundary_ratio") is not None or index.get("expand_timesteps"):
        raise ModelError(
            f"{field}: {path!r} is a Wan 2.2 checkpoint (two networks, or a timestep per token); "
            "must be a Wan 2.1 text-to-video checkpoint"
        )
    return str(family)


def check_hub(name: str, field: str = "model.path") -> None:
    """Refuse a hub's checkpoint that is not there or not supported, as its index says.

    Raises:
        ModelError: the hub does not answer, has no such checkpoint, or asks for consent first; or
            as `check_family`.
    """
    from huggingface_hub import hf_hub_download

    check_family(name, read_json(Path(download(name, hf_hub_download, INDEX_FILE, field=field))))


def download(
    name: str,
    by: Callable[..., str],
    *arguments: Any,
    field: str = "model.path",
    **settings: Any,
) -> str:
    """What a function of the hub's client gives for a name; ModelError: it cannot be had."""
    problem = hub.why_not_there()
    try:
        return by(name, *arguments, **settings)
    except Exception as error:  # the hub's client, its transports and the disk have many
        raise ModelError(
            f"{field}: {name!r} is no local folder and cannot be downloaded from the hub "
            f"({problem or reason(error)}); fetch it where there is a connection with `hf download "
            f"{name} --local-dir FOLDER` (after `hf auth login` where the model asks for consent) "
            "and name that folder"
        ) from error


def components(index: Mapping[str, Any]) -> list[str]:
    """The parts of a checkpoint that we use: its networks, tokenizers and scheduler."""
    used = ("text_encoder", "tokenizer", "transformer", "unet", "vae", "scheduler")
    return [
        name
        for name, value in index.items()
        if name.startswith(used) and isinstance(value, list) and value[0] is not None
    ]


def component_configs(folder: Path, index: Mapping[str, Any]) -> ConfigFile:
    """The configuration of each network and of the scheduler, by component."""
    configs = {
        name: read_json(folder / name / _config_file(name))
        for name in components(index)
        if not name.startswith("tokenizer")
    }
    return ConfigFile(folder / INDEX_FILE, configs)


def read_json(path: Path, field: str = "model.path") -> ConfigFile:
    """A JSON object; ModelError: the file cannot be read as one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{field}: {path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{field}: {path} must hold a JSON object")
    return ConfigFile(path, data)


def _config_file(name: str) -> str:
    return next((file for kind, file in _CONFIGS.items() if name.startswith(kind)), "config.json")


def _check_component(folder: Path, field: str, needs_weights: bool) -> None:
    config = folder / _config_file(folder.name)
    if not config.is_file():
        # A tokenizer without a configuration of its own has its vocabulary's files instead.
        if not folder.name.startswith("tokenizer") or not folder.is_dir():
            raise ModelError(f"{field}: {config} is missing; the checkpoint is incomplete")
        return
    method = _quantization(read_json(config, field))
    package = _QUANTIZERS.get(method or "")
    if package is not None and not _is_installed(package):
        raise ModelError(
            f"{field}: the weights of {folder} are quantised ({method}), for which the package "
            f"{package} is missing; install it (`pip install {package}`)"
        )
    if not needs_weights or folder.name.startswith(tuple(_CONFIGS)):
        return
    # Variants (model.fp16.safetensors) are not what from_pretrained takes by default.
    candidates = [folder / (stem + ending) for stem in _WEIGHTS for ending in _ENDINGS]
    weights = next((path for path in candidates if path.is_file()), None)
    if weights is None:
        variants = sorted(path.name for path in folder.glob("*.*.safetensors"))
        if variants:
            raise ModelError(
                f"{field}: {folder} holds a variant of the weights only ({variants[0]}); rename "
                "its files to the plain name, or save the pipeline again without a variant"
            )
        raise ModelError(
            f"{field}: {folder} holds no weights (such as {_WEIGHTS[0]}{_ENDINGS[0]}); the "
            "checkpoint is incomplete"
        )
    plain = method is None
    if weights.suffix != ".json":
        _check_weights(weights, field, plain)
        return
    for shard in sorted(set(read_json(weights, field).get("weight_map", {}).values())):
        if not (folder / shard).is_file():
            raise ModelError(
                f"{field}: {folder / shard} is missing, which {weights.name} names; the "
                "checkpoint is incomplete"
            )
        _check_weights(folder / shard, field, plain)


def _check_tokenizer(folder: Path, field: str, must_be: bool) -> None:
    """With an empty vocabulary, all prompts would be alike to transformers."""
    if all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        return
    file = next((folder / name for name in _VOCABULARIES if (folder / name).is_file()), None)
    if file is None and must_be:
        raise ModelError(
            f"{field}: {folder} holds no vocabulary ({', '.join(_VOCABULARIES)}, or vocab.json "
            "with merges.txt); the checkpoint is incomplete"
        )
    if file is None or file.suffix == ".json":
        return
    with file.open("rb") as opened:
        # The other kind is lines of text.
        packages = ("sentencepiece", "protobuf") if opened.read(1) == b"\n" else ("tiktoken",)
    for package in packages:
        if not _is_installed(package):
            raise ModelError(
                f"{field}: {folder} holds its vocabulary as {file.name} alone, for which the "
                f"package {package} is missing; install it (`pip install {package}`), or add the "
                "tokenizer.json of the same model"
            )


def tensor_names(file: Path) -> list[str]:
    """Of a safetensors file; none where it is damaged."""
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length)) if length < file.stat().st_size else {}
    except (OSError, ValueError, struct.error):
        return []
    return [name for name in header if name != "__metadata__"]


def _check_weights(path: Path, field: str, plain: bool = True) -> None:
    """Refuse a damaged file: safetensors' header says its length, torch's is a zip or a pickle.

    With `plain`, bytes in the place of floats are refused too: alone they are no weights.
    """
    if path.suffix != ".safetensors":
        with path.open("rb") as file:
            start = file.read(4)
        if not (zipfile.is_zipfile(path) if start.startswith(b"PK") else start.startswith(b"\x80")):
            raise ModelError(
                f"{field}: {path} is no file of weights, or is damaged; download or copy it again"
            )
        return
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length)) if length < size else {"": {}}
        tensors = {k: v for k, v in header.items() if k != "__metadata__"}
        offsets = [tensor["data_offsets"][1] for tensor in tensors.values()]
    except (OSError, ValueError, struct.error, AttributeError, KeyError) as error:
        raise ModelError(f"{field}: {path} is not a safetensors file, or is damaged") from error
    expected = 8 + length + max(offsets, default=0)
    if size != expected:
        raise ModelError(
            f"{field}: {path} is damaged: it has {size:,} bytes, its header says {expected:,}; "
            "download or copy it again"
        )
    packed = [name for name, tensor in tensors.items() if tensor.get("dtype") in ("I8", "U8")]
    if plain and packed:
        raise ModelError(
            f"{field}: {path} holds {len(packed):,} tensors of bytes, such as {packed[0]!r}, but "
            "its config.json has no quantization_config that says how to read them as weights"
        )

"""LoRA adapters on a policy's network: their targets, fresh ones, trained ones.

Trained ones may be of any trainer whose names `load_lora_weights` of diffusers' pipeline knows.

Left out: writing them (`export.py`), FLUX control adapters, and adapters of text encoders.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from treegrpo.config import ModelConfig
from treegrpo.models.folder import ModelError, loading, lora_file
from treegrpo.models.policy import Policy

_ADAPTER = "default"  # the name that diffusers and peft give the only one
_TOLD = 300  # letters of a library's message
_NAMED = 3  # of the tensors that a message is about


def check_lora_targets(policy: Policy, targets: Sequence[str]) -> None:
    """Refuse names that no layer has, before weights are read; the ModelError has similar ones."""
    layers = [
        name
        for name, module in policy.checkpoint.without_weights(policy.network_name).named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d)
    ]
    # Blocks are alike: their names without numbers, each once.
    kinds = list(dict.fromkeys(re.sub(r"^.*\.\d+\.(?=[a-z])", "", name) for name in layers))
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            near = difflib.get_close_matches(target, kinds, n=3, cutoff=0.3) or kinds[:5]
            raise ModelError(
                f"model.lora_targets: got {target!r}, which no linear or convolutional layer "
                f"of the {policy.network_name} is named; there are {', '.join(near)}, ..."
            )


def add_lora(policy: Policy, model: ModelConfig) -> None:
    """Freeze the network and put trainable float32 LoRA weights on it.

    Raises:
        ModelError: peft has no adapter for a target.
    """
    network: Any = policy.network
    network.requires_grad_(False)
    _add_adapter(network, policy, model)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _add_adapter(network: Any, policy: Policy, model: ModelConfig) -> None:
    from peft import LoraConfig

    targets = list(model.lora_targets or policy.lora_targets)
    adapter = LoraConfig(
        r=model.lora_rank,
        lora_alpha=model.lora_alpha or 2 * model.lora_rank,
        init_lora_weights="gaussian",
        target_modules=targets,
    )
    try:
        network.add_adapter(adapter, _ADAPTER)
    except ValueError as error:
        raise ModelError(
            f"model.lora_targets: got {targets} with lora_rank {model.lora_rank}, on which no "
            f"adapter can be put: {error}"
        ) from error


def start_lora(policy: Policy, model: ModelConfig) -> None:
    """Let the adapters of `add_lora` begin as those of `model.lora_path`.

    Raises:
        ModelError: as `check_lora_start`.
    """
    starts = check_lora_start(policy, model)
    for name, module in _adapted(policy.network).items():
        down, up = starts[name]
        with torch.no_grad():
            module.lora_A[_ADAPTER].weight.copy_(down)
            module.lora_B[_ADAPTER].weight.copy_(up / module.scaling[_ADAPTER])


def check_lora_start(policy: Policy, model: ModelConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """Refuse LoRA weights to start from, before the network's are read, that are not as trained.

    Returns:
        By layer its two halves, the second times the scale.

    Raises:
        ModelError: the rank or the layers differ from the configuration's, or as `check_lora`.
    """
    assert model.lora_path is not None
    file, rank = lora_file(model.lora_path), model.lora_rank
    try:
        network, state = check_lora(policy, file)
    except ModelError as error:
        told = str(error).removeprefix("model.path: ")
        raise ModelError(f"model.lora_path: {told}") from error
    starts = {}
    for name, module in _adapted(network).items():
        (scale,) = module.scaling.values()
        down, up = (state[f"{policy.network_name}.{name}.lora_{half}.weight"] for half in "AB")
        starts[name] = down, up * scale
    if wrong := [name for name, (down, _) in starts.items() if len(down) != rank]:
        ranks = sorted({len(starts[name][0]) for name in wrong})
        raise ModelError(
            f"model.lora_rank: got {rank}; must be that of {file} (model.lora_path), which has "
            f"{' and '.join(map(str, ranks))} on {len(wrong):,} layers, such as {wrong[0]}"
        )
    network = policy.checkpoint.without_weights(policy.network_name)
    _add_adapter(network, policy, model)
    wanted, targets = list(_adapted(network)), list(model.lora_targets or policy.lora_targets)
    without = [name for name in wanted if name not in starts]
    left_out = [name for name in starts if name not in wanted]
    for names, problem in (
        (without, f"of which {file} (model.lora_path) has no weights for"),
        (left_out, f"which leaves out, of those that {file} (model.lora_path) has weights for,"),
    ):
        if names:
            raise ModelError(
                f"model.lora_targets: got {targets}, {problem} {len(names):,} layers, such as "
                f"{names[0]}; must name the layers of these weights"
            )
    return starts


def _adapted(network: Any) -> dict[str, Any]:
    """The layers that have adapters, by name."""
    return {name: one for name, one in network.named_modules() if getattr(one, "lora_A", None)}


def starts_as_base(policy: Policy) -> bool:
    """Whether the network with its adapters still is the network without them."""
    return not any(p.any() for n, p in policy.network.named_parameters() if ".lora_B." in n)


def check_lora(policy: Policy, file: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    """Refuse LoRA weights, before the network's are read, unless each tensor finds its place.

    Returns:
        The network with adapters like theirs, on the meta device; and the weights by diffusers'
        names.

    Raises:
        ModelError: some do not, of which a few are named: those of text encoders, of another
            network, of another kind than LoRA, of other sizes, or without their other half.
    """
    prefix = policy.network_name
    network: Any = policy.checkpoint.without_weights(prefix)
    with loading(file):
        tensors = load_file(file)
    names = list(tensors)
    if not names:
        raise ModelError(f"model.path: {file} holds no tensors")

    def refuse(which: Iterable[str], why: str) -> NoReturn:
        some = sorted(which)
        shown = ", ".join(some[:_NAMED]) + ", ..." * (len(some) > _NAMED)
        raise ModelError(
            f"model.path: {len(some):,} of the {len(names):,} tensors in {file} {why}: {shown}; "
            f"all must be LoRA weights of the {prefix}"
        )

    if of_encoders := [name for name in names if name.startswith(("lora_te", "text_encoder"))]:
        refuse(of_encoders, "are for text encoders, but prompts are encoded without them")
    # An alpha that is the rank scales nothing.
    is_down = re.compile(r"\.(lora_A|lora_down|lora\.down)\b").search
    ranks = {n[: m.start()]: len(tensors[n]) for n in names if (m := is_down(n))}
    # Filled with its number, each is known again under its new name.
    numbers = {n: ranks.get(n.removesuffix(".alpha"), i) for i, n in enumerate(names)}
    numbered = {n: torch.full_like(t, numbers[n], dtype=torch.float32) for n, t in tensors.items()}
    with _reading(file, policy):
        state, *settings = _as_diffusers(policy, network, file)
        renamed, *_ = _as_diffusers(policy, network, numbered)
    origin = {name: names[int(tensor.flatten()[0])] for name, tensor in renamed.items()}
    no_place = f"have no place on the {prefix} of {policy.checkpoint.folder}"
    dropped = set(names) - set(origin.values())
    if dropped := {n for n in dropped if not n.endswith("alpha") and tensors[n].any()}:
        refuse(dropped, no_place)
    layers = {f"{prefix}.{name}" for name, _ in network.named_modules()}
    if strays := [name for name in state if re.split(r"\.lo(?:ra|kr)_", name)[0] not in layers]:
        refuse({origin[name] for name in strays}, no_place)
    before = set(network.state_dict())
    with _reading(file, policy):
        _put(network, prefix, state, *settings)
    (adapter,) = network.peft_config
    after = [n for n in network.state_dict() if n not in before and f".{adapter}" in n]
    placed = {f"{prefix}.{name.replace(f'.{adapter}', '')}" for name in after}
    if strays := [name for name in state if name not in placed]:
        refuse({origin[name] for name in strays}, no_place)
    if missing := [name for name in placed - set(state) if not name.endswith(".bias")]:
        raise ModelError(
            f"model.path: {file} lacks {len(missing):,} tensors that belong with those it has, "
            f"among them {min(missing)!r}"
        )
    return network, state


@contextmanager
def _reading(file: Path, policy: Policy) -> Iterator[None]:
    """As `loading`, in one line: these libraries name every tensor that they do not like."""
    try:
        yield
    except Exception as error:
        sizes = re.findall(r"size mismatch for .*", str(error))
        told = sizes[0] if sizes else f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ModelError(
            f"model.path: {file} cannot be read as LoRA weights of the {policy.network_name} of "
            f"{policy.checkpoint.folder}: {told[:_TOLD]}{f' ({len(sizes)} such)' if sizes else ''}"
        ) from error


def _as_diffusers(
    policy: Policy, network: Any, source: Path | dict[str, Tensor]
) -> tuple[dict[str, Tensor], Any, Any]:
    """Tensors by diffusers' names, with the trainer's alphas and metadata where it has some."""
    from diffusers.utils import convert_unet_state_dict_to_peft

    given: str | dict[str, Tensor] | Path = source
    name = None
    if isinstance(source, Path):
        given, name = str(source.parent), source.name
    state, *alphas, metadata = policy.checkpoint.pipeline_class().lora_state_dict(
        given,
        weight_name=name,
        unet_config=network.config,
        return_alphas=True,
        return_lora_metadata=True,
    )
    if "lora_A" not in next(iter(state), ""):
        state = convert_unet_state_dict_to_peft(state)
    return state, alphas[0] if alphas else None, metadata


def _put(network: Any, prefix: str, state: dict[str, Tensor], alphas: Any, metadata: Any) -> None:
    network.load_lora_adapter(
        state, prefix=prefix, network_alphas=alphas, metadata=metadata, low_cpu_mem_usage=True
    )


def load_lora(policy: Policy, file: Path) -> None:
    """Put LoRA weights that `check_lora` has passed on the network, for sampling."""
    with loading(file):
        converted = _as_diffusers(policy, policy.network, file)
        _put(policy.network, policy.network_name, *converted)


def has_lora(policy: Policy) -> bool:
    """Whether the network has adapters of `add_lora`."""
    return _ADAPTER in getattr(policy.network, "peft_config", {})


def lora_weights(policy: Policy) -> dict[str, Any]:
    """The adapters' weights by diffusers' names, times alpha / rank, which loaders take to be 1."""
    from peft.utils import get_peft_model_state_dict

    network: Any = policy.network
    config = network.peft_config[_ADAPTER]
    return {
        name: weight * (config.lora_alpha / config.r) if ".lora_B." in name else weight
        for name, weight in get_peft_model_state_dict(network).items()
    }

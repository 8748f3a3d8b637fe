"""LoRA weights of other trainers: as diffusers' own pipeline takes them, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from packaging.version import Version
from safetensors.torch import save_file
from tiny_checkpoints import Case, cases
from torch import Tensor

from treegrpo.config import ModelConfig
from treegrpo.models.components import Components
from treegrpo.models.folder import ModelError
from treegrpo.models.opening import load_policy, open_policy

CPU = torch.device("cpu")
Tensors = dict[str, Tensor]
SD1, SDXL, SD3 = "Stable Diffusion 1.5", "Stable Diffusion XL", "Stable Diffusion 3.5"


def case(name: str) -> Case:
    return next(case for case in cases() if case.name == name)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Of a family, each built once."""
    built: dict[str, Path] = {}

    def build(name: str) -> Path:
        if name not in built:
            built[name] = tmp_path_factory.mktemp("base")
            case(name).build(built[name])
        return built[name]

    return build


def network_of(base: Path) -> tuple[str, Any]:
    components = Components.of(base)
    name = "unet" if "unet" in components.configs else "transformer"
    return name, components.without_weights(name)


def halves(network: Any, layer: str, rank: int = 2) -> tuple[Tensor, Tensor]:
    """Random ones of a linear layer."""
    weight = network.get_submodule(layer).weight
    generator = torch.Generator().manual_seed(len(layer))
    down = torch.randn(rank, weight.shape[1], generator=generator)
    return down, torch.randn(weight.shape[0], rank, generator=generator)


def by_diffusers(base: Path, layers: list[str]) -> Tensors:
    prefix, network = network_of(base)
    tensors = {}
    for layer in layers:
        down, up = halves(network, layer)
        tensors[f"{prefix}.{layer}.lora_A.weight"] = down
        tensors[f"{prefix}.{layer}.lora_B.weight"] = up
    return tensors


def by_trainer(base: Path, layers: Mapping[str, str], alpha: float | None) -> Tensors:
    """With kohya's endings; `layers` is from diffusers' names to the trainer's."""
    _, network = network_of(base)
    tensors = {}
    for layer, name in layers.items():
        down, up = halves(network, layer)
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = down, up
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def written(base: Path, folder: Path, tensors: Tensors) -> ModelConfig:
    folder.mkdir(exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", {"format": "pt"})
    stored = json.loads((base / "sampling.json").read_text())
    sampling = stored | {"base_model": str(base), "steps": 4}
    (folder / "sampling.json").write_text(json.dumps(sampling))
    return ModelConfig(path=str(folder), embedding_cache=None)


def changes(network: Any) -> Tensors:
    """Of the weights, by layer."""
    return {
        name: module.get_delta_weight(module.active_adapters[0])
        for name, module in network.named_modules()
        if hasattr(module, "get_delta_weight")
    }


BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
OURS_TO_THEIRS = {
    SD1: {
        f"{BLOCK}.attn1.to_q": f"lora_unet_{BLOCK}_attn1_to_q".replace(".", "_"),
        f"{BLOCK}.attn2.to_out.0": f"lora_unet_{BLOCK}_attn2_to_out_0".replace(".", "_"),
        f"{BLOCK}.ff.net.2": f"lora_unet_{BLOCK}_ff_net_2".replace(".", "_"),
    },
    SDXL: {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (
            "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
        )
    },
    "FLUX.1 dev": {
        "transformer_blocks.0.attn.to_out.0": "lora_unet_double_blocks_0_img_attn_proj",
        "transformer_blocks.0.ff.net.0.proj": "lora_unet_double_blocks_0_img_mlp_0",
    },
    "Wan 2.1": {"blocks.0.attn1.to_q": "diffusion_model.blocks.0.self_attn.q"},
    "Qwen-Image": {"transformer_blocks.0.attn.to_q": "lora_unet_transformer_blocks_0_attn_to_q"},
}


@pytest.mark.parametrize("name", OURS_TO_THEIRS)
@pytest.mark.parametrize("alpha", [None, 1.0])
def test_other_trainers_weights_are_diffusers(
    name: str, alpha: float | None, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    if name == "Qwen-Image" and alpha is None and Version(diffusers.__version__) < Version("0.42"):
        pytest.skip("this diffusers cannot read them, so we refuse them")
    base = checkpoint(name)
    tensors = by_trainer(base, OURS_TO_THEIRS[name], alpha)
    policy = load_policy(written(base, tmp_path / "lora", tensors), device=CPU)
    pipeline = case(name).pipeline(base)
    pipeline.load_lora_weights(str(tmp_path / "lora"))
    expected = changes(getattr(pipeline, policy.network_name))
    assert set(expected) == set(OURS_TO_THEIRS[name])
    assert all(change.abs().max() > 0.1 for change in expected.values())
    torch.testing.assert_close(changes(policy.network), expected)


def _rename(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def _add(*names: str, value: float = 1.0) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.full((2, 2), value) for name in names}


def _wide(tensors: Tensors) -> Tensors:
    return {n: torch.ones(2, 5) if "lora_A" in n else t for n, t in tensors.items()}


def _without(ending: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if not n.endswith(ending)}


SD3_LAYERS = [f"transformer_blocks.{i}.attn.{kind}" for i in range(2) for kind in ("to_q", "to_v")]
DEEPER = _rename("transformer_blocks.1", "transformer_blocks.7")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_rename("transformer.", "unet."), ["8 of the 8 tensors", "have no place on the transf"]),
        (_rename("transformer.", ""), ["8 of the 8 tensors", "have no place on the transformer"]),
        (
            DEEPER,
            ["4 of the 8 tensors", "no place on", "blocks.7.attn.to_q.lora_A.weight, ", "..."],
        ),
        (_add("transformer.norm.weight"), ["1 of the 9", "no place on", ": transformer.norm.wei"]),
        (_add("transformer.proj_out.alpha"), ["1 of the 9", "no place on", ".proj_out.alpha; "]),
        (_add("transformer.proj_out.dora_scale"), ["1 of the 9", "no place", "out.dora_scale;"]),
        (_add("transformer.proj_out.diff"), ["1 of the 9", "no place on", "proj_out.diff;"]),
        (_add("text_encoder_2.a.lora_A.weight"), ["1 of the 9", "for text encoders", "_2.a.lora"]),
        (_wide, ["LoRA weights of the transformer of", "size mismatch", "lora_A", "(4 such)"]),
        (_without("1.attn.to_v.lora_B.weight"), ["lacks 1 tensors that", "to_v.lora_B.weight'"]),
        (lambda tensors: {}, ["holds no tensors"]),
    ],
)
def test_weights_without_a_place_are_refused_before_the_networks(
    change: Callable[[Tensors], Tensors],
    words: list[str],
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = checkpoint(SD3)
    model = written(base, tmp_path, change(by_diffusers(base, SD3_LAYERS)))
    monkeypatch.setattr(Components, "read", None)  # calling it would fail
    with pytest.raises(ModelError, match=r"^model\.path: ") as caught:
        open_policy(model, device=CPU)
    for word in (str(tmp_path), *words):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (SD1, _add("lora_te_text_model_a.lora_down.weight"), ["1 of the 10", "text encoders"]),
        (
            SD1,
            _add("lora_unet_a.hada_w1_a"),
            ["cannot be read as LoRA weights of the unet of", "hada_w1_a"],
        ),
        (SD1, _rename("attn1", "attn3"), ["2 of the 9 tensors", "have no place on the unet of"]),
        ("FLUX.1 dev", _add("lora_unet_double_blocks_0_img_mlp_0.diff_b"), ["no place", "diff_b"]),
        ("FLUX.1 dev", _add("transformer.x"), ["tensors", "no place on the transformer of"]),
    ],
)
def test_what_a_conversion_leaves_out_is_refused(
    name: str,
    change: Callable[[Tensors], Tensors],
    words: list[str],
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    base = checkpoint(name)
    tensors = change(by_trainer(base, OURS_TO_THEIRS[name], 1.0))
    with pytest.raises(ModelError, match=r"^model\.path: ") as caught:
        open_policy(written(base, tmp_path, tensors), device=CPU)
    for word in (str(tmp_path), *words):
        assert word in str(caught.value)


def test_what_is_left_out_because_it_is_zero_is_no_matter(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    name = "FLUX.1 dev"
    base = checkpoint(name)
    zero = _add("lora_unet_double_blocks_0_img_mlp_0.diff_b", value=0.0)
    tensors = zero(by_trainer(base, OURS_TO_THEIRS[name], 1.0))
    open_policy(written(base, tmp_path, tensors), device=CPU)

"""The CLIP rewards against their formulas written out, on tiny random checkpoints made here."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from treegrpo.errors import UserError
from treegrpo.rewards import hpsv2
from treegrpo.rewards.aesthetic import Aesthetic
from treegrpo.rewards.clip_score import CLIPScore
from treegrpo.rewards.hpsv2 import HPSv2
from treegrpo.rewards.pickscore import PickScore

SIZE = 28  # of the models' pictures
EMBEDDING = 24
LAYERS, HEADS, WIDTH = 2, 2, 32
CONTEXT = 16
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
REWARDS = ["hpsv2", "clip_score", "aesthetic", "pickscore"]
PROMPTS = ["a cat", "Two CATS  and a dog", "a “cat” &amp; a dog", "a cat", "dog " * 40]


def vocabulary() -> tuple[dict[str, int], list[str]]:
    """Bytes, a few merges and the two special tokens, the last of which has the largest number."""
    letters = sorted(ByteLevel.alphabet())
    merges = ["c a", "ca t</w>", "d o", "do g</w>"]
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}, merges


def architecture(activation: str) -> dict[str, Any]:
    tokens = len(vocabulary()[0])
    half = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "hidden_act": activation,
        "projection_dim": EMBEDDING,
    }
    text = {
        "vocab_size": tokens,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": tokens - 2,
        "eos_token_id": tokens - 1,
        "pad_token_id": tokens - 1,
    }
    return {
        "projection_dim": EMBEDDING,
        "text_config": half | text,
        "vision_config": half | {"patch_size": 14, "image_size": SIZE},
    }


def save_tokenizer(folder: Path) -> None:
    tokens, merges = vocabulary()
    (folder / "vocab.json").write_text(json.dumps(tokens))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder per reward, as one would download it. The aesthetic one holds both its models."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    paths = {}
    for name, activation in [("clip_score", "quick_gelu"), ("pickscore", "gelu")]:
        model = CLIPModel(CLIPConfig(**architecture(activation)))
        for parameter in model.parameters():
            if parameter.ndim > 1:  # enough for pictures to matter
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        model.logit_scale.data.fill_(math.log(98.1))  # 97.6 in bfloat16
        path = paths[name] = folder / name
        model.save_pretrained(path)
        save_tokenizer(path)
        processing = {
            "crop_size": SIZE,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": MEAN.tolist(),
            "image_std": STD.tolist(),
            "resample": 3,
            "size": SIZE,
        }
        (path / "preprocessor_config.json").write_text(json.dumps(processing))

    path = paths["aesthetic"] = folder / "aesthetic"
    shutil.copytree(paths["clip_score"], path)
    widths = [EMBEDDING, 1024, 128, 64, 16, 1]
    predictor = {}
    for number, (before, after) in zip((0, 2, 4, 6, 7), itertools.pairwise(widths), strict=True):
        predictor[f"layers.{number}.weight"] = torch.randn(after, before) / before**0.5
        predictor[f"layers.{number}.bias"] = torch.randn(after)
    torch.save(predictor, path / "sac+logos+ava1-l14-linearMSE.pth")

    path = paths["hpsv2"] = folder / "hpsv2"
    path.mkdir()
    save_tokenizer(path)
    torch.save({"state_dict": open_clip_weights()}, path / "HPS_v2.1_compressed.pt")
    return paths


def open_clip_weights() -> dict[str, torch.Tensor]:
    """Random weights, half precision like the real file's, under open_clip's names."""
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (CONTEXT, WIDTH),
        "token_embedding.weight": (len(vocabulary()[0]), WIDTH),
        "text_projection": (WIDTH, EMBEDDING),
        "visual.class_embedding": (WIDTH,),
        "visual.positional_embedding": ((SIZE // 14) ** 2 + 1, WIDTH),
        "visual.proj": (WIDTH, EMBEDDING),
        "visual.conv1.weight": (WIDTH, 3, 14, 14),
        "logit_scale": (),
    }
    for prefix in ("", "visual."):
        for layer in range(LAYERS):
            block = f"{prefix}transformer.resblocks.{layer}."
            shapes |= {
                f"{block}attn.in_proj_weight": (3 * WIDTH, WIDTH),
                f"{block}attn.in_proj_bias": (3 * WIDTH,),
                f"{block}attn.out_proj.weight": (WIDTH, WIDTH),
                f"{block}attn.out_proj.bias": (WIDTH,),
                f"{block}mlp.c_fc.weight": (4 * WIDTH, WIDTH),
                f"{block}mlp.c_fc.bias": (4 * WIDTH,),
                f"{block}mlp.c_proj.weight": (WIDTH, 4 * WIDTH),
                f"{block}mlp.c_proj.bias": (WIDTH,),
            }
    norms = ["ln_final", "visual.ln_pre", "visual.ln_post"]
    for prefix in ("", "visual."):
        for layer in range(LAYERS):
            norms += [f"{prefix}transformer.resblocks.{layer}.ln_{number}" for number in (1, 2)]
    for norm in norms:
        shapes |= {f"{norm}.weight": (WIDTH,), f"{norm}.bias": (WIDTH,)}
    return {name: torch.randn(shape).half() * 0.2 for name, shape in shapes.items()}


@pytest.fixture
def load(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Callable[..., torch.Tensor]]:
    """Make a reward from its tiny checkpoint; nothing may be asked of the hub."""
    monkeypatch.setattr(hpsv2, "ARCHITECTURE", architecture("gelu"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nonexistent")
    kinds = {"hpsv2": HPSv2, "clip_score": CLIPScore, "pickscore": PickScore}

    def make(name: str, **options: Any) -> Any:
        path = options.pop("path", str(checkpoints[name]))
        if name == "aesthetic":
            return Aesthetic(path, **({"clip_path": str(checkpoints[name])} | options))
        return kinds[name](path, **options)

    return make


def pictures(height: int, width: int, count: int = 5) -> torch.Tensor:
    """Smooth random pictures of 256 levels: float32 [count, 3, height, width]."""
    coarse = torch.rand(count, 3, 4, 5, generator=torch.Generator().manual_seed(height))
    smooth = functional.interpolate(coarse, (height, width), mode="bilinear")
    return (smooth * 255).round() / 255


def cropped(picture: torch.Tensor, margin: Callable[[float], int]) -> np.ndarray[Any, Any]:
    """The shorter side resized to SIZE, the middle cut out, normalized: float32 [3, SIZE, SIZE]."""
    pixels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
    height, width = pixels.shape[:2]
    if width < height:
        size = SIZE, int(SIZE * height / width)
    else:
        size = int(SIZE * width / height), SIZE
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    left, top = (margin((length - SIZE) / 2) for length in size)
    values = np.asarray(image.crop((left, top, left + SIZE, top + SIZE)), np.float32) / 255
    return ((values - MEAN) / STD).transpose(2, 0, 1)


# 2:1 and margins of 3, which halve to 1 or 2 depending on the original; a size that stays; one
# that grows.
SHAPES = [(64, 32), (56, 62), (62, 56), (28, 28), (20, 17)]


@pytest.mark.parametrize(("height", "width"), SHAPES)
@pytest.mark.parametrize("name", ["clip_score", "pickscore"])
def test_scores_are_transformers_logits(
    name: str, height: int, width: int, load: Any, checkpoints: dict[str, Path]
) -> None:
    images = pictures(height, width)
    model = CLIPModel.from_pretrained(checkpoints[name])
    tokens = CLIPTokenizer.from_pretrained(checkpoints[name])(
        PROMPTS, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt"
    )
    pixels = torch.from_numpy(np.stack([cropped(image, math.floor) for image in images]))
    with torch.no_grad():
        logits = model(pixel_values=pixels, **tokens).logits_per_image.diagonal()
    expected = logits if name == "pickscore" else logits / 98.1
    scores = load(name)(images, PROMPTS, None)
    assert scores.dtype == torch.float32 and scores.std() > 0.01 * scores.abs().max()
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_aesthetic_is_laions_formula(
    height: int, width: int, load: Any, checkpoints: dict[str, Path]
) -> None:
    images = pictures(height, width)
    folder = checkpoints["aesthetic"]
    pixels = torch.from_numpy(np.stack([cropped(image, round) for image in images]))
    with torch.no_grad():
        features = CLIPModel.from_pretrained(folder).get_image_features(pixels).pooler_output
    rating = features.double() / features.double().norm(dim=1, keepdim=True)
    predictor = torch.load(folder / "sac+logos+ava1-l14-linearMSE.pth")
    for number in (0, 2, 4, 6, 7):
        weight, bias = (predictor[f"layers.{number}.{part}"] for part in ("weight", "bias"))
        rating = rating @ weight.double().T + bias
    scores = load("aesthetic")(images, PROMPTS, None)
    assert scores.std() > 0.01
    torch.testing.assert_close(scores, rating.squeeze(1).float(), rtol=1e-4, atol=1e-5)


def open_clip_embedding(
    state: dict[str, torch.Tensor], prefix: str, x: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """open_clip's residual blocks on x [N, L, WIDTH]."""

    def normalized(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"])

    for layer in range(LAYERS):
        block = f"{prefix}transformer.resblocks.{layer}."
        attention = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        attention.load_state_dict(
            {
                name: state[f"{block}attn.{name}"]
                for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
            }
        )
        y = normalized(x, f"{block}ln_1")
        x = x + attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        y = normalized(x, f"{block}ln_2")
        y = functional.linear(y, state[f"{block}mlp.c_fc.weight"], state[f"{block}mlp.c_fc.bias"])
        weight, bias = state[f"{block}mlp.c_proj.weight"], state[f"{block}mlp.c_proj.bias"]
        x = x + functional.linear(functional.gelu(y), weight, bias)
    return normalized(x, "visual.ln_post" if prefix else "ln_final")


@torch.no_grad()
def open_clip_cosine(
    state: dict[str, torch.Tensor], pixels: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    state = {name: tensor.float() for name, tensor in state.items()}
    patches = functional.conv2d(pixels, state["visual.conv1.weight"], stride=14).flatten(2).mT
    start = state["visual.class_embedding"].expand(len(pixels), 1, -1)
    x = torch.cat([start, patches], 1) + state["visual.positional_embedding"]
    x = functional.layer_norm(
        x, (WIDTH,), state["visual.ln_pre.weight"], state["visual.ln_pre.bias"]
    )
    image = open_clip_embedding(state, "visual.", x, None)[:, 0] @ state["visual.proj"]
    x = state["token_embedding.weight"][tokens] + state["positional_embedding"]
    mask = torch.full((CONTEXT, CONTEXT), -math.inf).triu(1)
    x = open_clip_embedding(state, "", x, mask)
    text = x[torch.arange(len(x)), tokens.argmax(1)] @ state["text_projection"]
    return functional.cosine_similarity(image, text)


@pytest.mark.parametrize(("height", "width"), [*SHAPES, (28, 20)])
def test_hpsv2_is_open_clips_cosine(
    height: int, width: int, load: Any, checkpoints: dict[str, Path]
) -> None:
    """Pictures fit whole into a black square; Pillow resizes floats as torchvision does tensors."""
    images = pictures(height, width)
    scale = SIZE / max(height, width)
    size = round(width * scale), round(height * scale)
    left, top = (SIZE - size[0]) // 2, (SIZE - size[1]) // 2
    canvas = np.zeros((len(images), 3, SIZE, SIZE), np.float32)
    for index, image in enumerate(images.numpy()):
        for channel, plane in enumerate(image):
            resized = np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BICUBIC))
            canvas[index, channel, top : top + size[1], left : left + size[0]] = resized
    pixels = torch.from_numpy((canvas - MEAN[:, None, None]) / STD[:, None, None])

    folder = checkpoints["hpsv2"]
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    texts = ["a cat", "two cats and a dog", 'a "cat" & a dog', "a cat", "dog " * 40]
    tokens = torch.zeros(len(texts), CONTEXT, dtype=torch.long)  # open_clip fills with zeros
    for row, text in zip(tokens, texts, strict=True):
        numbers = tokenizer(text, truncation=True, max_length=CONTEXT).input_ids
        row[: len(numbers)] = torch.tensor(numbers)
    state = torch.load(folder / "HPS_v2.1_compressed.pt")["state_dict"]
    expected = open_clip_cosine(state, pixels, tokens)
    scores = load("hpsv2")(images, PROMPTS, None)
    assert scores.dtype == torch.float32 and scores.std() > 0.01
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", REWARDS)
def test_scores_belong_to_their_pictures(name: str, load: Any) -> None:
    """Neither the order, nor the batches, nor less than half a level of a pixel changes a score."""
    images = pictures(40, 30)
    scores = load(name)(images, PROMPTS, None)
    order = [3, 0, 4, 2, 1]
    shuffled = load(name, batch_size=2)(images[order], [PROMPTS[row] for row in order], None)
    torch.testing.assert_close(shuffled, scores[order], rtol=1e-5, atol=1e-5)
    nudged = (images + 0.4 / 255).clamp(0, 1)
    torch.testing.assert_close(load(name, device="cpu")(nudged, PROMPTS, None), scores)
    reward = load(name)
    swapped = reward(images, PROMPTS[1:] + PROMPTS[:1], None)
    assert torch.equal(swapped, reward(images, PROMPTS, None)) == (name == "aesthetic")


@pytest.mark.parametrize("name", REWARDS)
def test_bfloat16_is_close(name: str, load: Any) -> None:
    images = pictures(40, 30)
    exact = load(name)(images, PROMPTS, None)
    rounded = load(name, dtype="bfloat16")(images, PROMPTS, None)
    assert rounded.dtype == torch.float32
    scale = {"pickscore": 98.1, "aesthetic": 2.0}.get(name, 1.0)
    assert 0 < (rounded - exact).abs().max() < 0.02 * scale


def test_pickscores_scale_is_not_rounded(load: Any, checkpoints: dict[str, Path]) -> None:
    images = pictures(40, 30)
    path = str(checkpoints["pickscore"])
    cosine = load("clip_score", path=path, dtype="bfloat16")(images, PROMPTS, None)
    scores = load("pickscore", dtype="bfloat16")(images, PROMPTS, None)
    torch.testing.assert_close(scores, 98.1 * cosine, rtol=1e-5, atol=1e-5)


REPOSITORIES = {
    "hpsv2": "xswu/HPSv2",
    "clip_score": "openai/clip-vit-large-patch14",
    "aesthetic": "trl-lib/ddpo-aesthetic-predictor",
    "pickscore": "yuvalkirstain/PickScore_v1",
}


@pytest.mark.parametrize("name", REWARDS)
def test_a_missing_checkpoint_says_where_to_get_it(name: str, load: Any, tmp_path: Path) -> None:
    repository = re.escape(REPOSITORIES[name])
    advice = f"`hf download {repository} --include .* --local-dir FOLDER` and set the option path"
    with pytest.raises(UserError, match=rf"^option path: '{repository}' cannot be .*{advice}"):
        load(name, path=None)
    with pytest.raises(UserError, match=rf"^option path: 'no/such' is no local .*{advice}"):
        load(name, path="no/such")
    gone = str(tmp_path / "gone")
    with pytest.raises(UserError, match=rf"^option path: '{gone}' does not exist; .*{advice}"):
        load(name, path=gone)
    with pytest.raises(UserError, match=f"^option path: .*{tmp_path}"):
        load(name, path=str(tmp_path))


@pytest.mark.parametrize("name", REWARDS)
def test_the_customary_checkpoint_comes_from_the_hub(
    name: str, load: Any, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        asked.append(repository)
        return str(checkpoints[name])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    images = pictures(30, 30)
    expected = load(name)(images, PROMPTS, None)
    options = {"path": None} | ({"clip_path": None} if name == "aesthetic" else {})
    assert torch.equal(load(name, **options)(images, PROMPTS, None), expected)
    clip = ["openai/clip-vit-large-patch14"] * (name == "aesthetic")
    assert asked == [REPOSITORIES[name], *clip]


def test_a_single_file_will_do(load: Any, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    images = pictures(30, 30)
    for name, file in [
        ("hpsv2", "HPS_v2.1_compressed.pt"),
        ("aesthetic", "sac+logos+ava1-l14-linearMSE.pth"),
    ]:
        scores = load(name, path=str(checkpoints[name] / file))(images, PROMPTS, None)
        assert torch.equal(scores, load(name)(images, PROMPTS, None))
    # The tokenizer is then still to be found.
    alone = shutil.copy(checkpoints["hpsv2"] / "HPS_v2.1_compressed.pt", tmp_path / "mine.pt")
    with pytest.raises(UserError, match=rf"laion/CLIP-ViT-H-14-.*--local-dir {tmp_path}`$"):
        load("hpsv2", path=str(alone))


def test_incomplete_checkpoints_are_refused(
    load: Any, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """transformers would fill in random weights, or an empty vocabulary."""

    def damaged(name: str, number: int) -> Path:
        return Path(shutil.copytree(checkpoints[name], tmp_path / f"{name}{number}"))

    folder = damaged("clip_score", 0)
    weights = load_file(folder / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"lacks 1 of the weights of CLIPModel, .*'text_projection\.weight'"
    ):
        load("clip_score", path=str(folder))
    folder = damaged("pickscore", 0)
    (folder / "merges.txt").unlink()
    message = (
        r"lacks tokenizer\.json \(or vocab.*`hf download yuvalkirstain/PickScore_v1 --local-dir"
    )
    with pytest.raises(UserError, match=message):
        load("pickscore", path=str(folder))
    folder = damaged("pickscore", 1)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"lacks preprocessor_config\.json; fetch"):
        load("pickscore", path=str(folder))
    file = damaged("hpsv2", 0) / "HPS_v2.1_compressed.pt"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cannot be read as weights .*hub's xswu/HPSv2"):
        load("hpsv2", path=str(file))
    torch.save({"weights": {}}, file)
    with pytest.raises(UserError, match="is no HPSv2 checkpoint"):
        load("hpsv2", path=str(file))
    torch.save({"state_dict": {"logit_scale": torch.tensor(1.0)}}, file)
    with pytest.raises(UserError, match=r"the file lacks \d+ of the weights of CLIPModel"):
        load("hpsv2", path=str(file))
    with pytest.raises(UserError, match=r"is another network than sac\+logos\+ava1"):
        load("aesthetic", path=str(file))
    predictor = {f"layers.{number}.weight": torch.zeros(1, 7) for number in (0, 2, 4, 6, 7)}
    torch.save(
        predictor | {name.replace("weight", "bias"): torch.zeros(1) for name in predictor}, file
    )
    with pytest.raises(UserError, match=r"^option clip_path: .* 24 numbers, .* those of 7"):
        load("aesthetic", path=str(file))


@pytest.mark.parametrize("name", REWARDS)
def test_wrong_options_are_named(name: str, load: Any) -> None:
    with pytest.raises(UserError, match="option dtype: 'float16' is none of float32, bfloat16"):
        load(name, dtype="float16")
    with pytest.raises(UserError, match="option batch_size: 0 is not a positive"):
        load(name, batch_size=0)
    for device in ("gpu", "cuda:77"):
        with pytest.raises(UserError, match=f"option device: got '{device}'[;,]"):
            load(name, device=device)
    with pytest.raises(ValueError, match=re.escape("[5, 1, 30, 30]")):
        load(name)(torch.zeros(5, 1, 30, 30), PROMPTS, None)


def test_the_rewards_import_quickly() -> None:
    names = ", ".join(f"treegrpo.rewards.{name}" for name in REWARDS)
    heavy = "{'torch', 'transformers', 'huggingface_hub', 'PIL'}"
    code = f"import sys, {names}; print({heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"

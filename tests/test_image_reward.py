"""ImageReward on a tiny checkpoint, against what the original package scored with it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from treegrpo.errors import UserError
from treegrpo.rewards import image_reward
from treegrpo.rewards.image_reward import ImageReward, preprocess

# Scores of image-reward 1.5 (transformers 4.36.2, torch 2.13 and 2.15), as printed by
# `python benchmarks/image_reward_parity.py --quick --originals ...`.
RECORDED = [
    -0.872523, 0.151037, -0.271031, 0.119033, 0.086701, -1.350888, -1.090517, -0.820459, -0.273971,
    -0.735458, -0.522467, -0.73748, 0.159434, -0.794636, -0.942835, -1.712783, -0.881025, -0.638828,
    -1.227323, 0.113636, -0.612257, -1.003201, 0.072831, -0.715198,
]  # fmt: skip


@pytest.fixture(scope="module")
def parity() -> ModuleType:
    """The benchmark, which has the pictures, prompts and weights of the recorded scores."""
    path = Path(__file__).parent.parent / "benchmarks" / "image_reward_parity.py"
    spec = importlib.util.spec_from_file_location("image_reward_parity", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def tiny(parity: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    vision = image_reward.VISION | parity.TINY_VISION | {"intermediate_size": 256}
    monkeypatch.setattr(image_reward, "VISION", vision)
    monkeypatch.setattr(image_reward, "TEXT", image_reward.TEXT | parity.TINY_TEXT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def original_shapes() -> dict[str, tuple[int, ...]]:
    """The tiny checkpoint's names and shapes, as the original's classes have them."""
    width, text, inner, positions, vocabulary = 64, 48, 96, 40, 128
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        shapes[f"{name}.bias"] = (outputs,)

    def norm(name: str, size: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (size,)

    vision = "blip.visual_encoder"
    shapes[f"{vision}.cls_token"] = (1, 1, width)
    shapes[f"{vision}.pos_embed"] = (1, 14 * 14 + 1, width)
    shapes[f"{vision}.patch_embed.proj.weight"] = (width, 3, 16, 16)
    shapes[f"{vision}.patch_embed.proj.bias"] = (width,)
    norm(f"{vision}.norm", width)
    for index in range(2):
        block = f"{vision}.blocks.{index}"
        norm(f"{block}.norm1", width)
        norm(f"{block}.norm2", width)
        linear(f"{block}.attn.qkv", width, 3 * width)
        linear(f"{block}.attn.proj", width, width)
        linear(f"{block}.mlp.fc1", width, 4 * width)
        linear(f"{block}.mlp.fc2", 4 * width, width)
    embeddings = "blip.text_encoder.embeddings"
    shapes[f"{embeddings}.position_ids"] = (1, positions)
    shapes[f"{embeddings}.word_embeddings.weight"] = (vocabulary, text)
    shapes[f"{embeddings}.position_embeddings.weight"] = (positions, text)
    norm(f"{embeddings}.LayerNorm", text)
    for index in range(2):
        layer = f"blip.text_encoder.encoder.layer.{index}"
        for attention, source in (("attention", text), ("crossattention", width)):
            linear(f"{layer}.{attention}.self.query", text, text)
            linear(f"{layer}.{attention}.self.key", source, text)
            linear(f"{layer}.{attention}.self.value", source, text)
            linear(f"{layer}.{attention}.output.dense", text, text)
            norm(f"{layer}.{attention}.output.LayerNorm", text)
        linear(f"{layer}.intermediate.dense", text, inner)
        linear(f"{layer}.output.dense", inner, text)
        norm(f"{layer}.output.LayerNorm", text)
    linear("blip.vision_proj", width, 256)
    linear("blip.text_proj", text, 256)
    widths = (text, 1024, 128, 64, 16, 1)
    for number, inputs, outputs in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        linear(f"mlp.layers.{number}", inputs, outputs)
    return shapes


@pytest.fixture(scope="module")
def weights(parity: ModuleType) -> dict[str, torch.Tensor]:
    return {
        name: torch.arange(shape[1])[None]
        if name.endswith("position_ids")
        else torch.from_numpy(parity.random_weight(name, shape))
        for name, shape in original_shapes().items()
    }


@pytest.fixture
def folder(parity: ModuleType, weights: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    torch.save(weights, tmp_path / "ImageReward.pt")
    vocabulary = "\n".join(parity.vocabulary(128)) + "\n"
    (tmp_path / "vocab.txt").write_text(vocabulary, encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def images(parity: ModuleType) -> list[torch.Tensor]:
    return [torch.from_numpy(one).permute(2, 0, 1) / 255 for one in parity.pictures()]


def test_scores_are_the_originals(
    parity: ModuleType, folder: Path, images: list[torch.Tensor]
) -> None:
    reward = ImageReward(str(folder))
    alone = [
        reward(image[None], [prompt], None).item()
        for image, prompt in zip(images, parity.prompts(), strict=True)
    ]
    np.testing.assert_allclose(alone, RECORDED, atol=5e-6)


def test_a_picture_scores_the_same_in_any_batch(
    parity: ModuleType, folder: Path, images: list[torch.Tensor]
) -> None:
    count = parity.BATCH
    batch = torch.stack(images[-count:])
    prompts = parity.prompts()[-count:]
    for size in (1, 3, 32):
        scores = ImageReward(str(folder / "ImageReward.pt"), batch_size=size)(batch, prompts, None)
        assert scores.dtype == torch.float32 and not scores.requires_grad
        np.testing.assert_allclose(scores, RECORDED[-count:], atol=5e-6)


def test_bfloat16_rounds_and_no_more(
    parity: ModuleType, folder: Path, images: list[torch.Tensor]
) -> None:
    reward = ImageReward(str(folder), dtype="bfloat16")
    batch = torch.stack(images[-parity.BATCH :])
    scores = reward(batch, parity.prompts()[-parity.BATCH :], None)
    error = (scores - torch.tensor(RECORDED[-parity.BATCH :])).abs()
    assert scores.dtype == torch.float32
    assert 1e-4 < error.max() < 0.15 and error.mean() < 0.05


@pytest.mark.parametrize(("height", "width"), [(224, 224), (224, 260), (259, 224)])
def test_pictures_of_the_networks_height_are_cropped_only(height: int, width: int) -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(256, size=(height, width, 3), dtype=np.uint8)
    pixels = preprocess(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255)[0]
    top, left = round((height - 224) / 2), round((width - 224) / 2)
    crop = picture[top : top + 224, left : left + 224].transpose(2, 0, 1)
    mean = np.array(image_reward.PIXEL_MEAN).reshape(3, 1, 1)
    std = np.array(image_reward.PIXEL_STD).reshape(3, 1, 1)
    np.testing.assert_allclose(pixels, (crop / 255 - mean) / std, atol=1e-6)


def test_other_pictures_are_resized_before_the_crop() -> None:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(256, size=(301, 447, 3), dtype=np.uint8))
    pixels = preprocess(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255)[0]
    # 447 * 224 / 301 = 332.66, cut to 332; (332 - 224) / 2 = 54.
    resized = np.array(picture.resize((332, 224), Image.Resampling.BICUBIC))[:, 54:278]
    mean, std = np.array(image_reward.PIXEL_MEAN), np.array(image_reward.PIXEL_STD)
    expected = ((resized / 255 - mean) / std).transpose(2, 0, 1)
    np.testing.assert_allclose(pixels, expected, atol=1e-6)


def test_a_missing_checkpoint_says_where_to_get_it(folder: Path, tmp_path: Path) -> None:
    (folder / "ImageReward.pt").unlink()
    with pytest.raises(UserError, match=r"ImageReward\.pt.*huggingface\.co/THUDM/ImageReward"):
        ImageReward(str(folder))
    with pytest.raises(UserError, match=r"nowhere.*THUDM/ImageReward"):
        ImageReward(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("damage", ["missing", "empty", "other"])
def test_a_tokenizer_that_is_not_berts_is_refused(folder: Path, damage: str) -> None:
    """transformers itself would go on with five tokens, or with those of another model."""
    vocabulary = folder / "vocab.txt"
    if damage == "missing":
        vocabulary.unlink()
    else:
        vocabulary.write_text("" if damage == "empty" else "[PAD]\n[UNK]\n[CLS]\n[SEP]\ncat\n")
    with pytest.raises(
        UserError, match=r"tokenizer.*vocab\.txt of .*google-bert/bert-base-uncased"
    ):
        ImageReward(str(folder))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", "cannot be read"),
        ("text", "cannot be read"),
        ("list", "a list, no state dict"),
        ("lacks", r"1 missing, such as blip\.visual_encoder\.blocks\.1\.attn\.qkv\.bias"),
        ("adds", r"1 unknown, such as blip\.visual_encoder_m\.cls_token"),
        (
            "shape",
            r"1 of another shape, such as mlp\.layers\.7\.weight \[1, 8\] instead of \[1, 16\]",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    folder: Path, weights: dict[str, torch.Tensor], damage: str, message: str
) -> None:
    file = folder / "ImageReward.pt"
    changed = dict(weights)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    elif damage == "text":
        file.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif damage == "list":
        torch.save(list(weights), file)
    else:
        if damage == "lacks":
            del changed["blip.visual_encoder.blocks.1.attn.qkv.bias"]
        elif damage == "adds":
            changed["blip.visual_encoder_m.cls_token"] = torch.zeros(1, 1, 64)
        else:
            changed["mlp.layers.7.weight"] = torch.zeros(1, 8)
        torch.save(changed, file)
    with pytest.raises(UserError, match=f"ImageReward.pt.*{message}"):
        ImageReward(str(folder))


@pytest.mark.parametrize(
    ("option", "value"), [("device", "cuda:99"), ("dtype", "float16"), ("batch_size", 0)]
)
def test_an_option_that_is_not_allowed_is_refused(option: str, value: str | int) -> None:
    with pytest.raises(UserError, match=rf"option {option}: (got )?{value!r}"):
        ImageReward(**{option: value})  # type: ignore[arg-type]


def test_misshapen_pictures_are_refused(folder: Path) -> None:
    reward = ImageReward(str(folder))
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\], got \[2, 5, 3, 32, 32\]"):
        reward(torch.zeros(2, 5, 3, 32, 32), ["a", "b"], None)
    with pytest.raises(ValueError, match="2 images do not match 1 prompts"):
        reward(torch.zeros(2, 3, 32, 32), ["a"], None)

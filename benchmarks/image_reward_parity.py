"""The built-in ImageReward against the original package: same weights, pictures and prompts.

    python benchmarks/image_reward_parity.py [--originals PYTHON] [--path FOLDER] [--quick]

The original does not import with transformers 5, so it runs in an environment of its own:

    python3.11 -m venv original
    original/bin/pip install torch==2.13.0 torchvision==0.28.0 pillow==12.3.0 \
        transformers==4.36.2 timm==0.6.13 fairscale==0.4.13
    original/bin/pip install --no-deps image-reward==1.5

and PYTHON is then original/bin/python. FOLDER may hold the published ImageReward.pt and
bert-base-uncased's vocab.txt; what it lacks is made up: random weights, saved by the original's own
classes in full size, and a vocabulary of the prompts' letters and words. `--quick` compares two
narrow layers instead and prints the scores that tests/test_image_reward.py holds. The last line is
one JSON object.

Left out: the other reward models (`reward_parity.py`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import types
import zlib
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# "med_config.json" of the published checkpoint; the original takes the width of the pictures'
# features from its vision transformer.
MED_CONFIG: dict[str, Any] = {
    "add_cross_attention": True,
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30524,
}
TINY_VISION = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY_TEXT = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "max_position_embeddings": 40,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "vocab_size": 128,
}
# Width and height: both orders, smaller than 224, equal to it, odd differences to round.
SIZES = [
    (512, 512), (224, 224), (1024, 768), (768, 1024), (640, 480), (333, 500), (100, 80), (225, 224),
    (224, 227), (447, 1000), (32, 32), (1280, 544), (259, 301), (301, 259), (97, 311), (719, 401),
]  # fmt: skip
BATCH = 8  # pictures of one size that are scored in one call
PROMPTS = [
    "a red circle",
    "",
    "two blue squares above a green triangle",
    "A painting of an ox, sitting in a field of flowers; oil on canvas -- highly detailed!",
    "cat",
    "the the the the the the the the the the the the the the the the the the the the the the the "
    "the the the the the the the the the the the the the the the the the the the the the",
    "portrait of a woman (masterpiece:1.2), 8k, f/1.8, 35mm, octane render, trending on the site, "
    "by two famous painters, cinematic lighting, sharp focus, smooth, ultra realistic, intricate",
    "a café in Ångström, naïve déjà vu",
    "supercalifragilisticexpialidocious unknowable wordpieces",
    "一只猫 sitting on a mat \N{CAT FACE} ½ off",
    "a dog [SEP] a [DEC] cat [ENC] [MASK]",
    "don't \"quote\" snow_man's #1 file_name.png @ 50% & more",
    "\ttabs, new\nlines and   spaces ",
    "x" * 120,
    "red blue green yellow black white circle square triangle",
    "a photo of a small yellow square to the left of a big black circle on a white background, "
    "with a green triangle in the top right corner, below it a blue square, minimal flat design",
]


def pictures() -> list[NDArray[np.uint8]]:
    """Waves, edges and noise, uint8 [H, W, 3], different for each picture."""
    drawn = []
    for index, (width, height) in enumerate(SIZES + [(512, 512)] * BATCH):
        rng = np.random.default_rng([7, index])
        y, x = np.mgrid[:height, :width] / max(width, height)
        angle, frequency, phase = rng.uniform(0, np.array([[6.3], [40.0], [6.3]]), (3, 3))
        waves = np.sin(
            frequency * (np.cos(angle) * x[..., None] + np.sin(angle) * y[..., None]) + phase
        )
        inside = np.hypot(x - rng.uniform(0.2, 0.5), y - rng.uniform(0.2, 0.5)) < 0.2
        values = 0.5 + 0.35 * waves + rng.normal(scale=0.1, size=waves.shape)
        values[inside] = rng.uniform(size=3)
        drawn.append((values * 255).clip(0, 255).astype(np.uint8))
    return drawn


def prompts() -> list[str]:
    """One prompt per picture."""
    return [PROMPTS[index % len(PROMPTS)] for index in range(len(SIZES) + BATCH)]


def vocabulary(size: int) -> list[str]:
    """Tokens for WordPiece, `size` in all with the original's two: letters, then common words."""
    letters = sorted(set("".join(PROMPTS).lower()) - set(" \t\n"))
    characters = [character for character in letters if character.isascii()]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]
    tokens += [f"##{character}" for character in characters if character.isalnum()]
    words = "a of the on red blue green circle square triangle cat dog photo known ##able super in"
    tokens += [word for word in words.split() if word not in tokens]
    if len(tokens) > size - 2:
        raise ValueError(f"the vocabulary needs {len(tokens) + 2} tokens, not {size}")
    return tokens + [f"[unused{index}]" for index in range(size - 2 - len(tokens))]


def random_weight(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A weight that depends on its name in the checkpoint, so that a wrong mapping shows.

    Scaled to keep activations near 1, unlike a fresh initialization, whose scores are all equal.
    """
    rng = np.random.default_rng([0, zlib.crc32(name.encode())])
    draw = rng.standard_normal(shape, dtype=np.float32)
    if "norm" in name.lower() and name.endswith("weight"):
        return 1 + 0.1 * draw
    if name.endswith("bias"):
        return 0.1 * draw
    if "embeddings." in name or name.endswith(("pos_embed", "cls_token")):
        return draw
    gain = 2 if any(part in name for part in ("query", "key", "qkv")) else 1
    return np.float32(gain / np.sqrt(np.prod(shape[1:]))) * draw


def run_original(folder: Path) -> None:
    """In the original's interpreter: score what lies in `folder`, the current directory."""
    task = json.loads((folder / "task.json").read_text())
    # Not on the way to a score, and with needs of their own: another model's package, training.
    for name in ("clip", "ImageReward.ReFL"):
        sys.modules[name] = types.ModuleType(name)
    import torch

    try:
        import torchvision
    except RuntimeError:
        # Its compiled part is for another build of torch; its transforms do without.
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
    import ImageReward as package
    from ImageReward.models.BLIP import blip_pretrain, vit

    module: Any = sys.modules["ImageReward.ImageReward"]  # the package's attribute is its class
    if task["tiny"]:
        sizes = {"embed_dim": 64, "depth": 2, "num_heads": 4}
        blip_pretrain.create_vit = lambda *_: (vit.VisionTransformer(**sizes), 64)
        head = module.MLP
        module.MLP = lambda width: head(TINY_TEXT["hidden_size"])
    checkpoint = task["checkpoint"]
    if checkpoint is None:
        model = module.ImageReward(med_config="med_config.json")
        state = {
            name: torch.from_numpy(random_weight(name, tuple(value.shape)))
            if value.is_floating_point()
            else value
            for name, value in model.state_dict().items()
        }
        checkpoint = "ImageReward.pt"
        torch.save(state, checkpoint)
        del model, state
    model = package.load(checkpoint, device="cpu", med_config="med_config.json")
    files = [f"{index}.png" for index in range(len(task["prompts"]))]
    with torch.no_grad():
        scores = [model.score(*pair) for pair in zip(task["prompts"], files, strict=True)]
    pixels = np.stack([model.preprocess(module.Image.open(file)) for file in files])
    np.save("pixels.npy", pixels)
    tokens = model.blip.tokenizer(
        task["prompts"], padding="max_length", truncation=True, max_length=35
    )
    answer = {
        "scores": scores,
        "input_ids": tokens["input_ids"],
        "versions": versions("image-reward", "torch", "torchvision", "transformers", "timm"),
    }
    (folder / "original.json").write_text(json.dumps(answer))


def versions(*names: str) -> dict[str, str]:
    return {name: metadata.version(name) for name in names}


def prepare(folder: Path, path: Path | None, tiny: bool) -> None:
    """Lay out what both read: pictures, prompts, tokenizer and configuration."""
    from PIL import Image

    config = MED_CONFIG | (TINY_TEXT if tiny else {})
    (folder / "med_config.json").write_text(json.dumps(config))
    # transformers prefers a folder of this name to the hub's repository.
    tokenizer = folder / "bert-base-uncased"
    tokenizer.mkdir()
    if path and (path / "vocab.txt").is_file():
        text = (path / "vocab.txt").read_text(encoding="utf-8")
    else:
        text = "\n".join(vocabulary(config["vocab_size"])) + "\n"
    (tokenizer / "vocab.txt").write_text(text, encoding="utf-8")
    for index, picture in enumerate(pictures()):
        Image.fromarray(picture).save(folder / f"{index}.png")
    published = path and (path / "ImageReward.pt").is_file()
    checkpoint = str(path.resolve() / "ImageReward.pt") if path and published else None
    task = {"tiny": tiny, "checkpoint": checkpoint, "prompts": prompts()}
    (folder / "task.json").write_text(json.dumps(task))


def score_here(folder: Path, dtype: str, tiny: bool) -> tuple[Any, list[float]]:
    """The built-in reward and its scores: one call per size, then one for the batch."""
    import torch

    from treegrpo.rewards import image_reward

    if tiny:
        intermediate = 4 * TINY_VISION["hidden_size"]
        image_reward.VISION.update(TINY_VISION, intermediate_size=intermediate)
        image_reward.TEXT.update(TINY_TEXT)
    reward = image_reward.ImageReward(str(folder), dtype=dtype, batch_size=5)
    images = [torch.from_numpy(picture).permute(2, 0, 1) / 255 for picture in pictures()]
    texts = prompts()
    scores = []
    for image, text in zip(images[: len(SIZES)], texts, strict=False):
        scores += reward(image[None], [text], None).tolist()
    scores += reward(torch.stack(images[len(SIZES) :]), texts[len(SIZES) :], None).tolist()
    return reward, scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--originals", metavar="PYTHON", help="interpreter with image-reward 1.5")
    parser.add_argument("--path", type=Path, metavar="FOLDER", help="ImageReward.pt and vocab.txt")
    parser.add_argument("--quick", action="store_true", help="two narrow layers, random weights")
    parser.add_argument("--as-original", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_original:
        run_original(options.as_original)
        return
    if options.quick and options.path:
        parser.error("--quick draws its own weights; leave out --path")
    if not options.originals:
        missing = "an environment with the original, --originals"
        print(f"image_reward: not compared, missing: {missing}")
        print(json.dumps({"missing": missing}))
        return

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, options.path, options.quick)
        subprocess.run(
            [
                os.path.abspath(options.originals),
                os.path.abspath(__file__),
                "--as-original",
                folder,
            ],
            cwd=folder,
            check=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stdout=sys.stderr,
        )
        compare(folder, options.quick)


def compare(folder: Path, tiny: bool) -> None:
    import torch

    from treegrpo.rewards.image_reward import MAX_TOKENS, preprocess

    task = json.loads((folder / "task.json").read_text())
    original = json.loads((folder / "original.json").read_text())
    # What our `path` expects: the checkpoint and the vocabulary in one folder.
    vocab = folder / "bert-base-uncased" / "vocab.txt"
    (folder / "vocab.txt").symlink_to(vocab)
    if task["checkpoint"]:
        (folder / "ImageReward.pt").symlink_to(task["checkpoint"])
    reward, scores = score_here(folder, "float32", tiny)
    reduced = score_here(folder, "bfloat16", tiny)[1]

    wanted = np.array(original["scores"])
    differences = np.abs(np.array(scores) - wanted)
    print(
        f"{'size':>10} {'tokens':>6} {'original':>10} {'treegrpo':>10} {'difference':>10}  prompt"
    )
    tokens = reward._tokenizer(
        prompts(), padding="max_length", truncation=True, max_length=MAX_TOKENS
    )
    rows = zip(pictures(), prompts(), tokens["attention_mask"], wanted, scores, strict=True)
    for picture, prompt, mask, theirs, ours in rows:
        height, width = picture.shape[:2]
        shown = ascii(prompt if len(prompt) <= 40 else prompt[:37] + "...")
        print(
            f"{f'{width}x{height}':>10} {sum(mask):>6} {theirs:>10.6f} {ours:>10.6f} "
            f"{abs(ours - theirs):>10.1e}  {shown}"
        )
    pixels = np.load(folder / "pixels.npy")
    same_pixels = all(
        np.array_equal(preprocess(torch.from_numpy(one).permute(2, 0, 1)[None] / 255)[0], its)
        for one, its in zip(pictures(), pixels, strict=True)
    )
    if tiny:
        print("recorded:", [round(score, 6) for score in original["scores"]])
    result = {
        "weights": "published" if task["checkpoint"] else "tiny random" if tiny else "random",
        "vocabulary_sha256": hashlib.sha256(vocab.read_bytes()).hexdigest()[:16],
        "pictures": len(wanted),
        "original_mean": round(float(wanted.mean()), 6),
        "mean": round(float(np.mean(scores)), 6),
        "max_difference": float(differences.max()),
        "mean_difference": float(differences.mean()),
        "std_of_scores": round(float(wanted.std()), 4),
        "bfloat16_max_difference": round(float(np.abs(np.array(reduced) - wanted).max()), 5),
        "same_pixels": same_pixels,
        "same_tokens": tokens["input_ids"] == original["input_ids"],
        "original_scores": wanted.tolist(),
        "scores": scores,
        "original": original["versions"],
        "treegrpo": versions("torch", "transformers", "pillow"),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

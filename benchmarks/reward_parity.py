"""Each reward model against the package it comes from: same weights, pictures and prompts.

    python benchmarks/reward_parity.py [--quick] [--originals PYTHON] [--output FILE] [REWARD ...]

The weights are random, in the real architecture (--quick: a tiny one), so nothing is downloaded
and no score means anything; only differences do. The originals want older packages than treegrpo
and get an environment of their own, whose interpreter is PYTHON:

    python3.11 -m venv originals
    originals/bin/pip install torch torchvision pillow==12.3.0 transformers==4.46.1 \
        torchmetrics==1.9.0 clip-anytorch==2.6.0 'setuptools<81' clint ftfy timm
    originals/bin/pip install --no-deps hpsv2==1.2.0
    cd originals/lib/python3.11/site-packages
    cp clip/bpe_simple_vocab_16e6.txt.gz hpsv2/src/open_clip/

Pillow is ours: another version resizes a little differently (13.0 moves `aesthetic` by 2e-4). hpsv2
pins versions that nothing here needs, and its wheel lacks that file. A reward whose original is not
installed, as all are without --originals, is reported as such. The last line is one JSON object.

Left out: ImageReward (`image_reward_parity.py`).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Square, wide and tall, shrunk and grown, with odd margins and sides.
SIZES = [
    *[(512, 512)] * 6,
    *[(1024, 1024)] * 2,
    *[(768, 512)] * 2,
    *[(512, 768)] * 2,
    (640, 427),
    (427, 640),
    (224, 224),
    (224, 227),
    (231, 224),
    (301, 200),
    (96, 160),
    (333, 1001),
]
PROMPTS = [
    "a photo of a cat",
    "Two dogs, one brown and one white; playing in the SNOW!",
    "An astronaut’s glove floating in zero-g with “NASA 2049” on the wrist",  # noqa: RUF001
    "a café in Zürich — crème brûlée, naïve art",
    "salt &amp; pepper shakers &lt;3",
    "a   prompt\twith \n odd   spaces  ",
    "the letter Ａ in ﬁne print, 3½ cups",  # noqa: RUF001
    "schÃ¶n, a mis-decoded word",
    "a 🦊 fox, 8k, trending on artstation, f/1.8",
    "東京の夜景",
    "portrait of a knight, don't you think it's what they'd want? we've it, I'm sure, he'll go",
    "x",
    "a red cube left of a blue sphere",
    "highly detailed " * 60 + "castle",
    "12345 apples and 3.14159 pies",
    "a_snake_case_word #hashtag @mention 100%",
    "ΣΊΣΥΦΟΣ pushing a boulder",
    "oil painting of a harbor at dawn",
    "A STREET SIGN THAT READS 'STOP'",
    "",
]
CONTEXT, VOCABULARY = 77, 49408


@dataclass(frozen=True)
class Architecture:
    """A CLIP model's size; `heads` of the vision half, then of the text half."""

    embedding: int
    image: int
    patch: int
    vision: tuple[int, int, int]  # width, layers, heads
    text: tuple[int, int, int]

    def transformers(self, activation: str) -> dict[str, Any]:
        """The arguments of transformers' CLIPConfig."""
        halves = [
            {
                "hidden_size": width,
                "intermediate_size": 4 * width,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "hidden_act": activation,
                "projection_dim": self.embedding,
            }
            for width, layers, heads in (self.vision, self.text)
        ]
        picture = {"image_size": self.image, "patch_size": self.patch}
        return {
            "projection_dim": self.embedding,
            "vision_config": halves[0] | picture,
            "text_config": halves[1] | {"vocab_size": VOCABULARY},
        }


VIT_H_14 = Architecture(1024, 224, 14, (1280, 32, 16), (1024, 24, 16))
VIT_L_14 = Architecture(768, 224, 14, (1024, 24, 16), (768, 12, 12))
TINY_H = Architecture(64, 224, 56, (160, 2, 2), (128, 2, 2))
TINY_L = Architecture(768, 224, 56, (128, 2, 2), (128, 2, 2))


def pictures() -> list[np.ndarray[Any, Any]]:
    """Smooth pictures and noise by turns, uint8 [H, W, 3]."""
    from PIL import Image

    rng = np.random.default_rng(0)
    drawn = []
    for index, (width, height) in enumerate(SIZES):
        grain = (height, width) if index % 3 == 2 else (7, 5)
        noise = rng.integers(0, 256, (*grain, 3), dtype=np.uint8)
        smooth = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        drawn.append(np.asarray(smooth))
    return drawn


def save_tokenizer(folder: Path) -> None:
    """CLIP's vocabulary, which OpenAI's package contains, in transformers' format."""
    from clip.simple_tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(tokenizer.encoder), "utf-8")
    merges = [" ".join(pair) for pair in tokenizer.bpe_ranks]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")


def save_clip(folder: Path, architecture: Architecture, activation: str) -> None:
    """A random CLIP with tokenizer and preprocessing, as the checkpoints on the hub have them."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    CLIPModel(CLIPConfig(**architecture.transformers(activation))).save_pretrained(folder)
    save_tokenizer(folder)
    CLIPImageProcessor().save_pretrained(folder)


# What runs with the originals' interpreter: make a checkpoint in `folder` and score, by the
# original's own functions. What runs with ours: the reward on that checkpoint.


def original_hpsv2(folder: Path, images: list[Any], prompts: list[str], quick: bool) -> list[float]:
    import torch
    from hpsv2 import img_score
    from hpsv2.src.open_clip import create_model_and_transforms, factory

    if quick:
        width, layers, heads = TINY_H.vision
        factory._MODEL_CONFIGS["ViT-H-14"] = {
            "embed_dim": TINY_H.embedding,
            "vision_cfg": {
                "image_size": TINY_H.image,
                "patch_size": TINY_H.patch,
                "width": width,
                "layers": layers,
                "head_width": width // heads,
            },
            "text_cfg": {
                "context_length": CONTEXT,
                "vocab_size": VOCABULARY,
                "width": TINY_H.text[0],
                "layers": TINY_H.text[1],
                "heads": TINY_H.text[2],
            },
        }
    # As img_score.initialize_model does, without the weights that the checkpoint replaces.
    model, _, preprocess = create_model_and_transforms(
        "ViT-H-14", None, precision="amp", light_augmentation=True, output_dict=True
    )
    img_score.model_dict.update(model=model, preprocess_val=preprocess)
    checkpoint = folder / "HPS_v2.1_compressed.pt"
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state}, checkpoint)
    save_tokenizer(folder)
    return [
        float(img_score.score([image], prompt, cp=str(checkpoint))[0])
        for image, prompt in zip(images, prompts, strict=True)
    ]


def our_hpsv2(folder: Path, quick: bool) -> Any:
    from treegrpo.rewards import hpsv2

    if quick:
        hpsv2.ARCHITECTURE = TINY_H.transformers("gelu")
    return hpsv2.HPSv2(str(folder))


def original_clip_score(
    folder: Path, images: list[Any], prompts: list[str], quick: bool
) -> list[float]:
    import torch
    from torchmetrics.multimodal import CLIPScore
    from transformers import CLIPModel, CLIPProcessor

    save_clip(folder, TINY_L if quick else VIT_L_14, "quick_gelu")
    checkpoint = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    metric = CLIPScore(model_name_or_path=lambda: checkpoint)
    scores = []
    for image, prompt in zip(images, prompts, strict=True):
        metric.reset()
        metric.update(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1), prompt)
        scores.append(metric.score.item() / 100)  # before its maximum with 0
    return scores


def our_clip_score(folder: Path, quick: bool) -> Any:
    from treegrpo.rewards.clip_score import CLIPScore

    return CLIPScore(str(folder))


def original_aesthetic(
    folder: Path, images: list[Any], prompts: list[str], quick: bool
) -> list[float]:
    """The steps of improved-aesthetic-predictor's simple_inference.py, which is no package."""
    import clip
    import torch
    from clip.model import CLIP

    size = TINY_L if quick else VIT_L_14
    model = CLIP(
        size.embedding, size.image, size.vision[1], size.vision[0], size.patch,
        CONTEXT, VOCABULARY, size.text[0], size.text[2], size.text[1],
    )  # fmt: skip
    # The package keeps weights in half precision.
    state = {name: tensor.half().float() for name, tensor in model.state_dict().items()}
    torch.save(state, folder / "clip.pt")
    save_tokenizer(folder / "clip")
    sizes = (768, 1024, 128, 64, 16, 1)
    linear = [torch.nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
    for layer in linear:
        layer.weight.data *= 3  # so that ratings differ between pictures, as trained ones do
    dropout = [torch.nn.Dropout(rate) for rate in (0.2, 0.2, 0.1)]
    predictor = torch.nn.Module()
    predictor.layers = torch.nn.Sequential(
        linear[0], dropout[0], linear[1], dropout[1], linear[2], dropout[2], linear[3], linear[4]
    )
    torch.save(predictor.state_dict(), folder / "sac+logos+ava1-l14-linearMSE.pth")
    predictor.eval()

    model, preprocess = clip.load(str(folder / "clip.pt"), device="cpu")
    scores = []
    with torch.no_grad():
        for image in images:
            embedding = model.encode_image(preprocess(image)[None]).numpy()
            embedding = embedding / np.linalg.norm(embedding, axis=-1, keepdims=True)
            scores.append(predictor.layers(torch.from_numpy(embedding).float()).item())
    return scores


def our_aesthetic(folder: Path, quick: bool) -> Any:
    import torch
    from transformers import CLIPConfig, CLIPModel

    from treegrpo.rewards.aesthetic import Aesthetic
    from treegrpo.rewards.hpsv2 import to_transformers

    config = CLIPConfig(**(TINY_L if quick else VIT_L_14).transformers("quick_gelu"))
    state = to_transformers(torch.load(folder / "clip.pt"))
    model = CLIPModel.from_pretrained(None, config=config, state_dict=state)
    model.save_pretrained(folder / "clip")
    return Aesthetic(str(folder), clip_path=str(folder / "clip"))


def original_pickscore(
    folder: Path, images: list[Any], prompts: list[str], quick: bool
) -> list[float]:
    """The steps of the inference example in PickScore's README."""
    import torch
    from transformers import AutoModel, AutoProcessor

    save_clip(folder, TINY_H if quick else VIT_H_14, "gelu")
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    options = {"padding": True, "truncation": True, "max_length": CONTEXT, "return_tensors": "pt"}
    scores = []
    with torch.no_grad():
        for image, prompt in zip(images, prompts, strict=True):
            picture = model.get_image_features(**processor(images=[image], **options))
            text = model.get_text_features(**processor(text=prompt, **options))
            picture = picture / torch.norm(picture, dim=-1, keepdim=True)
            text = text / torch.norm(text, dim=-1, keepdim=True)
            scores.append((model.logit_scale.exp() * (text @ picture.T)[0]).item())
    return scores


def our_pickscore(folder: Path, quick: bool) -> Any:
    from treegrpo.rewards.pickscore import PickScore

    return PickScore(str(folder))


@dataclass(frozen=True)
class Comparison:
    """A reward's original and ours.

    `package` is the original's distribution. `original` makes a checkpoint in a folder and scores
    the pictures; `ours` makes the reward of that folder. `truncates` says whether the original
    reads the beginning of a prompt that is too long, as ours does.
    """

    package: str
    original: Callable[[Path, list[Any], list[str], bool], list[float]]
    ours: Callable[[Path, bool], Any]
    truncates: bool = True


COMPARISONS = {
    "hpsv2": Comparison("hpsv2", original_hpsv2, our_hpsv2),
    "clip_score": Comparison("torchmetrics", original_clip_score, our_clip_score, truncates=False),
    "aesthetic": Comparison("clip-anytorch", original_aesthetic, our_aesthetic),
    "pickscore": Comparison("transformers", original_pickscore, our_pickscore),
}


def prompts_for(comparison: Comparison) -> list[str]:
    return [prompt if comparison.truncates else prompt[:200] for prompt in PROMPTS]


def score_original(name: str, folder: Path, quick: bool) -> None:
    """Print the original's version and scores as JSON."""
    import torch
    from PIL import Image

    torch.manual_seed(0)
    comparison = COMPARISONS[name]
    images = [Image.fromarray(picture) for picture in pictures()]
    try:
        version = importlib.metadata.version(comparison.package)
        started = time.perf_counter()
        scores = comparison.original(folder, images, prompts_for(comparison), quick)
    except ModuleNotFoundError as error:  # that of importlib.metadata is one as well
        print(json.dumps({"missing": error.name}))
        return
    seconds = time.perf_counter() - started
    print(json.dumps({"version": version, "scores": scores, "seconds": seconds}))


def score_ours(comparison: Comparison, folder: Path, quick: bool) -> list[float]:
    import torch

    reward = comparison.ours(folder, quick)
    drawn, prompts = pictures(), prompts_for(comparison)
    scores = [0.0] * len(drawn)
    for shape in {picture.shape for picture in drawn}:
        rows = [index for index, picture in enumerate(drawn) if picture.shape == shape]
        batch = torch.from_numpy(np.stack([drawn[row] for row in rows])).permute(0, 3, 1, 2) / 255
        values = reward(batch, [prompts[row] for row in rows], None)
        for row, value in zip(rows, values, strict=True):
            scores[row] = float(value)
    return scores


def compare(name: str, python: str | None, quick: bool) -> dict[str, Any]:
    comparison = COMPARISONS[name]
    report: dict[str, Any] = {"original_package": comparison.package}
    if python is None:
        return report | {"missing": "an environment with the originals, --originals"}
    with tempfile.TemporaryDirectory() as folder:
        command = [python, __file__, "--score-original", folder, name, *["--quick"] * quick]
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        original: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
        if "missing" in original:
            return report | original
        started = time.perf_counter()
        ours = np.array(score_ours(comparison, Path(folder), quick))
        seconds = time.perf_counter() - started
    theirs = np.array(original["scores"])
    return report | {
        "original_version": original["version"],
        "weights": f"random, {'tiny' if quick else 'full'} size",
        "images": len(ours),
        "original_mean": round(float(theirs.mean()), 6),
        "mean": round(float(ours.mean()), 6),
        "standard_deviation": round(float(ours.std()), 6),
        "max_difference": float(f"{np.abs(ours - theirs).max():.3g}"),
        "original_scores": theirs.tolist(),
        "scores": ours.tolist(),
        "seconds": {"original": round(original["seconds"], 1), "ours": round(seconds, 1)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rewards", nargs="*", metavar="REWARD", help=", ".join(COMPARISONS))
    parser.add_argument("--quick", action="store_true", help="tiny models")
    parser.add_argument("--originals", metavar="PYTHON", help="interpreter with the originals")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON object to add to")
    parser.add_argument("--score-original", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.rewards or list(COMPARISONS)
    if unknown := set(names) - set(COMPARISONS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(COMPARISONS)}")
    if options.score_original:
        score_original(names[0], options.score_original, options.quick)
        return

    print(
        f"{'reward':<12}{'original':<24}{'images':>8}{'its mean':>12}{'ours':>12}"
        f"{'spread':>10}{'largest difference':>20}"
    )
    reports = {}
    for name in names:
        report = reports[name] = compare(name, options.originals, options.quick)
        if "missing" in report:
            package, missing = report["original_package"], report["missing"]
            print(f"{name:<12}{package:<24}not compared, missing: {missing}")
            continue
        original = f"{report['original_package']} {report['original_version']}"
        print(
            f"{name:<12}{original:<24}{report['images']:>8}{report['original_mean']:>12.6f}"
            f"{report['mean']:>12.6f}{report['standard_deviation']:>10.2g}"
            f"{report['max_difference']:>20.2g}",
            flush=True,
        )
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        kept = json.loads(options.output.read_text("utf-8")) if options.output.exists() else {}
        options.output.write_text(json.dumps(kept | reports, indent=2) + "\n", "utf-8")
    print(json.dumps(reports))


if __name__ == "__main__":
    main()

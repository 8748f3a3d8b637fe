"""What the rewards built on CLIP (transformers' own) share: loading, preparing pictures, embedding.

Left out: what a score is made of, which each reward's file says; open_clip, which would need a
torchvision built for the installed torch, and package indexes offer that for CUDA only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treegrpo.errors import UserError, reason
from treegrpo.images import resized, to_uint8
from treegrpo.rewards.checkpoints import Placement, find_checkpoint

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CLIP_FILES = [
    "config.json",
    "preprocessor_config.json",
    "tokenizer*.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "model*.safetensors*",
]


def find_clip(
    path: str | None,
    repository: str,
    option: str = "path",
    *,
    needs: tuple[str, ...] = ("tokenizer", "image_processor"),
) -> Path:
    """The local folder of a CLIP checkpoint in transformers' format; see `find_checkpoint`.

    `needs` is what the folder must hold beside the model.

    Raises:
        UserError: as `find_checkpoint`, or the folder lacks files; the message lists all of them.
    """
    folder = find_checkpoint(path, repository, CLIP_FILES, option)
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        # Some repositories hold nothing but the older format, which the others hold as well.
        folder = find_checkpoint(path, repository, [*CLIP_FILES, "pytorch_model*"], option)
    weights = [*folder.glob("model*.safetensors*"), *folder.glob("pytorch_model*")]
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if "tokenizer" in needs and not has_tokenizer(folder):
        missing.append("tokenizer.json (or vocab.json and merges.txt)")
    if "image_processor" in needs and not (folder / "preprocessor_config.json").is_file():
        missing.append("preprocessor_config.json")
    if not weights:
        missing.append("model.safetensors (or pytorch_model.bin)")
    if missing:
        raise UserError(
            f"option {option}: {folder} lacks {', '.join(missing)}; fetch the checkpoint with "
            f"`hf download {repository} --local-dir {folder}`"
        )
    return folder


def load_model(kind: Any, folder: Path | None, option: str = "path", **arguments: Any) -> Any:
    """A CLIP model of class `kind`, float32, for inference; `arguments` go to `from_pretrained`.

    Raises:
        UserError: the folder holds no such model, or lacks weights, which would stay random.
    """
    import torch

    try:
        model, report = kind.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **arguments
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            f"option {option}: {folder or 'the file'} holds no {kind.__name__} of the expected "
            f"shape ({reason(error)})"
        ) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(
            f"option {option}: {folder or 'the file'} lacks {len(missing)} of the weights of "
            f"{kind.__name__}, among them {missing[0]!r}"
        )
    return model.requires_grad_(False)


def load_tokenizer(folder: Path) -> Any:
    """The CLIP tokenizer in `folder`; UserError: it has none, whose vocabulary would be empty."""
    from transformers import CLIPTokenizer

    if not has_tokenizer(folder):
        raise UserError(
            f"option path: {folder} has no tokenizer; put tokenizer.json, or vocab.json and "
            "merges.txt, of the checkpoint's hub repository there"
        )
    return CLIPTokenizer.from_pretrained(folder)


def has_tokenizer(folder: Path) -> bool:
    """Whether `folder` holds the files of a CLIP tokenizer."""
    alternatives = (["tokenizer.json"], ["vocab.json", "merges.txt"])
    return any(all((folder / name).is_file() for name in names) for names in alternatives)


def process_pictures(processor: Any, pictures: Tensor) -> Tensor:
    """Put pictures, uint8 [N, 3, H, W], through a PIL image processor: float32 [N, 3, h, w]."""
    from PIL import Image

    images = [Image.fromarray(one) for one in pictures.permute(0, 2, 3, 1).cpu().numpy()]
    if processor.do_resize:
        # The processor's own resize depends on the version of Pillow.
        width, height = _fitted(processor.size, pictures.shape[3], pictures.shape[2])
        images = [resized(image, width, height, processor.resample) for image in images]
    pixels: Tensor = processor(images, do_resize=False, return_tensors="pt")["pixel_values"]
    return pixels


def _fitted(size: Any, width: int, height: int) -> tuple[int, int]:
    """Width and height of pictures that a CLIP processor has resized to its `size`."""
    if edge := size.get("shortest_edge"):
        short = min(width, height)
        return int(edge * width / short), int(edge * height / short)
    return size["width"], size["height"]


def load_clip(path: str | None, repository: str) -> tuple[Any, Callable[[Tensor], Tensor], Any]:
    """Model, preprocessing and tokenizer of a CLIP checkpoint; see `find_clip`."""
    from transformers import CLIPImageProcessorPil, CLIPModel

    folder = find_clip(path, repository)
    tokenizer = load_tokenizer(folder)
    try:
        # On PIL, as checkpoints were trained and published: torchvision resizes a bit differently.
        processor = CLIPImageProcessorPil.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(
            f"option path: preprocessor_config.json in {folder} cannot be read ({reason(error)})"
        ) from error
    return load_model(CLIPModel, folder), partial(process_pictures, processor), tokenizer


class Clip:
    """A frozen CLIP model that embeds pictures and prompts in batches.

    Args:
        model: transformers' CLIPModel, or CLIPVisionModelWithProjection where no prompt matters.
            Its weights move on the first call.
        preprocess: makes the model's float32 [N, 3, S, S] of pictures, uint8 [N, 3, H, W].
        tokenizer: transformers' CLIPTokenizer, or None where no prompt matters.
    """

    def __init__(
        self,
        model: Any,
        preprocess: Callable[[Tensor], Tensor],
        tokenizer: Any | None,
        placement: Placement,
    ) -> None:
        import torch

        self.model = model.to(getattr(torch, placement.dtype)).eval()
        self.preprocess, self.tokenizer, self.placement = preprocess, tokenizer, placement

    def similarity(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Cosine of each picture, float [N, 3, H, W] in [0, 1], and its prompt: float32 [N]."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images do not match {len(prompts)} prompts")
        pictures = self.embed_images(images)
        different = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
        texts = self.embed_prompts(list(different), pictures.device)
        return (pictures * texts[[different[prompt] for prompt in prompts]]).sum(1)

    def embed_images(self, images: Tensor) -> Tensor:
        """Float [N, 3, H, W] in [0, 1] (else ValueError) to float32 [N, D], vectors of length 1."""
        import torch

        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must have the shape [N, 3, H, W], got {list(images.shape)}")
        device = self.placement.device_for(images)
        batches = torch.split(images, self.placement.batch_size)
        return torch.cat(
            [self.embed_pixels(self.preprocess(to_uint8(batch)), device) for batch in batches]
        )

    def embed_pixels(self, pixels: Tensor, device: torch.device) -> Tensor:
        """Embeddings of length 1, float32 [N, D], of what `preprocess` made, in one batch."""
        import torch
        from torch.nn import functional

        model = self.model.to(device)
        with torch.no_grad():
            pooled = model.vision_model(pixel_values=pixels.to(device, model.dtype)).pooler_output
            return functional.normalize(model.visual_projection(pooled).float(), dim=1)

    def embed_prompts(self, prompts: list[str], device: torch.device) -> Tensor:
        """Embeddings of length 1, float32 [N, D], on the device of the model."""
        import torch
        from torch.nn import functional

        assert self.tokenizer is not None
        longest = self.model.config.text_config.max_position_embeddings
        settings = {"padding": True, "truncation": True, "max_length": longest}
        embeddings = []
        with torch.no_grad():
            for start in range(0, len(prompts), self.placement.batch_size):
                part = prompts[start : start + self.placement.batch_size]
                tokens = self.tokenizer(part, **settings, return_tensors="pt").to(device)
                pooled = self.model.text_model(**tokens).pooler_output
                embeddings.append(self.model.text_projection(pooled).float())
        return functional.normalize(torch.cat(embeddings), dim=1)

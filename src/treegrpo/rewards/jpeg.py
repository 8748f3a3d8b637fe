"""How well a picture compresses as JPEG, or how badly: two tasks of DDPO (arXiv 2305.13301).

Left out: other qualities than the paper's, and other formats.
"""

from __future__ import annotations

from io import BytesIO

import torch
from PIL import Image
from torch import Tensor

from treegrpo.images import to_uint8
from treegrpo.rewards.registry import Metadata

QUALITY = 95


def jpeg_compressibility(images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
    """Minus the size of each picture's JPEG file at quality 95, in kB (1000 bytes): float32 [N].

    Images are float [N, 3, H, W] in [0, 1]; nothing else is used.
    """
    return -jpeg_incompressibility(images, prompts, metadata)


def jpeg_incompressibility(images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
    """The size of each picture's JPEG file at quality 95, in kB; see `jpeg_compressibility`."""
    sizes = []
    for picture in to_uint8(images).permute(0, 2, 3, 1).cpu().numpy():
        file = BytesIO()
        Image.fromarray(picture).save(file, format="JPEG", quality=QUALITY)
        sizes.append(file.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32)

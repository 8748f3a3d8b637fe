"""Images and videos as tensors: their 256 levels, their frames, and a few of many.

Left out: decoding latents (`models/policy.py`) and drawing pages and figures (`report/`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """Float images in [0, 1] of any shape to uint8, the nearest of 256 levels; NaN becomes 0."""
    return (images.detach().float().nan_to_num() * 255).round().clamp(0, 255).byte()


def as_pictures(images: Tensor) -> Tensor:
    """Images in [0, 1], rounded to the 256 levels that a picture file has: float32, same shape.

    A reward then says the same of them here, on a server and on a file.
    """
    return (images.float() * 255).round().clamp(0, 255) / images.new_tensor(255.0).float()


def middle_frames(images: Tensor) -> Tensor:
    """Images as they are; of videos [..., frames, 3, height, width] the middle frame."""
    return images[:, :, images.shape[2] // 2] if images.dim() == 6 else images


def evenly_spaced(available: int, count: int) -> list[int]:
    """Indices of `count` of so many things (or of all), from the middles of equal parts."""
    count = min(count, available)
    return [(2 * number + 1) * available // (2 * count) for number in range(count)]

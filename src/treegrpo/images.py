"""Images and videos as tensors: their 256 levels, their frames, a few of many; and Pillow's resize.

Left out: decoding latents (`models/policy.py`) and drawing pages and figures (`report/`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image
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


def resized(picture: Image.Image, width: int, height: int, resample: int) -> Image.Image:
    """A picture in another size, the same with every version of Pillow.

    Between its two passes Pillow rounds to 256 levels, so their order shows (up to 7 levels). Since
    13.0 it takes rows before columns where a picture is more than twice as tall as wide. Two calls
    keep the order of all versions before, with which reward models were trained and published.
    """
    return picture.resize((width, picture.height), resample).resize((width, height), resample)

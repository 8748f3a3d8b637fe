"""What travels between a reward's client and its server, written and read.

It is JSON with the pictures as PNG. Any server with these two paths speaks it:

    POST {url}/score   {"version": 1,
                        "images": ["<base64 PNG>", ...],  # 8-bit RGB, all of one size
                        "prompts": ["a red circle", ...],
                        "metadata": [{...}, ...] or null}
                   200 {"scores": [0.5, ...]}             # one finite number per image
                   4xx, 5xx {"error": "why"}
    GET {url}/health
                   200 {"version": 1, "name": "composition", "checks": false}

A server whose reward cannot score every prompt says `"checks": true` and has a third one, which is
asked about all of a run's prompts before it begins:

    POST {url}/check   {"version": 1, "prompts": [...], "metadata": [{...}, ...] or null}
                   200 {"problem": null}                  # or what is wrong with which prompt

Left out: sending it (`treegrpo.rewards.remote`) and answering it (`treegrpo.rewards.server`).
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from io import BytesIO
from typing import TYPE_CHECKING, Any

from treegrpo.rewards.registry import Metadata

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

VERSION = 1
MAX_PIXELS = 2**28  # of one request; 3 GiB as floats


class Refusal(Exception):
    """A request that is answered with an error: its HTTP status, 4xx or 5xx, and why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def to_pixels(images: Tensor) -> NDArray[np.uint8]:
    """Float [N, 3, H, W] in [0, 1] on any device to uint8 [N, H, W, 3], rounded.

    By numpy: a torch operation outside the main thread would start a second team of OpenMP threads,
    and with more threads than cores the main thread's operations, the rollout, take a third longer.
    """
    import numpy as np

    levels = np.rint(images.detach().float().cpu().numpy() * 255).clip(0, 255)
    return np.moveaxis(levels.astype(np.uint8), 1, -1)


def to_png(pixels: NDArray[np.uint8]) -> str:
    """A picture, uint8 [H, W, 3], as PNG in base64."""
    import numpy as np
    from PIL import Image

    file = BytesIO()
    # Higher levels take five times as long for files a tenth smaller.
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, format="PNG", compress_level=1)
    return b64encode(file.getvalue()).decode("ascii")


def read_score(body: bytes, max_batch: int) -> tuple[Tensor, list[str], Metadata]:
    """Images, float32 [N, 3, H, W] in [0, 1], prompts and metadata of a request to score.

    Raises:
        Refusal: names the field that is not as it must be.
    """
    request = _object(body)
    images: Any = request.get("images")
    if not isinstance(images, list) or not images:
        raise Refusal(400, "images: must be a list of at least one PNG in base64")
    if len(images) > max_batch:
        raise Refusal(400, f"images: got {len(images)}; must be at most {max_batch}")
    prompts, metadata = _described(request, len(images))
    return _decoded(images), prompts, metadata


def read_check(body: bytes) -> tuple[list[str], Metadata]:
    """The prompts and metadata, as many or None, of a request to check them."""
    request = _object(body)
    prompts: Any = request.get("prompts")
    if not isinstance(prompts, list):
        raise Refusal(400, "prompts: must be a list of strings")
    return _described(request, len(prompts))


def _object(body: bytes) -> dict[str, Any]:
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is no JSON ({error})") from error
    if not isinstance(request, dict):
        raise Refusal(400, "the body must be a JSON object")
    if request.get("version") != VERSION:
        raise Refusal(400, f"version: got {request.get('version')!r}; must be {VERSION}")
    return request


def _described(request: dict[str, Any], count: int) -> tuple[list[str], Metadata]:
    prompts: Any = request.get("prompts")
    metadata: Any = request.get("metadata")
    if not _is_list_of(prompts, str, count):
        raise Refusal(400, f"prompts: must be a list of {count} strings")
    if metadata is not None and not _is_list_of(metadata, dict, count):
        raise Refusal(400, f"metadata: must be null or a list of {count} objects")
    return prompts, metadata


def _is_list_of(value: Any, kind: type, count: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(element, kind) for element in value)
    )


def _decoded(images: list[Any]) -> Tensor:
    """PNGs in base64 to float32 [N, 3, H, W] in [0, 1]."""
    import numpy as np
    import torch
    from PIL import Image

    pixels = None
    for number, text in enumerate(images):
        field = f"images.{number}"
        try:
            picture = Image.open(BytesIO(b64decode(text, validate=True)), formats=["PNG"])
            width, height = picture.size
            # The size is known before anything is decompressed.
            if len(images) * width * height > MAX_PIXELS:
                what = f"{len(images)} such images have more than {MAX_PIXELS} pixels"
                raise Refusal(413, f"{field}: is {width}x{height}; {what}")
            if picture.mode != "RGB":
                raise Refusal(400, f"{field}: has the mode {picture.mode}; must be RGB")
            if pixels is None:
                pixels = np.empty((len(images), height, width, 3), np.uint8)
            if (height, width) != pixels.shape[1:3]:
                first = f"{pixels.shape[2]}x{pixels.shape[1]}"
                raise Refusal(400, f"{field}: is {width}x{height}; must be {first}, as the first")
            pixels[number] = np.asarray(picture)
        except Image.DecompressionBombError as error:
            raise Refusal(413, f"{field}: {error}") from error
        except Refusal:
            raise
        except Exception as error:  # whatever Pillow trips over
            raise Refusal(400, f"{field}: is no PNG in base64 ({error})") from error
    # Contiguous, as a decoder's images are: reward models may round differently otherwise.
    return torch.from_numpy(pixels).movedim(-1, 1).contiguous().float() / 255

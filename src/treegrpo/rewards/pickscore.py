"""PickScore: which picture people would pick for a prompt (arXiv 2305.01569).

Left out: loading CLIP and embedding, which other rewards do too (`treegrpo.rewards.clip_models`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from treegrpo.rewards.checkpoints import Placement
from treegrpo.rewards.clip_models import CLIP_FILES, Clip, load_clip
from treegrpo.rewards.registry import Metadata

if TYPE_CHECKING:
    from torch import Tensor

REPOSITORY = "yuvalkirstain/PickScore_v1"
CHECKPOINTS = {"path": (REPOSITORY, CLIP_FILES)}


class PickScore:
    """The model's logit, about 17 to 24: a difference d means a preference of sigmoid(d).

    It is the cosine times the checkpoint's learned scale of about 100, as in the published code;
    flow_grpo divides it by 26.

    Args:
        path: PickScore in transformers' format with its tokenizer, a local folder or a hub
            repository; None: yuvalkirstain/PickScore_v1.
        device, dtype, batch_size: those of `Placement`.
    """

    def __init__(
        self,
        path: str | None = None,
        device: str = "auto",
        dtype: str = "float32",
        batch_size: int = 32,
    ) -> None:
        placement = Placement(device, dtype, batch_size)
        model, preprocess, tokenizer = load_clip(path, REPOSITORY)
        self.scale: float = model.logit_scale.exp().item()  # before bfloat16 moves it by a percent
        self.clip = Clip(model, preprocess, tokenizer, placement)

    def __call__(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
        """Score N images, float [N, 3, H, W] in [0, 1]: float32 [N]. `metadata` is not used."""
        return self.scale * self.clip.similarity(images, prompts)

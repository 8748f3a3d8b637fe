"""CLIPScore: how well a picture fits its prompt, as the cosine of their CLIP embeddings.

Left out: loading CLIP and embedding, which other rewards do too (`treegrpo.rewards.clip_models`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from treegrpo.rewards.checkpoints import Placement
from treegrpo.rewards.clip_models import CLIP_FILES, Clip, load_clip
from treegrpo.rewards.registry import Metadata

if TYPE_CHECKING:
    from torch import Tensor

REPOSITORY = "openai/clip-vit-large-patch14"
CHECKPOINTS = {"path": (REPOSITORY, CLIP_FILES)}


class CLIPScore:
    """Cosine similarity of picture and prompt, about 0.1 to 0.4 for real pairs.

    It is neither rescaled nor clipped at 0, as in the training code of Flow-Factory, DiffusionNFT
    (its logits / 100) and MixGRPO. The metric of arXiv 2104.08718 is `2.5 * max(score, 0)`, that of
    torchmetrics `100 * max(score, 0)`.

    Args:
        path: CLIP in transformers' format, a local folder or a hub repository; None:
            openai/clip-vit-large-patch14. MixGRPO uses apple/DFN5B-CLIP-ViT-H-14-378.
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
        self.clip = Clip(*load_clip(path, REPOSITORY), placement)

    def __call__(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
        """Score N images, float [N, 3, H, W] in [0, 1]: float32 [N]. `metadata` is not used."""
        return self.clip.similarity(images, prompts)

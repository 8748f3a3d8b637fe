"""Human Preference Score v2.1: which picture people prefer for a prompt (arXiv 2306.09341).

Left out: version 3, which is another model. Version 2.0 differs in its weights alone.
"""

from __future__ import annotations

import html
import re
from functools import partial
from typing import TYPE_CHECKING, Any

from treegrpo.errors import UserError
from treegrpo.rewards.checkpoints import Placement, find_checkpoint, find_file, read_weights
from treegrpo.rewards.clip_models import Clip, has_tokenizer, load_model, load_tokenizer
from treegrpo.rewards.registry import Metadata

if TYPE_CHECKING:
    from torch import Tensor

REPOSITORY = "xswu/HPSv2"
FILE = "HPS_v2.1_compressed.pt"
CHECKPOINTS = {"path": (REPOSITORY, [FILE])}
TOKENIZER_REPOSITORY = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

# open_clip's ViT-H-14 in transformers' words.
ARCHITECTURE: dict[str, Any] = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "projection_dim": 1024,
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 224,
        "hidden_act": "gelu",
        "projection_dim": 1024,
    },
}


class HPSv2:
    """Cosine of picture and prompt in the preference model, about 0.2 to 0.4.

    The `hpsv2` package gives the same number, in half precision on a GPU.

    Args:
        path: HPS_v2.1_compressed.pt or version 2.0's: a file, its folder or a hub repository; None:
            xswu/HPSv2. The tokenizer (tokenizer.json, or vocab.json and merges.txt) is taken from
            the same folder, else from the hub's laion/CLIP-ViT-H-14-laion2B-s32B-b79K.
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
        file = find_file(path, REPOSITORY, [FILE])
        checkpoint = read_weights(file, f"{FILE} of the hub's {REPOSITORY}")
        folder = file.parent
        if not has_tokenizer(folder):
            names = ["tokenizer*.json", "vocab.json", "merges.txt"]
            folder = find_checkpoint(None, TOKENIZER_REPOSITORY, names, beside=folder)
        tokenizer = load_tokenizer(folder)
        from transformers import CLIPConfig, CLIPModel

        try:
            state = to_transformers(checkpoint["state_dict"])
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"option path: {file} is no HPSv2 checkpoint") from error
        model = load_model(CLIPModel, None, config=CLIPConfig(**ARCHITECTURE), state_dict=state)
        preprocess = partial(fit_pictures, size=model.config.vision_config.image_size)
        self.clip = Clip(model, preprocess, tokenizer, placement)

    def __call__(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
        """Score N images, float [N, 3, H, W] in [0, 1]: float32 [N]. `metadata` is not used."""
        return self.clip.similarity(images, [clean(prompt) for prompt in prompts])


def fit_pictures(pictures: Tensor, size: int) -> Tensor:
    """Letterbox and normalize pictures, uint8 [N, 3, H, W]: float32 [N, 3, size, size]."""
    from torch.nn import functional
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    pixels = pictures.float() / 255
    scale = size / max(pixels.shape[2:])
    height, width = (round(length * scale) for length in pixels.shape[2:])
    if scale != 1:
        # What torchvision has done with tensors since 0.17; values may leave [0, 1].
        pixels = functional.interpolate(
            pixels, (height, width), mode="bicubic", antialias=True, align_corners=False
        )
    top, left = (size - height) // 2, (size - width) // 2
    pixels = functional.pad(pixels, (left, size - width - left, top, size - height - top))
    mean, std = pixels.new_tensor([OPENAI_CLIP_MEAN, OPENAI_CLIP_STD]).view(2, 3, 1, 1).unbind()
    return (pixels - mean) / std


def clean(prompt: str) -> str:
    """A prompt as open_clip's tokenizer reads it: mended Unicode and HTML, in lower case."""
    import ftfy

    mended = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", mended).strip().lower()


# Applied in this order to open_clip's names, without their leading "visual." of the vision half.
RENAMED = [
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.", ".self_attn."),
    (r"^ln_pre\.", "pre_layrnorm."),  # misspelled there
    (r"^ln_post\.", "post_layernorm."),
    (r"^ln_final\.", "final_layer_norm."),
    (r"^conv1\.", "embeddings.patch_embedding."),
    (r"^(class_embedding|token_embedding\.)", r"embeddings.\1"),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
]


def to_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An open_clip ViT's weights under the names of transformers' CLIPModel, without arithmetic."""
    renamed = {}
    for name, tensor in state.items():
        if name == "logit_scale":
            renamed[name] = tensor
        elif name in ("visual.proj", "text_projection"):
            # There a matrix to multiply from the right, here the weight of a linear layer.
            projection = "text_projection" if name == "text_projection" else "visual_projection"
            renamed[f"{projection}.weight"] = tensor.T
        else:
            half = "vision_model" if name.startswith("visual.") else "text_model"
            new = name.removeprefix("visual.")
            for pattern, replacement in RENAMED:
                new = re.sub(pattern, replacement, new)
            if "in_proj_" in new:
                for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                    renamed[f"{half}.{new.replace('in_proj_', f'{part}_proj.')}"] = chunk
            else:
                renamed[f"{half}.{new}"] = tensor
    return renamed

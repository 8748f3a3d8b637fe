"""LAION aesthetic predictor v2: how much people would like a picture, whatever its prompt.

Source: github.com/christophschuhmann/improved-aesthetic-predictor.

Left out: version 1, and predictors on other CLIPs than ViT-L/14.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from treegrpo.errors import UserError
from treegrpo.rewards.checkpoints import Placement, find_file, read_weights
from treegrpo.rewards.clip_models import CLIP_FILES, Clip, find_clip, load_model, process_pictures
from treegrpo.rewards.registry import Metadata

if TYPE_CHECKING:
    from torch import Tensor

REPOSITORY = "trl-lib/ddpo-aesthetic-predictor"
# The predictor's own name, and that of its copy on the hub.
FILES = ["sac+logos+ava1-l14-linearMSE.pth", "aesthetic-model.pth"]
CLIP_REPOSITORY = "openai/clip-vit-large-patch14"
CHECKPOINTS = {"path": (REPOSITORY, FILES), "clip_path": (CLIP_REPOSITORY, CLIP_FILES)}
LINEAR_LAYERS = (0, 2, 4, 6, 7)  # dropout is between the first four; there is no nonlinearity


class Aesthetic:
    """The predicted rating, meant as 1 to 10; most pictures lie between 4 and 7.

    CLIP ViT-L/14 embeds the picture and a small network, in float32 always, rates the embedding of
    length 1. Pictures are cropped as OpenAI's `clip` package does.

    Args:
        path: the predictor's weights, sac+logos+ava1-l14-linearMSE.pth: a file, its folder or a
            hub repository; None: trl-lib/ddpo-aesthetic-predictor.
        device, dtype, batch_size: those of `Placement`.
        clip_path: CLIP ViT-L/14 in transformers' format, a local folder or a hub repository; None:
            openai/clip-vit-large-patch14.
    """

    def __init__(
        self,
        path: str | None = None,
        device: str = "auto",
        dtype: str = "float32",
        batch_size: int = 32,
        clip_path: str | None = None,
    ) -> None:
        placement = Placement(device, dtype, batch_size)
        self.layers = _read_predictor(path)
        folder = find_clip(clip_path, CLIP_REPOSITORY, "clip_path", needs=())
        from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

        model = load_model(CLIPVisionModelWithProjection, folder, "clip_path")
        wanted = self.layers[0][0].shape[1]
        if model.config.projection_dim != wanted:
            raise UserError(
                f"option clip_path: the model in {folder} makes embeddings of "
                f"{model.config.projection_dim} numbers, the predictor rates those of {wanted}"
            )
        size = model.config.image_size
        processor = CLIPImageProcessorPil(size={"shortest_edge": size}, do_center_crop=False)

        def preprocess(pictures: Tensor) -> Tensor:
            pixels = process_pictures(processor, pictures)
            # transformers would round an odd margin down, torchvision rounds to even.
            top, left = (round((length - size) / 2) for length in pixels.shape[2:])
            return pixels[..., top : top + size, left : left + size]

        self.clip = Clip(model, preprocess, None, placement)

    def __call__(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
        """Score N images, float [N, 3, H, W] in [0, 1]: float32 [N]. Nothing else is used."""
        from torch.nn import functional

        rating = self.clip.embed_images(images)
        for weight, bias in self.layers:
            rating = functional.linear(rating, weight.to(rating.device), bias.to(rating.device))
        return rating.squeeze(1)


def _read_predictor(path: str | None) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of the predictor's linear layers."""
    source = f"{FILES[0]} of github.com/christophschuhmann/improved-aesthetic-predictor"
    file = find_file(path, REPOSITORY, FILES)
    state = read_weights(file, source)
    try:
        return [
            (state[f"layers.{layer}.weight"].float(), state[f"layers.{layer}.bias"].float())
            for layer in LINEAR_LAYERS
        ]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"option path: {file} is another network than {source}") from error

"""ImageReward-v1.0 (arXiv 2304.05977): how people would rate a picture for its prompt.

A vision transformer reads the picture, a BERT that attends to it reads the prompt, and a small
head turns the prompt's first token into a score, which is about standard normal on the pictures
that the authors had rated. The networks are transformers' BLIP classes, because the original
package (https://github.com/THUDM/ImageReward) does not import with transformers 5;
`benchmarks/image_reward_parity.py` holds the scores against that package's own.

Left out: the authors' ReFL, which trains through the score's gradient.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treegrpo.errors import UserError
from treegrpo.images import resized, to_uint8
from treegrpo.rewards.checkpoints import Placement, find_checkpoint, find_file, read_weights
from treegrpo.rewards.registry import Metadata

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

REPOSITORY = "THUDM/ImageReward"
CHECKPOINT_FILE = "ImageReward.pt"
CHECKPOINTS = {"path": (REPOSITORY, [CHECKPOINT_FILE])}
TOKENIZER_REPOSITORY = "google-bert/bert-base-uncased"
TOKENIZER_FILES = ["tokenizer.json", "vocab.txt"]

# BLIP's ViT-L/16 at 224 pixels, and BERT base with cross-attention ("med_config.json").
VISION: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
TEXT: dict[str, Any] = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "is_decoder": True,  # gives the layers cross-attention; attention stays bidirectional
}
HEAD_WIDTHS = (1024, 128, 64, 16, 1)

MAX_TOKENS = 35
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
SCORE_MEAN = 0.16717362830052426
SCORE_STD = 1.0333394966054072

# Our prefixes and names, and the checkpoint's.
_VISION_NAMES = (
    ("vision.embeddings.class_embedding", "blip.visual_encoder.cls_token"),
    ("vision.embeddings.position_embedding", "blip.visual_encoder.pos_embed"),
    ("vision.embeddings.patch_embedding.", "blip.visual_encoder.patch_embed.proj."),
    ("vision.post_layernorm.", "blip.visual_encoder.norm."),
    ("vision.encoder.layers.", "blip.visual_encoder.blocks."),
    (".self_attn.qkv.", ".attn.qkv."),
    (".self_attn.projection.", ".attn.proj."),
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
)
_OTHER_NAMES = (("text.", "blip.text_encoder."), ("head.", "mlp.layers."))
# In the checkpoint and not used for scores: a constant, and the heads of BLIP's contrastive loss.
_UNUSED = {
    "blip.text_encoder.embeddings.position_ids",
    "blip.vision_proj.weight",
    "blip.vision_proj.bias",
    "blip.text_proj.weight",
    "blip.text_proj.bias",
}


class ImageReward:
    """Scores pictures as ImageReward-v1.0 does: float32 [N], about -2.5 to 2, higher is better.

    Prompts are cut after 35 tokens. Weights are read here and move to the device when first used.

    Args:
        path: `ImageReward.pt`, a folder or a hub name that holds it; None is THUDM/ImageReward.
            The tokenizer, bert-base-uncased's, is taken from beside it, else from the hub.
        device, dtype, batch_size: those of `Placement`. The head is always float32.
    """

    def __init__(
        self,
        path: str | None = None,
        device: str = "auto",
        dtype: str = "float32",
        batch_size: int = 32,
    ) -> None:
        self.placement = Placement(device, dtype, batch_size)
        import torch

        file = find_file(path, REPOSITORY, [CHECKPOINT_FILE])
        self._tokenizer = _load_tokenizer(file.parent)
        self._network = _load_network(file)
        for name in ("vision", "text"):
            self._network[name].to(getattr(torch, dtype))

    def __call__(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
        """Score N images, float [N, 3, H, W] in [0, 1]: float32 [N]. `metadata` is not used."""
        import torch

        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must have the shape [N, 3, H, W], got {list(images.shape)}")
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images do not match {len(prompts)} prompts")
        device = self.placement.device_for(images)
        self._network.to(device)
        scores = torch.empty(len(prompts), device=device)
        for start in range(0, len(prompts), self.placement.batch_size):
            rows = slice(start, start + self.placement.batch_size)
            scores[rows] = self._score(preprocess(images[rows]).to(device), prompts[rows])
        return scores

    def _score(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        import torch

        settings = {"padding": "max_length", "truncation": True, "max_length": MAX_TOKENS}
        tokens = self._tokenizer(prompts, **settings, return_tensors="pt").to(pixels.device)
        with torch.no_grad():
            picture = self._network["vision"](pixels).last_hidden_state
            text = self._network["text"](
                tokens.input_ids, tokens.attention_mask, encoder_hidden_states=picture
            ).last_hidden_state
            raw: Tensor = self._network["head"](text[:, 0].float())[:, 0]
        return (raw - SCORE_MEAN) / SCORE_STD


def preprocess(images: Tensor) -> Tensor:
    """What the vision transformer reads, bit for bit as the original makes it from PIL images.

    Float [N, 3, H, W] in [0, 1] to the resized centers, float32 [N, 3, size, size] on the CPU.
    """
    import torch

    pictures = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
    cropped = [torch.from_numpy(_resize_and_crop(picture)) for picture in pictures]
    batch = torch.stack(cropped).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (PIXEL_MEAN, PIXEL_STD))
    return (batch.float().contiguous() / 255 - mean) / std


def _resize_and_crop(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Do as torchvision's Resize and CenterCrop do to a PIL image, with their ways of rounding."""
    import numpy as np
    from PIL import Image

    target = VISION["image_size"]
    height, width = picture.shape[:2]
    short = min(height, width)
    width, height = int(target * width / short), int(target * height / short)
    fitted = resized(Image.fromarray(picture), width, height, Image.Resampling.BICUBIC)
    left, top = round((width - target) / 2), round((height - target) / 2)
    return np.array(fitted.crop((left, top, left + target, top + target)))


def _load_tokenizer(folder: Path) -> Any:
    """BERT's tokenizer with BLIP's two tokens, from a folder or, if it has none, from the hub."""
    from transformers import BertTokenizer

    hub = f"https://huggingface.co/{TOKENIZER_REPOSITORY}"
    advice = f"put vocab.txt of {hub} beside {CHECKPOINT_FILE}"
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        try:
            folder = find_checkpoint(None, TOKENIZER_REPOSITORY, TOKENIZER_FILES)
        except UserError as error:
            raise UserError(
                f"option path: {folder} has no tokenizer ({' or '.join(TOKENIZER_FILES)}), and "
                f"that of {TOKENIZER_REPOSITORY} cannot be downloaded; {advice}"
            ) from error
    try:
        tokenizer = BertTokenizer.from_pretrained(folder)
    except Exception as error:  # a damaged file raises almost anything
        raise UserError(
            f"option path: the tokenizer in {folder} cannot be read ({error}); {advice}"
        ) from error
    # No prompt needs them, but one that spells them out is to be read as the original reads it.
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    if len(tokenizer) != TEXT["vocab_size"]:
        raise UserError(
            f"option path: the tokenizer in {folder} has {len(tokenizer)} tokens instead of "
            f"{TEXT['vocab_size']}; {advice}"
        )
    return tokenizer


def _load_network(file: Path) -> Any:
    """The two transformers and the head in evaluation mode, with the weights of a file."""
    weights = read_weights(file, f"of https://huggingface.co/{REPOSITORY}")
    if not isinstance(weights, dict):
        raise UserError(f"option path: {file} holds a {type(weights).__name__}, no state dict")
    network = _build_network()
    expected = {original_name(name): value for name, value in network.state_dict().items()}
    faults = {
        "missing": [name for name in expected if name not in weights],
        "unknown": [name for name in weights if name not in expected and name not in _UNUSED],
        "of another shape": [
            f"{name} {list(weights[name].shape)} instead of {list(value.shape)}"
            for name, value in expected.items()
            if name in weights and weights[name].shape != value.shape
        ],
    }
    told = [f"{len(names)} {fault}, such as {names[0]}" for fault, names in faults.items() if names]
    if told:
        raise UserError(
            f"option path: {file} is not the checkpoint of ImageReward-v1.0; of its "
            f"{len(expected)} weights {'; '.join(told)}"
        )
    renamed = {name: weights[original_name(name)] for name in network.state_dict()}
    network.load_state_dict(renamed, assign=True)
    return network.float().eval().requires_grad_(False)


def _build_network() -> Any:
    """The network without memory for its weights, which assigning them replaces."""
    import torch
    from torch import nn
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    widths = (TEXT["hidden_size"], *HEAD_WIDTHS)
    head = nn.Sequential()
    with torch.device("meta"):
        # Dropout has the other numbers.
        for number, (inputs, outputs) in zip((0, 2, 4, 6, 7), pairwise(widths), strict=True):
            head.add_module(str(number), nn.Linear(inputs, outputs))
        text_config = BlipTextConfig(**TEXT, encoder_hidden_size=VISION["hidden_size"])
        text = BlipTextModel(text_config, add_pooling_layer=False)
        vision = BlipVisionModel(BlipVisionConfig(**VISION))
    # A constant that no state dict holds.
    text.embeddings.position_ids = torch.arange(text_config.max_position_embeddings)[None]
    return nn.ModuleDict({"vision": vision, "text": text, "head": head})


def original_name(name: str) -> str:
    """The checkpoint's name for a weight of our network."""
    for ours, original in _VISION_NAMES if name.startswith("vision.") else _OTHER_NAMES:
        name = name.replace(ours, original)
    return name

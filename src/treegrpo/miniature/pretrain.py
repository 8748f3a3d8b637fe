"""Train the miniature checkpoints on the CPU.

    python -m treegrpo.miniature.pretrain OUT_FOLDER
    python -m treegrpo.miniature.pretrain OUT_FOLDER --kind diffusion

The flow is made from nothing in three stages: the autoencoder; the flow transformer, together with
its text encoders, on pictures with raw captions; and the same on pictures with curated ones. The
result is a Stable Diffusion 3 pipeline.

The diffusion model has the last two stages: a UNet with one text encoder. Its autoencoder,
tokenizer and the text encoder that it begins with are those of the embedded flow. The result is a
Stable Diffusion 1.5 pipeline.

The data imitate what real text-to-image models are trained on: captions are often wrong in one
attribute (a count, a color, a shape, swapped colors, a relation), less often after curation.
The model learns to draw clean scenes, and to trust a caption only as far as the captions deserved.

Left out: the reward, of which nothing is known here.
"""

from __future__ import annotations

import argparse
import copy
import json
import string
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import EMAModel
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import BpeTrainer
from torch.nn import functional
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from treegrpo.miniature.scenes import (
    COLORS,
    COUNT_WORDS,
    IMAGE_SIZE,
    SHAPES,
    Composition,
    all_compositions,
    corruptions,
    place,
    render,
)

RAW_CAPTION_NOISE = 0.4  # the share of wrong captions
CURATED_CAPTION_NOISE = 0.2
CAPTION_DROPOUT = 0.1
MAX_TOKENS = 10
TEXT_WIDTH = 64
SAMPLING = {
    "steps": 10,
    "guidance_scale": 1.0,
    "height": IMAGE_SIZE,
    "width": IMAGE_SIZE,
}
FLOW_SAMPLING = {**SAMPLING, "max_sequence_length": 1}
EMBEDDED_FLOW = Path(__file__).parent / "checkpoint"

# A training loss of a pipeline, clean latents [N, 4, 8, 8] and their captions.
Loss = Callable[[Any, torch.Tensor, list[str]], torch.Tensor]


def draw_data(count: int, seed: int, caption_noise: float) -> tuple[torch.Tensor, list[str]]:
    """Pictures (uint8 [count, 3, size, size]) and their captions, some of them wrong."""
    rng = np.random.default_rng(seed)
    by_kind: dict[str, list[Composition]] = {}
    for composition in all_compositions():
        by_kind.setdefault(composition.kind, []).append(composition)
    pools = list(by_kind.values())
    images = np.empty((count, 3, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    captions = []
    for index in range(count):
        pool = pools[rng.integers(len(pools))]
        shown = told = pool[rng.integers(len(pool))]
        if rng.random() < caption_noise:
            wrong = corruptions(shown)
            told = wrong[rng.integers(len(wrong))]
        images[index] = np.round(render(place(shown, rng)) * 255)
        captions.append(told.prompt)
    return torch.from_numpy(images), captions


def build_tokenizer() -> CLIPTokenizer:
    """A byte-pair tokenizer that knows the grammar's words whole and spells every other text."""
    words = [*COUNT_WORDS, *COLORS, *SHAPES, *(shape + "s" for shape in SHAPES)]
    words += ["and", "above", "below", "left", "right", "of"]
    model = Tokenizer(BPE(end_of_word_suffix="</w>"))
    model.pre_tokenizer = Whitespace()
    trainer = BpeTrainer(
        vocab_size=2000,
        end_of_word_suffix="</w>",
        initial_alphabet=list(string.ascii_lowercase + string.digits + string.punctuation),
        show_progress=False,
    )
    # Every word twice, so that merging goes on until each is one token.
    model.train_from_iterator(words * 2, trainer)
    learned = json.loads(model.to_str())["model"]
    vocabulary: dict[str, int] = learned["vocab"]
    for token in [character + "</w>" for character in string.printable[:-6]]:
        vocabulary.setdefault(token, len(vocabulary))
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[token] = len(vocabulary)
    merges = [tuple(pair) for pair in learned["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def build_pipeline() -> StableDiffusion3Pipeline:
    """The untrained pipeline: every part is the class that Stable Diffusion 3 uses."""
    tokenizer = build_tokenizer()
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH // 2,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
    )
    transformer = SD3Transformer2DModel(
        sample_size=IMAGE_SIZE // 4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=96,
        pooled_projection_dim=TEXT_WIDTH,
        pos_embed_max_size=IMAGE_SIZE // 8,
        qk_norm="rms_norm",
    )
    # diffusers' default schedule spends its last step between sigma 0.001 and 0; ending at 0.1
    # instead gives ten evenly spaced steps of which every one does work.
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, shift_terminal=0.1)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(text_config),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(text_config),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def build_diffusion_pipeline(images: torch.Tensor) -> StableDiffusionPipeline:
    """The untrained UNet, with the embedded flow's autoencoder, tokenizer and a text encoder.

    Every part is the class that Stable Diffusion 1.5 uses.

    Args:
        images: pictures by whose latents the autoencoder's are standardised.
    """
    unet = UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 4,
        in_channels=4,
        out_channels=4,
        # 8 x 8, 4 x 4 and 2 x 2; attention on the middle one, whose 16 places see each other.
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # the number of heads, by an old mistake of diffusers
    )
    # Stable Diffusion 1.5's levels. Trailing timesteps, so that ten steps begin at the noisiest
    # level and none is spent where nothing is left to do.
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )
    return StableDiffusionPipeline(
        unet=unet,
        scheduler=scheduler,
        vae=standardised(AutoencoderKL.from_pretrained(EMBEDDED_FLOW / "vae"), images),
        text_encoder=CLIPTextModel.from_pretrained(EMBEDDED_FLOW / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(EMBEDDED_FLOW / "tokenizer"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
def standardised(vae: AutoencoderKL, images: torch.Tensor) -> AutoencoderKL:
    """The same autoencoder, with latents of mean 0 and deviation 1 in every channel.

    Stable Diffusion 1.5 has a factor for latents and no shift; the 1 x 1 convolutions that it has
    beside its latents hold both here.
    """
    # Without what diffusers notes beside them: its version, and the folder they were read from.
    settings = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    settings |= {"scaling_factor": 1.0, "shift_factor": None}
    result = AutoencoderKL(**{**settings, "use_quant_conv": True, "use_post_quant_conv": True})
    result.load_state_dict(vae.state_dict(), strict=False)
    latents = encode(vae, images)
    std, mean = torch.std_mean(latents, (0, 2, 3))
    # The encoder gives means and log-variances.
    result.quant_conv.weight.copy_(torch.cat([1 / std, torch.ones(4)]).diag()[..., None, None])
    result.quant_conv.bias.copy_(torch.cat([-mean / std, -2 * std.log()]))
    result.post_quant_conv.weight.copy_(std.diag()[..., None, None])
    result.post_quant_conv.bias.copy_(mean)
    return result.eval()


def train_autoencoder(vae: AutoencoderKL, images: torch.Tensor, steps: int) -> None:
    """Fit the autoencoder, then set its latent shift and scale from the data."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    vae.to(memory_format=torch.channels_last)
    vae.train()
    start = time.perf_counter()
    for step in range(steps):
        batch = images[torch.randint(len(images), (64,))].float() / 127.5 - 1
        batch = batch.contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(batch).latent_dist
        error = vae.decode(posterior.sample()).sample - batch
        # The square keeps colors right, the absolute value keeps edges sharp.
        reconstruction = error.square().mean() + 0.5 * error.abs().mean()
        loss = reconstruction + 1e-4 * posterior.kl().mean() / 256
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            seconds = time.perf_counter() - start
            print(f"autoencoder {step} loss {loss.item():.4f} {seconds:.0f} s", flush=True)
    vae.eval()
    latents = encode(vae, images[:4096])
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 4),
        scaling_factor=round(1 / latents.std().item(), 4),
    )


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """The means of the latents of pictures, uint8 [N, 3, size, size]."""
    return torch.cat(
        [vae.encode(part.float() / 127.5 - 1).latent_dist.mean for part in torch.split(images, 256)]
    )


def flow_loss(
    pipeline: StableDiffusion3Pipeline, clean: torch.Tensor, prompts: list[str]
) -> torch.Tensor:
    """Of the rectified flow, at Stable Diffusion 3's levels (arXiv 2403.03206)."""
    embeddings, _, pooled, _ = pipeline.encode_prompt(
        prompts,
        None,
        None,
        do_classifier_free_guidance=False,
        max_sequence_length=FLOW_SAMPLING["max_sequence_length"],
    )
    sigma = torch.sigmoid(torch.randn(len(clean)) * 1.2)[:, None, None, None]
    noise = torch.randn_like(clean)
    prediction = pipeline.transformer(
        hidden_states=(1 - sigma) * clean + sigma * noise,
        encoder_hidden_states=embeddings,
        pooled_projections=pooled,
        timestep=sigma.flatten() * 1000,
    ).sample
    return functional.mse_loss(prediction, noise - clean)


def diffusion_loss(
    pipeline: StableDiffusionPipeline, clean: torch.Tensor, prompts: list[str]
) -> torch.Tensor:
    """Of the predicted noise, with a weight.

    Unweighted, levels at which the scene is still being decided count little beside those at which
    only noise is left to tell from edges. The weight turns the noise's error into the clean
    latents' wherever their signal is more than a tenth of the noise.
    """
    embeddings, _ = pipeline.encode_prompt(prompts, clean.device, 1, False)
    timesteps = torch.randint(pipeline.scheduler.config.num_train_timesteps, (len(clean),))
    noise = torch.randn_like(clean)
    state = pipeline.scheduler.add_noise(clean, noise, timesteps)
    prediction = pipeline.unet(state, timesteps, encoder_hidden_states=embeddings).sample
    alpha_squared = pipeline.scheduler.alphas_cumprod[timesteps]
    signal_to_noise = alpha_squared / (1 - alpha_squared)
    weight = 0.1 / (0.1 + signal_to_noise)
    loss: torch.Tensor = (weight * (prediction - noise).square().mean((1, 2, 3))).mean()
    return loss


def train(
    pipeline: Any,
    loss_of: Loss,
    images: torch.Tensor,
    captions: list[str],
    steps: int,
    batch_size: int,
    learning_rate: float,
    horizon: int,
    out: Path,
) -> None:
    """Fit the network and the text encoders together; keeps an average of the weights.

    The learning rate falls to zero over `horizon` steps; a stage that is followed by another ends
    before that.
    """
    vae = pipeline.vae
    latents = (encode(vae, images) - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    names = ("transformer", "unet", "text_encoder", "text_encoder_2")
    parts = torch.nn.ModuleList(
        pipeline.components[name] for name in names if name in pipeline.components
    )
    parameters = list(parts.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98), fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=horizon, pct_start=0.04, cycle_momentum=False
    )
    average = EMAModel(parameters, decay=0.999)
    parts.train()
    start, losses = time.perf_counter(), []
    order = torch.randperm(len(latents))
    for step in range(steps):
        offset = step * batch_size % (len(latents) - batch_size)
        if offset < batch_size:
            order = torch.randperm(len(latents))
        chosen = order[offset : offset + batch_size]
        keep = torch.rand(batch_size) >= CAPTION_DROPOUT
        prompts = [captions[i] if kept else "" for i, kept in zip(chosen, keep, strict=True)]
        loss = loss_of(pipeline, latents[chosen], prompts)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.step(parameters)
        losses.append(loss.item())
        if step % 100 == 0:
            seconds = time.perf_counter() - start
            print(f"step {step} loss {np.mean(losses[-100:]):.4f} {seconds:.0f} s", flush=True)
        if step % 1000 == 999:
            average.store(parameters)
            average.copy_to(parameters)
            save(pipeline, out)
            average.restore(parameters)
    average.copy_to(parameters)
    parts.eval()
    save(pipeline, out)


def save(pipeline: StableDiffusion3Pipeline | StableDiffusionPipeline, out: Path) -> None:
    """Write a checkpoint in the diffusers folder format, and how it is sampled.

    The UNet's weights are written in half precision, for the package's size.
    """
    sampling = FLOW_SAMPLING
    if isinstance(pipeline, StableDiffusionPipeline):
        sampling = SAMPLING
        unet = copy.deepcopy(pipeline.unet).half()
        pipeline = StableDiffusionPipeline(
            **{**pipeline.components, "unet": unet}, requires_safety_checker=False
        )
    pipeline.save_pretrained(out, safe_serialization=True)
    for file in out.glob("*/config.json"):
        # diffusers notes the folder of this machine that a part was read from.
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None):
            file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (out / "sampling.json").write_text(json.dumps(sampling, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """The stages, as the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--kind", choices=["flow", "diffusion"], default="flow")
    parser.add_argument("--images", type=int, default=100_000, help="raw ones")
    parser.add_argument("--curated-images", type=int, default=100_000)
    parser.add_argument("--autoencoder-steps", type=int, default=2500, help="of the flow")
    parser.add_argument("--raw-steps", type=int, help="default: 4000, of diffusion 2000")
    parser.add_argument("--curated-steps", type=int, help="default: 4500, of diffusion 3200")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--start", type=Path, help="a pipeline that finished the raw stage: skip the first two"
    )
    options: Any = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    batch_size, out, is_flow = options.batch_size, options.out, options.kind == "flow"
    raw_steps, curated_steps = (4000, 4500) if is_flow else (2000, 3200)
    loss_of: Loss = flow_loss if is_flow else diffusion_loss
    pipeline: Any
    if options.start:
        pipeline_class = StableDiffusion3Pipeline if is_flow else StableDiffusionPipeline
        absent = {"text_encoder_3": None, "tokenizer_3": None} if is_flow else {}
        pipeline = pipeline_class.from_pretrained(options.start, **absent)
    else:
        images, captions = draw_data(options.images, options.seed, RAW_CAPTION_NOISE)
        if is_flow:
            pipeline = build_pipeline()
            train_autoencoder(pipeline.vae, images, options.autoencoder_steps)
        else:
            pipeline = build_diffusion_pipeline(images[:4096])
        steps = options.raw_steps or raw_steps
        horizon = steps * 3 // 2
        train(pipeline, loss_of, images, captions, steps, batch_size, 1.2e-3, horizon, out)
    images, captions = draw_data(options.curated_images, options.seed + 1, CURATED_CAPTION_NOISE)
    steps = options.curated_steps or curated_steps
    train(pipeline, loss_of, images, captions, steps, batch_size, 1e-3, steps, out)


if __name__ == "__main__":
    main()

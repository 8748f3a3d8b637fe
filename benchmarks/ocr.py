"""Does the text reward know a right word from one that is wrong by a letter, and what does it cost?

    python benchmarks/ocr.py [--quick] [--json PATH]

Renders 200 words in twelve fonts, in many sizes, colors and places on four kinds of background, and
scores every picture with a prompt that asks for its word and with prompts that ask for the word
with one letter replaced, left out or added. A perfect reader gives 1 to the first and 1 - 1/length
to the others. The last line is one JSON object.

Left out: pictures that a model drew.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import gaussian_filter

from treegrpo.rewards.ocr import OCR

WORDS = re.findall(
    r"\w+",
    """
Academy Account Adventure Airport Almond Alphabet Anchor Animal Antique Apple April Archive Arena
Artist Atlas August Autumn Avenue Bakery Balance Balloon Bamboo Banana Bank Barber Basket Beach
Bicycle Birthday Blossom Bookstore Bottle Breakfast Bridge Bright Bronze Butter Cabin Cactus
Calendar Camera Candle Canyon Captain Carnival Castle Caution Center Champion Cheese Cherry
Chocolate Cinema Circus Citizen Classic Clinic Closed Cloud Coffee Comet Concert Copper Coral
Cotton Courage Cream Crystal Danger December Delta Desert Diamond Dinner Doctor Dolphin Dragon
Dream Eagle Earth Electric Elephant Emerald Energy Engine Evening Exit Explore Falcon Family
Festival Fiction Flavor Flower Forest Fortune Fountain Freedom Friday Future Galaxy Garden Gentle
Ginger Glacier Golden Granite Guitar Habitat Hammer Happy Harbor Harvest Hello History Holiday
Honest Honey Horizon Hospital Hotel Iceberg Island Jacket January Jazz Journey Jungle Justice
Kitchen Ladder Lagoon Lantern Laundry Lemon Liberty Library Lucky Magic Mango Marble Market Meadow
Melody Midnight Mirror Monday Morning Mountain Museum Music Mystery Nature Nectar Night Noodle North
November Ocean October Open Orange Orchard Orchid Oxygen Palace Paper Parade Peace Pepper Pharmacy
Planet Pocket Powder Quality Quartz Quiet Rabbit Radio Rainbow Record River Rocket Saffron Salon
Saturday Science Season Secret Shadow Silver Snow Station Storm Summer Sunset Taxi Tea Winter Zoo
""",
)
FONTS = [
    f"DejaVu{family}{style}.ttf"
    for family, slant in (("Sans", "Oblique"), ("Serif", "Italic"), ("SansMono", "Oblique"))
    for style in ("", "-Bold", f"-{slant}", f"-Bold{slant}")
]
SIZES = (24, 32, 40, 48, 64, 80)  # points, which in these fonts is the height of a line in pixels
BACKGROUNDS = ("plain", "gradient", "noise", "clouds")
PICTURE = 512
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def background(
    kind: str, color: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.uint8]:
    """A picture [512, 512, 3] around a mean color."""
    variation = np.zeros((PICTURE, PICTURE, 1))
    if kind == "gradient":
        variation += np.linspace(-50, 50, PICTURE)[:, None, None]
    elif kind == "noise":
        variation += rng.normal(scale=25, size=variation.shape)
    elif kind == "clouds":
        clouds = gaussian_filter(rng.normal(size=variation.shape), (20, 20, 0))
        variation += 25 * clouds / clouds.std()
    return (color + variation).clip(0, 255).astype(np.uint8)


def draw(index: int, word: str) -> NDArray[np.uint8]:
    """The word's picture [512, 512, 3]; `index` decides everything else."""
    rng = np.random.default_rng(index)
    path = Path(matplotlib.get_data_path()) / "fonts/ttf" / FONTS[index % len(FONTS)]
    font = ImageFont.truetype(str(path), int(rng.choice(SIZES)))
    while True:
        behind, ink = rng.integers(0, 256, (2, 3)).astype(float)
        if abs((behind - ink) @ [0.299, 0.587, 0.114]) > 80:  # told apart without color
            break
    picture = Image.fromarray(background(str(rng.choice(BACKGROUNDS)), behind, rng))
    pencil = ImageDraw.Draw(picture)
    left, top, right, bottom = pencil.textbbox((0, 0), word, font=font)
    x, y = rng.uniform((8 - left, 8 - top), (PICTURE - 8 - right, PICTURE - 8 - bottom))
    pencil.text((x, y), word, fill=tuple(ink.astype(int)), font=font)
    return np.asarray(picture)


def corruptions(word: str) -> dict[str, str]:
    """The word with one letter replaced, missing and added, at places that the word decides."""
    rng = random.Random(word)
    place = rng.randrange(len(word))
    other = rng.choice([letter for letter in LETTERS if letter != word[place].lower()])
    return {
        "replaced": word[:place] + other + word[place + 1 :],
        "missing": word[:place] + word[place + 1 :],
        "added": word[:place] + other + word[place:],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="25 words: under a minute")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    words = WORDS[::8] if options.quick else WORDS

    pictures = np.stack([draw(index, word) for index, word in enumerate(words)])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    asked = {"right": words}
    for kind in ("replaced", "missing", "added"):
        asked[kind] = [corruptions(word)[kind] for word in words]

    reward = OCR()
    reward(images[:2], ['"warm"', '"up"'], None)
    scores: dict[str, NDArray[np.float64]] = {}
    wall, processor = time.perf_counter(), time.process_time()
    for kind, texts in asked.items():
        prompts = [f'a sign that says "{text}"' for text in texts]
        scores[kind] = np.array(reward(images, prompts, None))
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    read = len(asked) * len(words)

    print(f"{len(words)} words")
    print(f"{'asked for':<12}{'mean':>8}{'ideal':>8}{'exactly 1':>11}")
    figures: dict[str, float | int] = {"words": len(words)}
    for kind, texts in asked.items():
        ideal = 1.0 if kind == "right" else float(np.mean([1 - 1 / len(text) for text in texts]))
        mean, exact = float(scores[kind].mean()), float((scores[kind] == 1).mean())
        print(f"{kind:<12}{mean:>8.4f}{ideal:>8.4f}{exact:>11.1%}")
        figures |= {f"{kind}_mean": round(mean, 4), f"{kind}_exact": round(exact, 4)}
    wrong = np.stack([scores[kind] for kind in asked if kind != "right"])
    figures["right_above_all_wrong"] = round(float((scores["right"] > wrong.max(0)).mean()), 4)
    figures["seconds_per_image"] = round(wall / read, 4)
    figures["cpu_seconds_per_image"] = round(processor / read, 4)
    figures["threads"] = reward.threads
    misread = [word for word, score in zip(words, scores["right"], strict=True) if score < 1]
    print(f"not read exactly: {', '.join(misread) or 'none'}")
    line = json.dumps(figures)
    if options.json:
        options.json.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()

"""What `treegrpo evaluate` reports: a model beside its base, as a table, as JSON and as a page.

The page is one HTML file with its images inside; it loads nothing.

Left out: scores and figures (`evaluation/`), the pictures of a training run (`pictures.py`).
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image
from rich.table import Table
from torch import Tensor

from treegrpo.evaluation.results import BASE, TRAINED, Comparison
from treegrpo.images import evenly_spaced, to_uint8
from treegrpo.report import style
from treegrpo.run_folder import write_atomically

PICTURED_PROMPTS = 64
PICTURED_PAIRS = 2  # of one prompt
_THUMBNAIL = 320
"""Pixels of a picture's longer side in the page, at most."""
_PIXELATED = 128
"""Pictures up to this size stay lossless and are enlarged without smoothing."""


# --- table and JSON ---


def table(comparison: Comparison) -> Table:
    """For the terminal."""
    header, *rows = _rows(comparison)
    text = _explanation(comparison)
    result = Table(*header, caption=text, caption_justify="left", caption_style="dim")
    for column in result.columns[1:]:
        column.justify = "right"
    for row in rows:
        result.add_row(*row)
    return result


def _rows(comparison: Comparison) -> list[list[str]]:
    compared = comparison.base is not None
    header = [BASE, TRAINED, "difference", "win rate", "normalized"] if compared else ["mean"]
    rows = [["reward", *header]]
    for reward, found in comparison.figures().items():
        cells = [_with_error(found.mean, found.standard_error)]
        if compared:
            cells = [
                _with_error(found.base_mean, found.base_standard_error),
                *cells,
                _with_error(found.difference, found.difference_standard_error, sign="+"),
                f"{found.win_rate:.1%}",
                "" if found.normalized_score is None else f"{found.normalized_score:+.3f}",
            ]
        rows.append([reward, *cells])
    return rows


def _with_error(value: float | None, error: float | None, sign: str = "-") -> str:
    return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


def _explanation(comparison: Comparison) -> str:
    images = (
        f"{len(comparison.prompts)} prompts x {comparison.noises} images; ± standard error over "
        "prompts."
    )
    if comparison.base is None:
        return images
    return (
        f"{images} Both models start from the same noises. Win rate: pairs in which the trained "
        "model scores higher, ties half. Normalized: 0 is the base, 1 the highest score there is."
    )


def to_json(comparison: Comparison) -> str:
    """Everything: figures by reward, and each prompt's scores (null: not scored).

    A prompt's scores stand in the order of the seeds, those of one seed side by side.
    """
    found = comparison.figures()

    def scored(index: int) -> dict[str, dict[str, list[float | None]]]:
        return {
            reward: {
                role: [None if math.isnan(score) else score for score in scores[index].tolist()]
                for role, scores in models.items()
            }
            for reward, models in comparison.scores.items()
        }

    summary = {
        "model": comparison.model,
        "base": comparison.base,
        "prompts": len(comparison.prompts),
        **comparison.settings,
        "complete": len(found) == len(comparison.scores),
        "failures": comparison.failures,
        "rewards": {reward: asdict(one) for reward, one in found.items()},
        "per_prompt": [
            {"prompt": prompt.text, "scores": scored(index)}
            for index, prompt in enumerate(comparison.prompts)
        ],
    }
    return json.dumps(summary, indent=2, ensure_ascii=False) + "\n"


# --- page ---

# Prompt index to model to images.
Pictures = dict[int, dict[str, list[str]]]


def pictured(prompts: int) -> list[int]:
    """Indices of the prompts that a page shows: all, or evenly spread over the list."""
    return evenly_spaced(prompts, PICTURED_PROMPTS)


def thumbnail(image: Tensor) -> str:
    """A data URI of an image, float [3, H, W] in [0, 1]."""
    pixels = to_uint8(image).permute(1, 2, 0)
    picture, file = Image.fromarray(pixels.cpu().numpy()), io.BytesIO()
    kind = "png" if max(picture.size) <= _PIXELATED else "jpeg"
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    picture.save(file, format=kind, quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def write_page(path: Path, comparison: Comparison, pictures: Pictures) -> None:
    """Write the HTML file, with pictures of `pictured` prompts, as many of every model."""
    title = f"{comparison.model} against {comparison.base}" if comparison.base else comparison.model
    rewards = list(comparison.figures())
    usual = {reward: _usual_difference(comparison.scores[reward]) for reward in rewards}
    cards = "\n".join(_card(comparison, usual, index, images) for index, images in pictures.items())
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{_summary(comparison)}
{_controls(comparison, rewards, len(pictures))}
<main id="prompts" class="{"pairs" if comparison.base else "single"}">
{cards}
</main>
<h2>How it was made</h2>
{_making(comparison)}
<script>{_SCRIPT}</script>
</body>
</html>
"""
    write_atomically(path, page)


def _usual_difference(scores: Mapping[str, Tensor]) -> float:
    """The standard deviation of the pairs' differences; 0 without a base."""
    return float((scores[TRAINED] - scores[BASE]).std(correction=0)) if BASE in scores else 0.0


def _summary(comparison: Comparison) -> str:
    header, *rows = ([escape(cell) for cell in row] for row in _rows(comparison))
    found = comparison.figures().values()
    lines = [_line("th", header)]
    for row, one in zip(rows, found, strict=True):
        if one.difference is not None:
            # Within two standard errors a difference may well be chance.
            chance = 2 * (one.difference_standard_error or 0.0)
            row[3] = _colored(row[3], one.difference, chance)
        lines.append(_line("td", row))
    failures = "".join(
        f'<p class="bad">{escape(reward)} is left out: {escape(message)}</p>'
        for reward, message in comparison.failures.items()
    )
    return (
        f'<div class="wide"><table class="summary">{"".join(lines)}</table></div>\n'
        f'<p class="muted">{escape(_explanation(comparison))}</p>{failures}'
    )


def _line(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"


def _colored(text: str, difference: float, chance: float = 0.0) -> str:
    if abs(difference) <= chance:
        return text
    return f'<span class="{"good" if difference > 0 else "bad"}">{text}</span>'


def _controls(comparison: Comparison, rewards: Sequence[str], shown: int) -> str:
    total = len(comparison.prompts)
    note = f"{total} prompts" if shown == total else f"{shown} of {total} prompts, evenly spread"
    what = "difference" if comparison.base else "score"
    kinds = {"all": "all prompts"}
    if comparison.base:
        kinds |= {"better": "where trained is better", "worse": "where trained is worse"}
    choices = {
        "reward": {str(number): reward for number, reward in enumerate(rewards)},
        "order": {"0": "as listed", "-1": f"highest {what} first", "1": f"lowest {what} first"},
        "kind": kinds,
    }
    selects = "\n".join(
        f'<select id="{name}" aria-label="{name}">'
        + "".join(f'<option value="{value}">{escape(text)}</option>' for value, text in of.items())
        + "</select>"
        for name, of in choices.items()
        if len(of) > 1
    )
    return f'<form class="controls">{selects}<span class="muted">{note}</span></form>'


def _card(
    comparison: Comparison, usual: Mapping[str, float], index: int, images: Mapping[str, list[str]]
) -> str:
    """A prompt's images, by model, and scores; differences beyond the `usual` ones have a color."""
    scores = {
        reward: {role: values[index].tolist() for role, values in comparison.scores[reward].items()}
        for reward in usual
    }

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    heading = _line("th", ["", *comparison.roles, "difference"]) if comparison.base else ""
    keys = [mean(of[TRAINED]) - (mean(of[BASE]) if BASE in of else 0.0) for of in scores.values()]
    prompt, roles = escape(comparison.prompts[index].text), comparison.roles
    pairs = []
    for number in range(len(images[TRAINED])):
        pictures = "".join(
            f"<figure><figcaption>{role if len(roles) > 1 else ''}</figcaption>"
            f'<img src="{images[role][number]}" alt="{role}: {prompt}"></figure>'
            for role in roles
        )
        lines = []
        for reward, of in scores.items():
            cells = [f"{of[role][number]:.4f}" for role in roles]
            if BASE in of:
                difference = of[TRAINED][number] - of[BASE][number]
                cells.append(_colored(f"{difference:+.4f}", difference, usual[reward]))
            lines.append(_line("td", [escape(reward), *cells]))
        pairs.append(f'<div class="pair">{pictures}</div><table>{heading}{"".join(lines)}</table>')
    return (
        f'<article data-index="{index}" data-keys="{json.dumps(keys)}"><h3>{prompt}</h3>'
        f"{''.join(pairs)}</article>"
    )


def _making(comparison: Comparison) -> str:
    entries: dict[str, Any] = {
        "model": comparison.model,
        "base": comparison.base or "none",
        "prompts": len(comparison.prompts),
        **comparison.settings,
    }
    lines = []
    for name, value in entries.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {of if of != '' else 'none'}" for key, of in value.items())
        if value != "":
            lines.append(_line("td", [escape(name.replace("_", " ")), escape(str(value))]))
    return f'<table class="making">{"".join(lines)}</table>'


_STYLE = f"""
body {{ margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: {style.INK};
  background: {style.PAPER}; font: 15px/1.45 system-ui, sans-serif; color-scheme: light; }}
h1 {{ font-size: 1.4rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.1rem; margin-top: 2.5rem; }}
h3 {{ font-size: 1rem; font-weight: 600; margin: 0 0 .5rem; overflow-wrap: anywhere; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th {{ font-weight: 600; }}
td, th {{ padding: .15rem .7rem .15rem 0; text-align: right; }}
td:first-child, th:first-child, .making td {{ text-align: left; vertical-align: top; }}
.wide {{ overflow-x: auto; }}
.summary td, .summary th {{ white-space: nowrap; padding: .35rem 1.5rem .35rem 0;
  border-bottom: 1px solid {style.RULE}; }}
.making td:first-child {{ color: {style.MUTED}; padding-right: 1.5rem; }}
.making td {{ overflow-wrap: anywhere; }}
.muted {{ color: {style.MUTED}; }}
.good {{ color: {style.GOOD}; }}
.bad {{ color: {style.BAD}; }}
.controls {{ display: flex; flex-wrap: wrap; gap: .75rem; align-items: center; padding: .6rem 0;
  position: sticky; top: 0; z-index: 1; background: {style.PAPER}; }}
select {{ font: inherit; padding: .2rem .4rem; }}
#prompts {{ display: grid; gap: 1.25rem;
  grid-template-columns: repeat(auto-fill, minmax(min(var(--card), 100%), 1fr)); }}
.pairs {{ --card: 28rem; }}
.single {{ --card: 17rem; }}
article {{ border: 1px solid {style.RULE}; border-radius: .5rem; padding: 1rem; min-width: 0; }}
article[hidden] {{ display: none; }}
.pair {{ display: flex; gap: .75rem; }}
figure {{ margin: 0; flex: 1; min-width: 0; text-align: center; }}
figcaption {{ color: {style.MUTED}; font-size: .85rem; }}
article table {{ width: 100%; font-size: .85rem; margin-bottom: 1rem; }}
article td, article th {{ padding: .05rem 0 .05rem .75rem; }}
article th {{ font-weight: normal; color: {style.MUTED}; }}
article td:first-child {{ padding-left: 0; overflow-wrap: anywhere; }}
img {{ width: 100%; max-width: {_THUMBNAIL}px; border-radius: .4rem; display: block;
  margin: auto; }}
img[src^="data:image/png"] {{ image-rendering: pixelated; max-width: 11rem; }}
"""

_SCRIPT = """
const list = document.getElementById("prompts"), cards = [...list.children];
const chosen = name => document.getElementById(name)?.value;
function arrange() {
  const reward = +(chosen("reward") ?? 0), order = +chosen("order"), kind = chosen("kind");
  const key = card => JSON.parse(card.dataset.keys)[reward];
  cards.sort((a, b) => order * (key(a) - key(b)) || a.dataset.index - b.dataset.index);
  for (const card of cards) {
    card.hidden = kind === "better" && !(key(card) > 0) || kind === "worse" && !(key(card) < 0);
    list.append(card);
  }
}
document.querySelector(".controls").addEventListener("change", arrange);
arrange();
"""

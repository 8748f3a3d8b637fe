"""What a comparison writes: a table, JSON, and one HTML page that loads nothing.

Left out: charts (`charts.py`), figures (`summary.py`).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from rich import box
from rich.table import Table

from treegrpo.comparison import charts
from treegrpo.comparison.outcome import Outcome, Point
from treegrpo.comparison.running import PICTURES_FILE, Choice, Results
from treegrpo.comparison.study import RUNS_FOLDER, Study
from treegrpo.comparison.summary import Figure, Row, height, summarise
from treegrpo.report import style
from treegrpo.versions import versions


def to_json(study: Study, results: Results) -> str:
    """Everything that has been found."""
    found = {
        "settings": study.settings(),
        "versions": versions(),
        "summary": [asdict(row) for row in rows_of(study, results)],
        "choices": [asdict(choice) for choice in results.choices.values()],
        "tuning": [asdict(outcome) for outcome in results.tried],
        "runs": [asdict(outcome) for outcome in results.outcomes],
    }
    return json.dumps(found, indent=1) + "\n"


def rows_of(study: Study, results: Results) -> list[Row]:
    """The figures so far."""
    return summarise([entry.label for entry in study.entries], results.outcomes)


def table(study: Study, results: Results) -> Table:
    """For the terminal."""
    header, *lines = _cells(study, results)
    caption = " ".join(_explanation(study, results))
    table = Table(
        *header,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption=caption,
        caption_justify="left",
        caption_style="dim",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for line in lines:
        table.add_row(*line)
    return table


def notes(results: Results) -> list[str]:
    """What each was tuned to, a sentence each."""
    said = []
    for choice in results.choices.values():
        if choice.changes is None:
            continue
        text = f"{choice.entry} was tuned to {' '.join(choice.changes)}"
        if choice.at_an_end:
            ends = " and ".join(choice.at_an_end)
            text += f"; the best {ends} is at an end of its grid, a wider one may have a better"
        said.append(text)
    return said


def failures(results: Results) -> list[str]:
    """What failed, and with what, a sentence each."""
    return [
        f"{outcome.entry}, seed {outcome.seed}, failed: {outcome.error}"
        for outcome in results.outcomes
        if outcome.error is not None
    ]


# --- cells ---


def _cells(study: Study, results: Results) -> list[list[str]]:
    """The header, and a line per entry."""
    rows, name = rows_of(study, results), _name(results)
    percent = name == "accuracy"
    header = ["", "s/iteration", "iterations", "forwards", "reward", *(["accuracy"] * percent)]
    header += ["area", "catch-up", "gradient"]
    lines = [header]
    for row in rows:
        rollout, update = row.rollout_forwards, row.update_forwards
        line = [
            row.label + (f" ({row.failed} of {row.runs} failed)" if row.failed else ""),
            _figure(row.seconds_per_iteration, _plain(2)),
            _figure(row.iterations, "{:.4g}".format),
            f"{_thousands(rollout.mean)} + {_thousands(update.mean)}"
            if rollout is not None and update is not None
            else "-",
            _figure(row.reward, _plain(3)),
            *([_figure(row.accuracy, _percent, "%")] * percent),
            _figure(row.area, *((_percent, "%") if percent else (_plain(3),))),
            _figure(row.catch_up, _thousands),
            "-" if row.measured_factor is None else f"{row.measured_factor.mean:.2f}",
        ]
        lines.append(line)
    return lines


def _figure(figure: Figure | None, form: Callable[[float], str], unit: str = "") -> str:
    if figure is None:
        return "-"
    spread = "" if figure.std is None else f" ± {form(figure.std)}"
    return f"{form(figure.mean)}{spread}{unit}"


def _plain(digits: int) -> Callable[[float], str]:
    return f"{{:.{digits}f}}".format


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _thousands(number: float) -> str:
    return f"{number:.0f}" if number < 1e4 else f"{number / 1e3:,.0f}k"


def _name(results: Results) -> str:
    points = [point for outcome in results.outcomes for point in outcome.curve]
    return "accuracy" if points and points[0].accuracy is not None else "reward"


def _explanation(study: Study, results: Results) -> list[str]:
    seeds = len(study.seeds)
    shown = f"Seeds {study.seeds.start} to {study.seeds.stop - 1}" if seeds > 1 else "One seed"
    sentences = [
        f"{shown}, {study.budget} each; ± is the standard deviation of single seeds.",
        f"Forwards are rows without and with gradient; one with gradient costs {study.factor:g}, "
        "and took on this machine what stands under gradient.",
        f"Area: the mean {_name(results)} over the cost, from the first forward to the last.",
        f"Catch-up: the cost at which the {_name(results)} is what the weakest entry ends with.",
    ]
    if study.tunes:
        sentences.append(
            f"Each was tuned at the same budget on seed {study.tuning_seed}, which is not reported."
        )
    return sentences


# --- page ---


def page(study: Study, results: Results) -> str:
    """The page's HTML."""
    by_label: dict[str, list[Outcome]] = {entry.label: [] for entry in study.entries}
    for outcome in results.outcomes:
        by_label[outcome.entry].append(outcome)
    name = _name(results)
    sections = [_charts(by_label, height, name)]
    if name == "accuracy":
        inner = _charts(by_label, lambda point: point.reward, "reward")
        sections.append(f"<details><summary>The trained reward</summary>{inner}</details>")
    told = "".join(f'<p class="bad">{escape(failure)}</p>' for failure in failures(results))
    told += f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes(results))}</ul>"
    explanation = escape(" ".join(_explanation(study, results)))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Comparison</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(", ".join(by_label))}</h1>
<div class="wide"><table class="figures">{_html(_cells(study, results))}</table></div>
<p class="muted">{explanation}</p>
{told}
{"".join(sections)}
{_pictures(study)}
{_tuning(study, results)}
<h2>How it was made</h2>
<p>Every run starts from the same checkpoint and learns from the same rewards and prompts with the
same optimizer, each method with what it was published with. The entries differ in:</p>
<div class="wide"><table class="figures">{_html(differences(study))}</table></div>
<details><summary>All settings</summary><pre>{_settings(study)}</pre></details>
</body>
</html>
"""


def _charts(
    by_label: Mapping[str, Sequence[Outcome]], value: Callable[[Point], float], name: str
) -> str:
    drawn = {f"{name} against cost": charts.pareto(by_label, value, name)}
    for axis, (title, _) in charts.AXES.items():
        drawn[f"{name} by {title}"] = charts.curves(by_label, axis, value, name)
    images = "".join(
        f'<div><img src="data:image/svg+xml;base64,{_base64(text)}" alt="{escape(alt)}"></div>'
        for alt, text in drawn.items()
    )
    return f'<div class="charts">{images}</div>'


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode("ascii")


def _html(lines: Sequence[Sequence[str]]) -> str:
    tags = ["th", *["td"] * (len(lines) - 1)]
    return "".join(
        "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in line) + "</tr>"
        for tag, line in zip(tags, lines, strict=True)
    )


def _pictures(study: Study) -> str:
    """The same held-out prompts by every entry's model of the first seed, from the same noises."""
    seed = study.seeds.start
    drawn: dict[str, Any] = {}
    for entry in study.entries:
        file = study.folder / RUNS_FOLDER / entry.folder / f"seed-{seed}" / PICTURES_FILE
        if file.is_file():
            drawn[entry.label] = json.loads(file.read_text(encoding="utf-8"))
    if not drawn:
        return ""
    first = next(iter(drawn.values()))
    columns = {"before training": first["before"]}
    columns |= {label: pictures["after"] for label, pictures in drawn.items()}
    cards = []
    for number, prompt in enumerate(first["prompts"]):
        figures = "".join(_pictured(label, rows[number]) for label, rows in columns.items())
        cards.append(f"<article><h3>{escape(prompt)}</h3><div>{figures}</div></article>")
    judged = first["before"][0][0]["right"] is not None
    frames = " A green frame is exactly right, a red one is not." if judged else ""
    return (
        f"<h2>The same prompts, seed {seed}</h2>"
        f'<p class="muted">Held out of training, each from the same noises.{frames}</p>'
        f"<main>{''.join(cards)}</main>"
    )


def _pictured(label: str, row: Sequence[Mapping[str, Any]]) -> str:
    kinds = {True: ' class="right"', False: ' class="wrong"', None: ""}
    images = "".join(
        f'<img src="{one["image"]}" alt="{escape(label)}"{kinds[one["right"]]}>' for one in row
    )
    return f"<figure><div>{images}</div><figcaption>{escape(label)}</figcaption></figure>"


def _tuning(study: Study, results: Results) -> str:
    if not results.tried:
        return ""
    ends = [one.end for one in results.tried if one.error is None]
    accurate = any(end.accuracy is not None for end in ends)
    header = ["", "value", "reward", *(["accuracy"] * accurate), ""]
    lines = [
        _tried(results.choices.get(one.entry), one, accurate)
        for entry in study.entries
        for one in results.tried
        if one.entry == entry.label
    ]
    return (
        f"<h2>Tuning, seed {study.tuning_seed}</h2>"
        f'<div class="wide"><table class="figures">{_html([header, *lines])}</table></div>'
    )


def _tried(choice: Choice | None, outcome: Outcome, accurate: bool) -> list[str]:
    cells = [outcome.entry, " ".join(outcome.changes)]
    if outcome.error is not None:
        return [*cells, *(["-"] * (1 + accurate)), outcome.error]
    cells.append(f"{outcome.end.reward:.3f}")
    if accurate:
        cells.append(f"{_percent(outcome.end.accuracy or 0.0)}%")
    if choice is None or outcome.changes != choice.changes:
        return [*cells, ""]
    return [*cells, "chosen, at an end of its grid" if choice.at_an_end else "chosen"]


def differences(study: Study) -> list[list[str]]:
    """A header of entries, and a line per setting in which they differ; "" where one has none."""
    trees = {entry.label: study.config(entry).model_dump(mode="json") for entry in study.entries}
    flat = {
        label: {
            f"{section}.{key}": value
            for section in ("rollout", "advantage", "objective", "train")
            for key, value in tree[section].items()
        }
        for label, tree in trees.items()
    }
    keys = [
        key
        for key in dict.fromkeys(key for values in flat.values() for key in values)
        if key != "rollout.method"
        and len({json.dumps(values[key]) for values in flat.values() if key in values}) > 1
    ]
    return [
        ["", *flat],
        *([key, *(_shown(values, key) for values in flat.values())] for key in keys),
    ]


def _shown(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key]).strip('"') if key in values else ""


def _settings(study: Study) -> str:
    return escape(json.dumps(study.settings(), indent=2, ensure_ascii=False))


_STYLE = f"""
body {{ margin: 2rem auto; max-width: 90rem; padding: 0 1rem; color: {style.INK};
  background: {style.PAPER}; font: 15px/1.45 system-ui, sans-serif; color-scheme: light; }}
h1 {{ font-size: 1.4rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.1rem; margin-top: 2.5rem; }}
h3 {{ font-size: .95rem; font-weight: 600; margin: 0 0 .6rem; overflow-wrap: anywhere; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th {{ font-weight: 600; vertical-align: bottom; }}
td, th {{ padding: .35rem 1.2rem .35rem 0; text-align: right;
  border-bottom: 1px solid {style.RULE}; }}
td {{ white-space: nowrap; }}
td:first-child, th:first-child {{ text-align: left; }}
.wide {{ overflow-x: auto; }}
.muted {{ color: {style.MUTED}; max-width: 60rem; }}
.bad {{ color: {style.BAD}; }}
.charts {{ display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.5rem 0; }}
.charts div {{ flex: 1 1 26rem; min-width: 0; max-width: 42rem; }}
.charts img {{ width: 100%; display: block; }}
summary {{ cursor: pointer; margin: 1rem 0; }}
pre {{ overflow-x: auto; font-size: .8rem; }}
article {{ display: inline-block; vertical-align: top; max-width: 100%; box-sizing: border-box;
  margin: 0 .6rem .9rem 0; padding: .8rem .8rem .4rem; border: 1px solid {style.RULE};
  border-radius: .5rem; }}
figure {{ display: inline-block; margin: 0 .5rem .4rem 0; text-align: center; }}
figure img {{ width: 4.6rem; margin: 0 .1rem; border-radius: .35rem; border: 2px solid {style.RULE};
  image-rendering: pixelated; }}
figure img[src^="data:image/jpeg"] {{ width: 8rem; image-rendering: auto; }}
figure img.right {{ border-color: {style.GOOD}; }}
figure img.wrong {{ border-color: {style.BAD}; }}
figcaption {{ color: {style.MUTED}; font-size: .8rem; }}
"""

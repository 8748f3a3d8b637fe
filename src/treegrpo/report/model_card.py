"""The model card of an exported model: from what, on what and how it was trained, the figures.

A card is published: it holds nothing of the machine, no folder, no server.

Left out: the weights that it describes (`models/export.py`), a run's own report (`run.py`).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from treegrpo import __version__
from treegrpo.config import Config
from treegrpo.evaluation.results import Figures
from treegrpo.methods import find_method
from treegrpo.miniature import EMBEDDED
from treegrpo.models.policy import Policy
from treegrpo.readable import counted, duration, with_error
from treegrpo.report.run import TrainingResult
from treegrpo.run_folder import FREE_OPTIONS, PICTURE_FILES


def write_model_card(folder: Path, config: Config, policy: Policy, result: TrainingResult) -> None:
    """Write README.md into an exported model's folder, and beside it the picture that it shows."""
    picture = PICTURE_FILES[0]
    has_picture = (result.folder / picture).is_file()
    if has_picture:
        shutil.copyfile(result.folder / picture, folder / picture)
    uses_lora = config.model.lora_rank > 0
    rewards = ", ".join(
        f"{_public(reward.key)} "
        + (f"(weight {reward.weight:g})" if reward.weight else "(watched)")
        for reward in config.rewards
    )
    paper = find_method(config.rollout.method).paper or f"`{config.rollout.method}`"
    kind = f"LoRA weights of rank {config.model.lora_rank}" if uses_lora else "all weights"
    base = _public(config.model.path)
    text = f"""---
{_data(config, policy).to_yaml()}
---

# {Path(base).name} trained with {config.rollout.method}

{_in_words(config, result)}

{f"![The same prompts and noises before and after training]({picture})" if has_picture else ""}

| | |
|---|---|
| base model | `{base}` ({policy.pipeline_name}) |
| method | {paper}, {counted(result.iterations, "iteration")} |
| trained | {kind} |
| rewards | {rewards} |
| prompts | `{_public(config.prompts.train)}` |
| cost | {duration(result.seconds)}, {result.rollout_forwards:,} forwards to sample, \
{result.update_forwards:,} to update |
| made with | treegrpo {__version__} |

Means on {counted(result.held_out, "held-out prompt")}, sampled deterministically from the same \
noises, ± standard error over prompts:

| reward | before | after | change |
|---|---|---|---|
{chr(10).join(_row(name, found) for name, found in result.figures.items())}

## Use

```python
{_usage(config, policy)}
```

Training and the figures above sample with first-order steps. Where the checkpoint's own scheduler
is of a higher order (DPM-Solver, UniPC, PNDM), its pictures differ a little from those.

## Configuration

Folders and servers by their names alone.

```yaml
{yaml.safe_dump(_configuration(config), sort_keys=False, allow_unicode=True).rstrip()}
```
"""
    ModelCard(text).save(folder / "README.md")


def _data(config: Config, policy: Policy) -> ModelCardData:
    """The header that model hubs read; what is not known is left out."""
    base, uses_lora = config.model.path, config.model.lora_rank > 0
    method = config.rollout.method.rpartition(":")[2]
    of_base: dict[str, Any] = {}
    if _is_hub_name(base):
        of_base["base_model"] = base
        of_base["base_model_relation"] = "adapter" if uses_lora else "finetune"
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image" if policy.sampling.frames is None else "text-to-video",
        tags=["treegrpo", "reinforcement-learning", method, *(["lora"] if uses_lora else [])],
        **_licence(config, policy),
        **of_base,
    )


def _licence(config: Config, policy: Policy) -> dict[str, Any]:
    """That of the base model, by its own card: trained weights are derived from it."""
    base = config.model.path
    if base in EMBEDDED:
        return {"license": "apache-2.0"}
    own = policy.checkpoint.folder / "README.md"
    try:
        card = ModelCard.load(own if own.is_file() else base if _is_hub_name(base) else own)
    except Exception:  # no card, no connection, no permission, or a header that is no YAML
        return {}
    found = {key: card.data.get(key) for key in ("license", "license_name", "license_link")}
    link = found["license_link"]
    if link and "://" not in link:
        page = f"https://huggingface.co/{base}/blob/main/{link}"
        found["license_link"] = page if _is_hub_name(base) else None
    return {key: value for key, value in found.items() if isinstance(value, str)}


def _in_words(config: Config, result: TrainingResult) -> str:
    """What came of the rewards that were trained on."""
    prompts, iterations = (
        counted(result.held_out, "held-out prompt"),
        counted(result.iterations, "iteration"),
    )
    end = " (training was interrupted)" if result.interrupted else ""
    lines = [f"On {prompts}, after {iterations}{end}:", ""]
    for reward in config.trained_rewards:
        found = result.figures[reward.key]
        change, error = found.difference or 0.0, found.difference_standard_error
        verb = "rose" if change > 0 else "fell"
        if abs(change) <= 2 * (error or 0.0):
            verb = "did not change by more than chance would" if change else "did not change"
        before = with_error(found.base_mean or 0.0, found.base_standard_error)
        after = with_error(found.mean, found.standard_error)
        lines.append(
            f"- the mean {_public(reward.key)} {verb}: from {before} to {after} "
            f"({with_error(change, error, '+')})"
        )
    return "\n".join(lines)


def _row(name: str, found: Figures) -> str:
    before = with_error(found.base_mean or 0.0, found.base_standard_error)
    after = with_error(found.mean, found.standard_error)
    change = with_error(found.difference or 0.0, found.difference_standard_error, "+")
    return f"| {_public(name)} | {before} | {after} | {change} |"


def _usage(config: Config, policy: Policy) -> str:
    uses_lora = config.model.lora_rank > 0
    imports, source = [], json.dumps("THIS_FOLDER")
    if uses_lora and config.model.path in EMBEDDED:
        imports = ["from importlib.resources import files", ""]
        source = f'files("treegrpo") / "miniature" / "{EMBEDDED[config.model.path]}"'
    elif uses_lora:
        is_known = _is_hub_name(config.model.path)
        source = json.dumps(config.model.path if is_known else "FOLDER_OF_THE_BASE_MODEL")
    # Some pipelines load without a text encoder only if they are told so.
    absent = [
        name
        for name, value in policy.checkpoint.index.items()
        if name.startswith(("text_encoder", "tokenizer")) and value[0] is None
    ]
    arguments = "".join(f", {name}=None" for name in absent)
    lines = [
        *imports,
        "from diffusers import DiffusionPipeline",
        "",
        f"pipeline = DiffusionPipeline.from_pretrained({source}{arguments})",
    ]
    if uses_lora:
        lines.append('pipeline.load_lora_weights("THIS_FOLDER")')
    given = "".join(f"    {name}={value!r},\n" for name, value in policy.call_settings().items())
    return "\n".join([*lines, f'result = pipeline(\n    "a prompt",\n{given})'])


# --- what may be published ---


def _is_hub_name(path: str) -> bool:
    return "/" in path and not _is_local(path)


def _is_local(text: str) -> bool:
    return os.path.isabs(text) or text.startswith(("./", "../", "~")) or os.path.exists(text)


def _public(text: str) -> str:
    """Without the folder in which something is on this machine, or the server's address."""
    if text.startswith(("http://", "https://")):
        return "a server"
    return Path(text).name if _is_local(text) else text


def _configuration(config: Config) -> Any:
    tree = config.model_dump(mode="json")
    for reward in tree["rewards"]:
        for option in FREE_OPTIONS & reward["options"].keys():
            del reward["options"][option]
    return _all_public(tree)


def _all_public(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _all_public(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_all_public(each) for each in value]
    return _public(value) if isinstance(value, str) else value

"""The model card of an exported model: from what, on what and how it was trained, the figures.

Left out: the weights that it describes (`models/export.py`), a run's own report (`run.py`).
"""

from __future__ import annotations

import json
from pathlib import Path

from treegrpo import __version__
from treegrpo.config import Config, to_yaml
from treegrpo.methods import find_method
from treegrpo.models.folder import resolve
from treegrpo.models.policy import Policy
from treegrpo.report.run import TrainingResult


def write_model_card(folder: Path, config: Config, policy: Policy, result: TrainingResult) -> None:
    """Write README.md into an exported model's folder, with the header that model hubs read."""
    uses_lora, base = config.model.lora_rank > 0, config.model.path
    on_hub = not Path(base).expanduser().exists() and "/" in base
    header = ["library_name: diffusers", "tags: [treegrpo, reinforcement-learning]"]
    if on_hub:
        relation = "adapter" if uses_lora else "finetune"
        header += [f"base_model: {base}", f"base_model_relation: {relation}"]
    rows = [
        f"| {name} | {result.before[name]:.4f} | {result.after[name]:.4f} |"
        for name in result.before
    ]
    rewards = ", ".join(
        f"{reward.key} (weight {reward.weight:g})" if reward.weight else f"{reward.key} (watched)"
        for reward in config.rewards
    )
    paper = find_method(config.rollout.method).paper or f"`{config.rollout.method}`"
    kind = f"LoRA weights of rank {config.model.lora_rank}" if uses_lora else "all weights"
    text = f"""---
{chr(10).join(header)}
---

# {Path(base).name} trained with {config.rollout.method}

Made with treegrpo {__version__}.

| | |
|---|---|
| base model | `{base}` ({policy.pipeline_name}) |
| method | {paper}, {result.iterations} iterations |
| trained | {kind} |
| rewards | {rewards} |
| prompts | `{config.prompts.train}` |
| cost | {result.seconds / 3600:.2f} hours, {result.rollout_forwards:,} forwards to sample, \
{result.update_forwards:,} to update |

Means on held-out prompts, sampled deterministically from the same noises:

| reward | before | after |
|---|---|---|
{chr(10).join(rows)}

## Use

```python
{_usage(config, policy)}
```

Training and the figures above sample with first-order steps. Where the checkpoint's own scheduler
is of a higher order (DPM-Solver, UniPC, PNDM), its pictures differ a little from those.

## Configuration

```yaml
{to_yaml(config).rstrip()}
```
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def _usage(config: Config, policy: Policy) -> str:
    uses_lora = config.model.lora_rank > 0
    source = resolve(config.model.path) if uses_lora else "THIS_FOLDER"
    # Some pipelines load without a text encoder only if they are told so.
    absent = [
        name
        for name, value in policy.checkpoint.index.items()
        if name.startswith(("text_encoder", "tokenizer")) and value[0] is None
    ]
    arguments = "".join(f", {name}=None" for name in absent)
    lines = [
        "from diffusers import DiffusionPipeline",
        "",
        f"pipeline = DiffusionPipeline.from_pretrained({json.dumps(source)}{arguments})",
    ]
    if uses_lora:
        lines.append('pipeline.load_lora_weights("THIS_FOLDER")')
    given = "".join(f"    {name}={value!r},\n" for name, value in policy.call_settings().items())
    return "\n".join([*lines, f'result = pipeline(\n    "a prompt",\n{given})'])

"""A trained policy as diffusers loads it: the whole pipeline, or LoRA weights alone.

Left out: the model card (`report/model_card.py`), and states of training (`checkpoint.py`).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from treegrpo.models.adapters import has_lora, lora_weights
from treegrpo.models.folder import INDEX_FILE, SAMPLING_FILE
from treegrpo.models.policy import Policy


def export(policy: Policy, folder: Path, base_model: str) -> None:
    """Write the whole pipeline, or LoRA weights of `base_model` alone; and how it is sampled."""
    network: Any = policy.network
    folder.mkdir(parents=True, exist_ok=True)
    if has_lora(policy):
        layers = {f"{policy.network_name}_lora_layers": lora_weights(policy)}
        policy.checkpoint.pipeline_class().save_lora_weights(folder, **layers)
    else:
        # Only the network was trained: everything else is the checkpoint's own files.
        for path in _copied_files(policy):
            copy = folder / path.relative_to(policy.checkpoint.folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        network.save_pretrained(folder / policy.network_name, safe_serialization=True)
    sampling = replace(policy.sampling, base_model=base_model if has_lora(policy) else None)
    text = json.dumps(asdict(sampling), indent=2)
    (folder / SAMPLING_FILE).write_text(text + "\n", encoding="utf-8")


def export_bytes(policy: Policy) -> int:
    """About what `export` writes: weights and the checkpoint's other files, without headers."""
    is_lora = has_lora(policy)
    written = [p for p in policy.network.parameters() if p.requires_grad or not is_lora]
    copied = [] if is_lora else _copied_files(policy)
    weights = sum(p.numel() * p.element_size() for p in written)
    return weights + sum(path.stat().st_size for path in copied)


def _copied_files(policy: Policy) -> list[Path]:
    source = policy.checkpoint
    parts = {name for name, value in source.index.items() if isinstance(value, list)}
    files = [source.folder / INDEX_FILE]
    for part in sorted(parts - {policy.network_name}):
        files += sorted(p for p in (source.folder / part).rglob("*") if p.is_file())
    return files

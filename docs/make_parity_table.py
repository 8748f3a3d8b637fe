"""Write docs/parity.md: every family's deterministic rollout against diffusers' own pipeline.

    python docs/make_parity_table.py

The checkpoints are tiny ones of the real architectures with random weights, made by
tests/tiny_checkpoints. In float32, from the same noises, with the same steps, guidance and size.

Left out: gradients, and checkpoints with published weights.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import test_families  # noqa: E402
import tiny_checkpoints  # noqa: E402

HEADER = """# Parity with diffusers

Images of our all-deterministic rollout against those of diffusers' own pipeline `__call__`, from
the same noises, with the same steps, guidance and size: the largest absolute difference, of pixels
in [0, 1], in float32. The checkpoints are tiny ones of the real architectures with random weights.
Where a checkpoint's own solver is of a higher order (Sana, Wan, Stable Diffusion 1.5), the pipeline
runs its first-order form on the same noise levels, because a rollout is first order. One scheduler
is followed in its levels only: DDIM with `timestep_spacing: trailing` and a number of steps that
does not divide 1000 ends each step beside the level at which diffusers then calls the network
(4.6e-3 at 28 steps); here a step ends where the next one begins.

Prompt embeddings are compared with `encode_prompt`, the calls that model cards show with our
images, and exports by loading them back with diffusers alone, in the tests
(`tests/test_families.py`). `python docs/make_parity_table.py` writes this page.

| family | variation | pipeline | largest difference |
|---|---|---|---|
"""


def main() -> None:
    lines = []
    for case in tiny_checkpoints.cases():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            case.build(folder)
            for variation, sampling in case.variations.items():
                policy = test_families.load(folder, **sampling)
                difference = test_families.difference(case, folder, policy)
                lines.append(
                    f"| {case.name} | {variation} | `{policy.pipeline_name}` | {difference:.1e} |"
                )
                print(lines[-1], flush=True)
    (ROOT / "docs" / "parity.md").write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

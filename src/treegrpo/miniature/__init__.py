"""The miniature: two tiny models that ship with the package, their world and how they were made.

Left out: its reward (`rewards/composition.py`).
"""

# As `model.path` names them, to their folders here: a rectified flow and a diffusion model.
EMBEDDED = {"miniature": "checkpoint", "miniature-diffusion": "diffusion_checkpoint"}

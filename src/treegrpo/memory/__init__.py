"""What a run takes of memory, without reading its weights (`estimate`), and what fits (`suggest`).

What is assumed: PyTorch's fused attention, on the GPU as on the CPU (a kernel that keeps whole
attention matrices takes more); no `model.compile`; one process, or several by DDP.

Left out: the rewards' own models, what a kernel allocates inside itself, and what is there before
any tensor (the interpreter, the libraries, a CUDA context of about half a GiB).
"""

from treegrpo.memory.advice import Advice, Change, fitting, suggest
from treegrpo.memory.batches import LEAST, Batches, automatic
from treegrpo.memory.estimate import (
    PARTS,
    Estimate,
    Phase,
    count_states,
    estimate,
    most_prompts,
)
from treegrpo.memory.skeleton import Measurements, PeakBytes

__all__ = [
    "LEAST",
    "PARTS",
    "Advice",
    "Batches",
    "Change",
    "Estimate",
    "Measurements",
    "PeakBytes",
    "Phase",
    "automatic",
    "count_states",
    "estimate",
    "fitting",
    "most_prompts",
    "suggest",
]

"""Methods: how samples are grown and what is learned from them.

`method.py` is what a method is, `trees.py` and `flat.py` hold the built-in ones, `window.py` the
window that some share.

Left out: the arithmetic, which is the algorithm's (`plan.py`, `advantage.py`, `objective.py`), and
the loop around it (`training/`).
"""

from treegrpo.methods.method import Credit, Method, PlanShare, Scores, Update
from treegrpo.methods.policy_gradient import PolicyGradient
from treegrpo.methods.registry import BUILT_IN, find_method

__all__ = [
    "BUILT_IN",
    "Credit",
    "Method",
    "PlanShare",
    "PolicyGradient",
    "Scores",
    "Update",
    "find_method",
]

"""Methods by name: built in, or `module:Class` of the user's own.

Imports a method only when it is asked for. docs/methods.md is the guide to adding one.

Left out: the methods themselves (`trees.py`, `flat.py`).
"""

from __future__ import annotations

import difflib
from functools import cache
from typing import TYPE_CHECKING

from treegrpo.errors import UserError
from treegrpo.naming import import_attribute

if TYPE_CHECKING:
    from treegrpo.methods.method import Method

BUILT_IN = {
    "tree_grpo": "treegrpo.methods.trees:TreeGRPO",
    "tree_endpoint": "treegrpo.methods.endpoint:TreeEndpoint",
    "mix_grpo": "treegrpo.methods.flat:MixGRPO",
    "flow_grpo": "treegrpo.methods.flat:FlowGRPO",
    "dance_grpo": "treegrpo.methods.flat:DanceGRPO",
    "branch_grpo": "treegrpo.methods.trees:BranchGRPO",
    "ddpo": "treegrpo.methods.flat:DDPO",
}
DEFAULT = "tree_grpo"


@cache
def find_method(name: str) -> type[Method]:
    """The class of a method.

    Args:
        name: built in, or `module:Class` of a subclass of `treegrpo.methods.Method`; the module may
            be installed or lie in the current directory.

    Raises:
        UserError: there is no such method.
    """
    from treegrpo.methods.method import Method

    if ":" not in name and name not in BUILT_IN:
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(
            f"must be one of {', '.join(BUILT_IN)}{meant}, or your own as 'module:Class'"
        )
    found = import_attribute(BUILT_IN.get(name, name), f"method {name!r}")
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise UserError(f"{name!r} is no method; must be a subclass of treegrpo.methods.Method")
    return found

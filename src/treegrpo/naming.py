"""Python objects by name, as configurations write them: `module:attribute`.

Left out: names without a colon. What is built in is for those to say who ask
(`treegrpo.rewards.registry` for rewards).
"""

import importlib
import os
import sys
from typing import Any

from treegrpo.errors import UserError, own_traceback


def import_attribute(name: str, what: str) -> Any:
    """Import a function or class of an installed module, or of one in the current directory.

    Args:
        name: `module:attribute`.
        what: begins the messages, such as "reward 'my_module:my_reward'".

    Raises:
        UserError: there is no such module, it fails to import, or it has no such function or
            class.
    """
    module_name, _, attribute = name.partition(":")
    # A console script does not search the current directory. Last, so that it hides no package.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(
            f"{what}: the module {module_name!r} cannot be imported "
            f"({type(error).__name__}: {error}); looked in the current directory, {os.getcwd()}, "
            f"and the installed packages{own_traceback(error)}"
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise UserError(
            f"{what}: the module {module_name!r} ({module.__file__}) has no function {attribute!r}"
        )
    return found

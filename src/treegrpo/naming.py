"""stub until merged"""

import importlib
import os
import sys
from typing import Any

from treegrpo.errors import UserError


def import_attribute(name: str, what: str) -> Any:
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(f"{what}: {error}") from error
    return getattr(module, attribute)

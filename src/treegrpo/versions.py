"""Which versions of the libraries are at work, for records and for keys.

Left out: a record of the machine.
"""

import platform
from collections.abc import Iterable
from importlib.metadata import version

LIBRARIES = ("treegrpo", "torch", "diffusers", "transformers", "accelerate", "peft")


def versions(packages: Iterable[str] = LIBRARIES) -> dict[str, str]:
    """Version by name: Python's and those of installed packages."""
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}

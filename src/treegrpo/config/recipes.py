"""The recipes that come with the package, by name: `treegrpo train sd3.5-medium`.

Left out: what they say, in `recipes/` beside the package's code, and reading them (`reading.py`).
"""

from __future__ import annotations

import difflib
from pathlib import Path

from treegrpo.config.wording import ConfigError

_FOLDER = Path(__file__).parent.parent / "recipes"
_FILES = {path.stem: path for path in _FOLDER.glob("*.yaml")}
RECIPES = sorted(_FILES)
_ABLATIONS = {path.stem: path for path in (_FOLDER / "ablations").glob("*.yaml")}
ABLATIONS = sorted(_ABLATIONS)
"""Files of variants that come with the package, for `treegrpo compare`."""


def configuration_file(name: str) -> Path:
    """The file of this name, else the recipe of this name.

    Raises:
        ConfigError: there is neither; says which recipes have a name like it.
    """
    path = Path(name)
    if path.is_file():
        return path
    if name in _FILES:
        return _FILES[name]
    if path.exists():
        return path  # a folder, which reading refuses
    near = difflib.get_close_matches(path.name.removesuffix(".yaml"), RECIPES, n=3)
    recipes = f"did you mean {' or '.join(near)}?" if near else f"recipes: {', '.join(RECIPES)}"
    raise ConfigError(
        f"configuration file {name} does not exist, and no recipe has this name; {recipes}"
    )


def variants_file(name: str) -> Path:
    """The file of this name, else the ablation of this name.

    Raises:
        ConfigError: there is neither.
    """
    path = Path(name)
    if path.exists():
        return path
    if name in _ABLATIONS:
        return _ABLATIONS[name]
    raise ConfigError(
        f"--variants: got {name}; must be a file or one of the ablations {', '.join(ABLATIONS)}"
    )

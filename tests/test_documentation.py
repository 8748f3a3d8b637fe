"""The code that the documentation shows runs and gives what it says.

Left out: the figures in the documentation, which benchmarks and whole runs gave.
"""

import doctest
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_library_example_of_the_readme_learns() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(import torch\n.*?)```", readme, flags=re.DOTALL)
    assert len(example.splitlines()) <= 36
    printed: list[float] = []
    exec(example, {"print": lambda *values: printed.append(float(values[-1]))})
    assert len(printed) >= 3
    # The reward is minus a distance: at least half of the way to the target has been learned.
    assert printed[-1] > 0.5 * printed[0]


def test_the_forward_counts_of_the_guide() -> None:
    failures, tests = doctest.testfile(
        str(ROOT / "docs" / "how-it-works.md"), module_relative=False
    )
    assert tests >= 7
    assert failures == 0


def test_every_benchmark_has_the_quick_form_of_the_readme() -> None:
    assert "make bench ARGS=--quick" in (ROOT / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "benchmarks").glob("*.py"):
        assert '"--quick"' in path.read_text(encoding="utf-8"), path.name

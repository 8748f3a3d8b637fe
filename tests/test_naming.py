"""Objects that configurations name as `module:attribute`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from treegrpo.errors import UserError
from treegrpo.naming import import_attribute


def test_modules_lie_in_the_current_directory_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_here.py").write_text("class Thing:\n    pass\n\nnumber = 1\n")
    (tmp_path / "broken_here.py").write_text("{}['logits']\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert import_attribute("mine_here:Thing", "field 'x'").__name__ == "Thing"
    for name, message in [
        ("mine_here:number", r"has no function 'number'"),
        ("mine_here:Other", r"the module 'mine_here' \(.*mine_here.py\) has no function 'Other'"),
        ("broken_here:Thing", r"cannot be imported \(KeyError: 'logits'\); looked in the current"),
        ("not_here:Thing", r"cannot be imported \(ModuleNotFoundError: No module"),
        (":Thing", r"cannot be imported \(ValueError"),
    ]:
        with pytest.raises(UserError, match=f"^field 'x': .*{message}"):
            import_attribute(name, "field 'x'")

"""The command line, as tests use it."""

import sys

import pytest

from treegrpo import cli


class CommandLine:
    """Runs the command line in this process, as its console script does."""

    def __init__(self, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        self._capsys, self._patch = capsys, patch

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """The exit code, standard output and standard error."""
        self._patch.setattr(sys, "argv", ["treegrpo", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        output = self._capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, output.out, output.err

    def refusal(self, *arguments: str) -> str:
        """The message of a command that must be refused."""
        code, out, err = self(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        return err.removeprefix("error: ").removesuffix("\n")

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command_line import CommandLine

from treegrpo import __version__
from treegrpo.checkpoint import check_folder
from treegrpo.config import Config, load_config, to_yaml

HEAVY = {"torch", "diffusers", "transformers", "accelerate", "peft", "scipy", "matplotlib"}


@pytest.fixture(autouse=True)
def _file(treegrpo: CommandLine) -> None:
    Path("file").touch()


@pytest.mark.parametrize("command", [[], ["train"], ["plan"], ["sample"], ["evaluate"]])
def test_help_answers(command: list[str], treegrpo: CommandLine) -> None:
    for flag in ("--help", "-h"):
        code, out, _ = treegrpo(*command, flag)
        assert code == 0
        assert "Usage:" in out


def test_help_of_train_explains_every_key(treegrpo: CommandLine) -> None:
    _, out, _ = treegrpo("train", "--help")
    assert "rollout.branching (3): Children of a node at each branching step" in out
    assert "rewards.N.name (required)" in out


def test_print_config_shows_file_and_overrides_resolved(treegrpo: CommandLine) -> None:
    Path("run.yaml").write_text("rollout:\n  branching: 2\n")
    code, out, _ = treegrpo(
        "train", "train.seed=7", "run.yaml", "--print-config", "rollout.trees=2"
    )
    assert code == 0
    assert out == to_yaml(
        load_config(None, ["rollout.branching=2", "rollout.trees=2", "train.seed=7"])
    )
    assert yaml.safe_load(out)["rewards"] == [reward.model_dump() for reward in Config().rewards]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "rollout.branching=0"], "rollout.branching: got 0; must be at least 1"),
        (["train", "none.yaml"], "configuration file none.yaml does not exist"),
        (["train", "a.yaml", "b.yaml"], "got 2 configuration files (a.yaml, b.yaml)"),
        (["train", "prompts.train=none.txt"], "prompt file none.txt does not exist"),
        (["train", "model.path=./none"], "model.path: no folder ./none; must be"),
        (["train", "model.path=minature"], "model.path: no folder minature; must be"),
        (["train", "model.path=a/b/c"], "model.path: no folder a/b/c; must be"),
        (["train", "model.path=file"], "model.path: file is a file; must be a diffusers folder"),
        (["train", "output=file"], "output: file is a file; must be a folder"),
        (["train", "--resume"], "output: runs/miniature holds no run to resume"),
        (["train", "--resume", "--overwrite"], "--resume and --overwrite: "),
        (
            ["train", "rewards.0.name=compositon"],
            "rewards.0.name: reward 'compositon' is unknown",
        ),
        (
            ["train", "evaluation.accuracy=none:f"],
            "evaluation.accuracy: reward 'none:f': the module 'none' cannot be imported",
        ),
        (["evaluate", "miniature", "--reward", "x"], "--reward: reward 'x' is unknown"),
        (["evaluate", "miniature", "--json", "no/such.json"], "--json: no folder no "),
        (["sample", "miniature"], "prompts: must be given by --prompt or by --prompts"),
        (["sample", "miniature", "--prompts", "none.txt"], "prompt file none.txt does not exist"),
        (["sample", "~/none", "--prompt", "a cat"], "MODEL: no folder ~/none; must be"),
    ],
)
def test_what_cannot_run_is_refused(
    arguments: list[str], message: str, treegrpo: CommandLine
) -> None:
    assert treegrpo.refusal(*arguments).startswith(message)


def test_a_folder_with_a_run_is_neither_mixed_nor_lost(treegrpo: CommandLine) -> None:
    for name in ("run/config.yaml", "run/metrics.jsonl", "failed/config.yaml", "other/thesis.tex"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    assert "already holds a run" in treegrpo.refusal("train", "output=run")
    assert "holds no run, so" in treegrpo.refusal("train", "output=other")
    # Overwriting is for runs; a mistyped output must not delete anything else.
    assert "holds no run, so" in treegrpo.refusal("train", "output=other", "--overwrite")
    # A run that ended before its first result is not in the way.
    check_folder(load_config(None, ["output=failed"]), resume=False, overwrite=False)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["train", "--print-config"], 0),
        (["train", "rollout.branching=0"], 2),
        # The last check of each command, so that all of them have run.
        (["train", "output=file"], 2),
        (["plan", "--json", "no/such.json"], 2),
        (["sample", "miniature", "--prompt", "a cat", "--out", "no/such.png"], 2),
        (["evaluate", "miniature", "--json", "no/such.json"], 2),
    ],
)
def test_nothing_heavy_is_imported_for_help_and_refusals(arguments: list[str], code: int) -> None:
    script = f"""
import sys
from treegrpo.cli import main
try:
    main()
finally:
    print("imported:", *sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)
"""
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True
    )
    assert result.returncode == code
    assert result.stderr.splitlines()[-1] == "imported:"
    assert "Traceback" not in result.stderr


def test_the_module_runs_and_shows_the_version() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "treegrpo", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout == f"treegrpo {__version__}\n"


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = f"import treegrpo, sys; treegrpo.Config(); print(*({HEAVY!r} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "\n"


def test_every_export_exists() -> None:
    import treegrpo

    for name in treegrpo.__all__:
        assert getattr(treegrpo, name) is not None
    assert not hasattr(treegrpo, "no_such_name")

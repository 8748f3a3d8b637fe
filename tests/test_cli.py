"""The command line: help, what it refuses and how soon.

Left out: what the commands do (`test_training.py`, `test_memory.py`, `test_evaluate.py`, ...).
"""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command_line import CommandLine

from treegrpo import __version__
from treegrpo.config import RECIPES, Config, configuration_file, load_config, to_yaml
from treegrpo.run_folder import RunError, check_run_folder, prepare_folder

HEAVY = {
    *("torch", "diffusers", "transformers", "accelerate", "peft", "scipy", "matplotlib"),
    *("starlette", "uvicorn"),
}


@pytest.fixture(autouse=True)
def _file(treegrpo: CommandLine) -> None:
    Path("file").touch()


@pytest.mark.parametrize(
    "command",
    [[], ["train"], ["plan"], ["sample"], ["evaluate"], ["compare"], ["serve-reward"]],
)
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


def test_a_recipe_is_found_by_name_unless_a_file_has_it(treegrpo: CommandLine) -> None:
    Path("sdxl-lora").mkdir()
    code, out, _ = treegrpo("train", "sdxl-lora", "--print-config", "train.seed=7")
    assert code == 0
    assert out == to_yaml(load_config(configuration_file("sdxl-lora"), ["train.seed=7"]))
    assert yaml.safe_load(out)["model"]["path"] == "stabilityai/stable-diffusion-xl-base-1.0"
    Path("sd1.5-lora").write_text("train:\n  seed: 3\n")
    _, out, _ = treegrpo("train", "sd1.5-lora", "--print-config")
    assert out == to_yaml(load_config(None, ["train.seed=3"]))


def test_the_shell_completes_commands_and_recipes(
    treegrpo: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("sdxl-mine.yaml").touch()
    monkeypatch.setenv("_TREEGRPO_COMPLETE", "complete_bash")
    for words, completed in (("pl", "plan"), ("train sdxl", "sdxl-lora\nsdxl-mine.yaml")):
        monkeypatch.setenv("COMP_WORDS", f"treegrpo {words}")
        monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
        code, out, _ = treegrpo()
        assert (code, out.strip()) == (0, completed)


@pytest.mark.parametrize(
    ("arguments", "job"),
    [
        ([], "miniature-fast"),
        (["train.seed=7"], "miniature-fast"),
        (["model.path=miniature"], None),
        (["miniature-paper"], "miniature-paper"),
    ],
)
def test_without_a_file_and_a_model_the_job_is_the_miniatures(
    arguments: list[str], job: str | None, treegrpo: CommandLine
) -> None:
    """With a model of one's own and no file, nothing of the miniature's job is left."""
    code, out, _ = treegrpo("train", "--print-config", *arguments)
    assert code == 0
    expected = load_config(
        None if job is None else configuration_file(job), [a for a in arguments if "=" in a]
    )
    assert out == to_yaml(expected)


@pytest.mark.parametrize("command", ["train", "plan"])
def test_help_names_the_recipes(command: str, treegrpo: CommandLine) -> None:
    _, out, _ = treegrpo(command, "--help")
    assert len(RECIPES) >= 10
    assert all(recipe in out for recipe in RECIPES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "rollout.branching=0"], "rollout.branching: got 0; must be at least 1"),
        (["train", "none.yaml"], "configuration file none.yaml does not exist"),
        (
            ["train", "qwen"],
            "configuration file qwen does not exist, and no recipe has this name; re",
        ),
        (
            ["plan", "configs/sdxl_lora.yaml"],
            "configuration file configs/sdxl_lora.yaml does not exist, and no recipe has this "
            "name; did you mean sdxl-lora or ",
        ),
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
            ["train", "evaluation.accuracy=ocr"],
            'evaluation.accuracy: got "ocr"; must be one of the rewards (composition, ',
        ),
        (["train", "model.device=gpu"], "model.device: got 'gpu'; must be 'auto', 'cpu' or"),
        (["plan", "model.device=gpu"], "model.device: got 'gpu'; must be 'auto', 'cpu' or"),
        (
            ["plan", "train.updates_per_iteration=16", "--processes", "2"],
            "rollout.prompts_per_iteration: got 16; must be a multiple of 2 processes x 16 updates",
        ),
        (["serve-reward", "compositon"], "NAME: reward 'compositon' is unknown"),
        (["serve-reward", "x:y", "--option", "url"], "--option: got 'url'; must be KEY=VALUE"),
        (["train", "model.device=mps"], "model.device: got 'mps', which cannot be used here ("),
        (["evaluate", "miniature", "--reward", "x"], "--reward: reward 'x' is unknown"),
        (["evaluate", "miniature", "--json", "no/such.json"], "--json: no folder no "),
        (["sample", "miniature"], "prompts: must be given by --prompt or by --prompts"),
        (["sample", "miniature", "--prompts", "none.txt"], "prompt file none.txt does not exist"),
        (["sample", "miniature", "--prompt", "a cat", "--out", "."], "--out: . is a folder; mu"),
        (["sample", "miniature", "--prompt", "a cat", "--out", "a.jpg"], "--out: got a.jpg; the"),
        (
            ["evaluate", "miniature", "--json", "a.html", "--page", "./a.html"],
            "--json and --page: both got a.html; must be two files",
        ),
        (["sample", "~/none", "--prompt", "a cat"], "MODEL: no folder ~/none; must be"),
        (
            ["sample", "miniature", "--prompt", "a cat", "--guidance-scale", "inf"],
            "--guidance-scale: got inf; must be finite",
        ),
        (
            ["evaluate", "miniature", "--guidance-scale", "inf"],
            "--guidance-scale: got inf; must be finite",
        ),
    ],
)
def test_what_cannot_run_is_refused(
    arguments: list[str], message: str, treegrpo: CommandLine
) -> None:
    assert treegrpo.refusal(*arguments).startswith(message)


def test_prompts_of_another_kind_are_refused_before_the_model_is_loaded(
    treegrpo: CommandLine,
) -> None:
    Path("own.txt").write_text("a red circle\na cat\n")
    arguments = ("prompts.train=own.txt", "prompts.held_out=miniature", "output=run")
    message = treegrpo.refusal("train", *arguments)
    for name in ("composition", "composition_accuracy"):
        assert f"\n  reward '{name}': prompt 'a cat' is not one of the miniature's" in message
    assert not Path("run").exists()


def test_a_folder_with_a_run_is_neither_mixed_nor_lost(treegrpo: CommandLine) -> None:
    for name in (
        *("run/config.yaml", "run/versions.json", "run/metrics.jsonl", "run/model/unet"),
        *("failed/config.yaml", "failed/versions.json"),
        *("other/thesis.tex", "project/config.yaml", "project/thesis.tex"),
    ):
        Path(name).parent.mkdir(exist_ok=True, parents=True)
        Path(name).touch()
    assert "already holds a run" in treegrpo.refusal("train", "output=run")
    assert "holds no run, so" in treegrpo.refusal("train", "output=other")
    # Overwriting is for runs; a mistyped output must not delete anything else.
    assert "holds no run, so" in treegrpo.refusal("train", "output=other", "--overwrite")
    # A configuration of the user's own makes no run of a folder.
    assert "holds no run, so" in treegrpo.refusal("train", "output=project", "--overwrite")
    # A run that ended before its first result is not in the way.
    check_run_folder(load_config(None, ["output=failed"]), resume=False, overwrite=False)
    # What a run starts from must not be replaced by it.
    config = load_config(None, ["output=run", "model.path=run/model"])
    with pytest.raises(RunError, match=r"^model\.path: run/model belongs to the run in run"):
        check_run_folder(config, resume=False, overwrite=True)


def test_overwriting_removes_what_a_run_wrote_and_nothing_else(treegrpo: CommandLine) -> None:
    for name in ("notes.txt", "src/a.py", "config.yaml", "versions.json", "model/old", "curve.png"):
        Path("run", name).parent.mkdir(exist_ok=True, parents=True)
        Path("run", name).touch()
    prepare_folder(load_config(None, ["output=run"]), resume=False, overwrite=True)
    left = sorted(str(path) for path in Path("run").rglob("*") if path.is_file())
    assert left == ["run/config.yaml", "run/notes.txt", "run/src/a.py", "run/versions.json"]
    # Both are the new run's.
    assert Path("run/config.yaml").stat().st_size and Path("run/versions.json").stat().st_size


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["train", "--print-config"], 0),
        (["train", "rollout.branching=0"], 2),
        # The last check of each command, so that all of them have run.
        (["train", "output=file"], 2),
        (["plan", "--processes", "3"], 2),
        (["sample", "miniature", "--prompt", "a cat", "--out", "no/such.png"], 2),
        (["evaluate", "miniature", "--json", "no/such.json"], 2),
        (["compare", "--budget", "1"], 2),
        (["compare", "model.path=./no"], 2),
        (["serve-reward", "compositon"], 2),
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

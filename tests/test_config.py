from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from treegrpo.config import (
    RECIPES,
    Config,
    ConfigError,
    configuration_file,
    describe_fields,
    load_config,
    method_of,
    to_yaml,
)
from treegrpo.config.wording import methods_with
from treegrpo.miniature import EMBEDDED
from treegrpo.rewards import check_reward


def refused(*overrides: str, path: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    return str(caught.value)


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_the_default_is_the_miniature_job() -> None:
    config = load_config(None, [])
    assert config == Config()
    assert (config.model.path, config.prompts.train) == ("miniature", "miniature")
    assert {reward.name: reward.weight for reward in config.rewards} == {
        "composition": 1.0,
        "composition_accuracy": 0.0,
    }


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "rollout:\n  branching: 2\n  window_size: 4\ntrain:\nrewards:\n- name: clip\n",
    )
    config: Any = load_config(
        path, ["rollout.branching=4", "rewards.0.weight=0.5", "output=runs/a=b"]
    )
    assert config.rollout.branching == 4
    assert config.rollout.window_size == 4
    assert config.rollout.steps == Config().rollout.steps
    assert config.train == Config().train  # a section with nothing in it changes nothing
    assert [(reward.name, reward.weight) for reward in config.rewards] == [("clip", 0.5)]
    assert config.output == Path("runs/a=b")


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("2E3", 2000.0), (".5e-1", 0.05), ("3", 3.0)]
)
def test_every_usual_way_to_write_a_number_is_one(text: str, value: float) -> None:
    assert load_config(None, [f"train.learning_rate={text}"]).train.learning_rate == value


@pytest.mark.parametrize(
    ("override", "value"),
    [
        # An argument is a value: nothing in it is a comment, and what takes text gets it all.
        ("output=runs/exp #2", Path("runs/exp #2")),
        ("output=#2", Path("#2")),
        ("model.negative_prompt=ugly #nsfw", "ugly #nsfw"),
        ("model.negative_prompt=blurry, low quality: bad", "blurry, low quality: bad"),
        ("model.negative_prompt=[deformed", "[deformed"),
        ("model.negative_prompt=[a, b]", "[a, b]"),
        ('model.negative_prompt="a" and "b"', '"a" and "b"'),
        ("model.negative_prompt='ugly #nsfw'", "ugly #nsfw"),
        ("model.negative_prompt='ugly' #nsfw", "'ugly' #nsfw"),
        ("model.negative_prompt=", ""),
        ("model.negative_prompt=null", None),
        ("model.negative_prompt='null'", "null"),
        ("model.path=null", "null"),
        ("model.path=no", "no"),
        ("model.path=1e5", "1e5"),
        ("prompts.train=2020-01-01", "2020-01-01"),
        ("prompts.held_out=- a", "- a"),
        ("rewards.0.label=off", "off"),
        ("model.lora_targets=[to_q, 'a #b']", ["to_q", "a #b"]),
        # A reward's own options have no type that is known here.
        ("rewards.0.options.path=weights/v1 #2", "weights/v1 #2"),
        ("rewards.0.options.question=Is it good: yes", "Is it good: yes"),
        ("rewards.0.options.question=good: yes or no: no", "good: yes or no: no"),
        ("rewards.0.options.threads=3", 3),
        ("rewards.0.options.levels={a: [1, 2]}", {"a": [1, 2]}),
    ],
)
def test_an_overrides_value_is_no_document(override: str, value: object) -> None:
    found: Any = load_config(None, [override])
    for key in override.partition("=")[0].split("."):
        found = found[int(key)] if isinstance(found, list) else _of(found, key)
    assert found == value


def _of(section: Any, key: str) -> Any:
    return section[key] if isinstance(section, dict) else getattr(section, key)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.seed=3 #4", 'train.seed: got "3 #4"; must be an integer'),
        ("model.compile=yes #no", 'model.compile: got "yes #no"; must be true or false'),
        ("train.iterations=a: b", 'train.iterations: got {"a": "b"}; must be an integer'),
        (
            "model.lora_targets=[to_q] #2",
            'override "model.lora_targets=[to_q] #2", line 1, column 7: not valid YAML: '
            '"#" would begin a comment; quote the text that it is in',
        ),
        ("model.path=", 'model.path: got ""; must not be empty'),
    ],
)
def test_a_comment_in_an_override_is_refused(override: str, message: str) -> None:
    assert refused(override) == message


def test_yaml_round_trips(tmp_path: Path) -> None:
    # A name that reads as a number, a path that reads as null and a float that YAML 1.1 takes for
    # text are where a plain dump fails.
    config = load_config(
        None,
        [
            "model.path='1e5'",
            "prompts.train='null'",
            "advantage.eps=1e-22",
            "model.lora_targets=[to_q, to_k]",
            "rollout.method=branch_grpo",
            "rollout.split_steps=[0, 3]",
        ],
    )
    assert config.model.path == "1e5"
    assert load_config(written(tmp_path, to_yaml(config)), []) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.branching=0", "rollout.branching: got 0; must be at least 1"),
        ("rollout.steps=true", "rollout.steps: got true; must be an integer"),
        ("rollout.steps='3'", 'rollout.steps: got "3"; must be an integer'),
        ("model.height=1.5", "model.height: got 1.5; must be an integer"),
        ("train.learning_rate=.inf", "train.learning_rate: got Infinity; must be finite"),
        ("train.adam_beta1=1", "train.adam_beta1: got 1; must be less than 1"),
        (
            "model.dtype=float16",
            'model.dtype: got "float16"; must be one of "float32", "bfloat16"',
        ),
        ("rollout=3", "rollout: got 3; must be keys and values"),
        ("rollout.branchng=3", 'rollout.branchng: unknown key; did you mean "branching"?'),
        ("branching=3", 'branching: unknown key; did you mean "rollout.branching"?'),
        ("rewards.0.wieght=1", 'rewards.0.wieght: unknown key; did you mean "weight"?'),
        (
            "prompts.xyz=1",
            "prompts.xyz: unknown key; must be one of train, held_out, "
            "held_out_share, column, held_out_column",
        ),
        ("rewards.2.weight=1", "rewards.2: no such element; must be 0 to 1"),
        ("rewards=[{weight: 1}]", "rewards.0.name: missing; must be given"),
        ("rollout.steps.x=3", 'rollout.steps: has no key "x"; its value is 10'),
        ("rollout.steps", 'override "rollout.steps": must be key.path=value'),
    ],
)
def test_a_problem_names_the_key_the_value_and_what_is_allowed(override: str, message: str) -> None:
    assert refused(override) == message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.steps=2"], "rollout.window_size: got 3; must be at most rollout.steps (2)"),
        (
            ["rollout.window_schedule=fixed", "rollout.window_start=8"],
            "rollout.window_start: got 8; must be at most 7: "
            "rollout.steps (10) - rollout.window_size (3)",
        ),
        (
            ["rollout.method=branch_grpo", "rollout.split_steps=[0, 12]"],
            "rollout.split_steps: got [0, 12]; must be steps from 0 to 9 (rollout.steps is 10)",
        ),
        (
            ["rollout.split_steps=[1]"],
            "rollout.split_steps: tree_grpo has no such setting; branch_grpo has",
        ),
        (
            ["rollout.branching=9", "rollout.trees=2"],
            "rollout.max_leaves: got 512; a prompt would have 2 * 9^3 = 1458 samples "
            "(trees * branching^window_size); use fewer, or raise max_leaves",
        ),
        (
            ["rollout.method=flow_grpo", "rollout.group_size=600"],
            "rollout.max_leaves: got 512; must be at least rollout.group_size (600)",
        ),
        (
            ["train.updates_per_iteration=3"],
            "train.updates_per_iteration: got 3; must divide rollout.prompts_per_iteration (16)",
        ),
        (
            ["rewards=[{name: a}, {name: a}]"],
            'rewards: got ["a", "a"]; must name each reward once; '
            "give a label where one is used twice",
        ),
        (
            ["rewards=[{name: a, weight: 0}]"],
            'rewards: got {"a": 0.0}; must have at least one reward with a weight above 0',
        ),
    ],
)
def test_fields_that_contradict_each_other_are_refused(overrides: list[str], message: str) -> None:
    assert refused(*overrides) == message


def test_settings_of_other_methods_do_not_get_in_the_way() -> None:
    # Of the default window of three steps.
    assert load_config(None, ["rollout.method=flow_grpo", "rollout.steps=2"]).rollout.steps == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "rollout.trees=7",
            "rollout.trees: flow_grpo has no such setting; tree_grpo and tree_endpoint have",
        ),
        (
            "rollout.branching=2",
            "rollout.branching: flow_grpo has no such setting; tree_grpo, tree_endpoint and "
            "branch_grpo have",
        ),
        (
            "advantage.backup=uniform",
            "advantage.backup: flow_grpo has no such setting; tree_grpo and tree_endpoint have",
        ),
    ],
)
def test_settings_of_other_methods_are_refused_by_name(
    override: str, message: str, tmp_path: Path
) -> None:
    assert refused("rollout.method=flow_grpo", override) == message
    # In a file as well, if the file names the method.
    key, _, value = override.partition("=")
    section, _, name = key.partition(".")
    rollout = {"method": "flow_grpo"} | ({name: value} if section == "rollout" else {})
    data = {"rollout": rollout} | ({section: {name: value}} if section != "rollout" else {})
    assert refused(path=written(tmp_path, yaml.safe_dump(data))).startswith(message)


def test_another_method_leaves_behind_what_only_the_files_method_has(tmp_path: Path) -> None:
    rollout, advantage = "{branching: 2, window_size: 4, steps: 6}", "{backup: uniform, eps: 1e-3}"
    path = written(tmp_path, f"rollout: {rollout}\nadvantage: {advantage}\n")
    config: Any = load_config(path, [])
    assert config.rollout.window_size == 4
    config = load_config(path, ["rollout.method=mix_grpo", "rollout.group_size=5"])
    assert (config.rollout.window_size, config.rollout.group_size) == (4, 5)
    assert (config.rollout.steps, config.advantage.eps) == (6, 1e-3)
    assert not hasattr(config.rollout, "branching") and not hasattr(config.advantage, "backup")
    # A slip in the file is none of another method's business.
    slip = written(tmp_path, "rollout: {branchng: 2}\n")
    assert refused("rollout.method=flow_grpo", path=slip).startswith(
        "rollout.branchng: unknown key"
    )


def test_an_unknown_method_is_refused_with_the_nearest() -> None:
    message = refused("rollout.method=flow_gpro", "rollout.group_size=3")
    assert message.startswith('rollout.method: got "flow_gpro"; must be one of tree_grpo, ')
    assert "(did you mean flow_grpo?)" in message
    assert "rollout.method: got" in refused("rollout.method=json:loads")
    # Keys of a method that cannot be found are not told as unknown.
    alone = refused("rollout.method=no_such_module:Mine", "rollout.mine=3", "train.sed=1")
    assert [line.split(":")[0].strip() for line in alone.splitlines()[1:]] == [
        "rollout.method",
        "train.sed",
    ]


def test_an_astronomical_tree_is_refused_without_computing_it() -> None:
    message = refused("rollout.steps=1000000000", "rollout.window_size=1000000000")
    assert "1 * 3^1000000000 samples" in message


def test_all_problems_are_listed_at_once() -> None:
    lines = refused("rollout.branching=0", "train.sed=1", "model.dtype=half").splitlines()
    assert lines[0] == "the configuration has 3 problems:"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "model.dtype",
        "rollout.branching",
        "train.sed",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"rollout:\n  steps: [1\n", "line 3"),
        (
            b"train:\n  seed: 1\n  seed: 2\n",
            'line 3, column 3: not valid YAML: key "seed" is given',
        ),
        (b"- 1\n", "got [1]; must be keys and values"),
        (b"model:\n  path: caf\xe9\n", "is not UTF-8: byte 0xe9 at offset 18, line 2"),
        (b"train:\n  seed: 2020-99-99\n", "not valid YAML: month must be in 1..12"),
    ],
)
def test_an_unreadable_file_says_where(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    refusal = refused(path=path)
    assert str(path) in refusal
    assert message in refusal


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    assert refused(path=path) == f"configuration file {path} does not exist"


def test_every_field_has_a_sentence_and_accepts_its_own_default() -> None:
    fields = list(describe_fields())
    assert len(fields) > 50
    for key, default, sentence in fields:
        assert sentence.endswith("."), key
        if default != "required":
            method = next(iter(methods_with(key)), "tree_grpo")
            override = f"{key.replace('.N.', '.0.')}={default}"
            load_config(None, [f"rollout.method={method}", override])


def test_a_configuration_does_not_change() -> None:
    with pytest.raises(ValidationError):
        Config().train.seed = 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_complete(recipe: str) -> None:
    config = load_config(configuration_file(recipe), [])
    for reward in config.rewards:
        check_reward(reward.name, reward.options)
    method_of(config).checked_plans(config.train.iterations)
    if config.model.path not in EMBEDDED:
        # Nothing of the miniatures' may be left where another model is trained.
        assert config.accuracy is None
        assert config.prompts.train != "miniature"
        assert config.output.name == recipe


def test_the_recipe_of_the_paper_has_its_numbers() -> None:
    config: Any = load_config(configuration_file("sd3.5-medium"), [])
    plan = method_of(config).plan(0)
    window = slice(plan.stochastic_steps[0], plan.stochastic_steps[0] + 3)
    assert (config.rollout.steps, plan.branching[window], plan.leaves) == (10, (3, 3, 3), 27)
    assert (config.rollout.window_decay, config.rollout.noise_level) == (0.5, 0.7)
    assert (config.train.learning_rate, config.train.weight_decay) == (1e-5, 0.01)
    assert (config.train.iterations, config.model.guidance_scale) == (250, 4.5)
    assert config.rollout.prompts_per_iteration % 8 == 0  # GPUs

"""Published methods in a config: what docs/config.md says of each, on every config, under any flag."""

import ast
import pathlib
import runpy

import pytest

from jaxagentrl import methods, settings

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def load(name: str, method: str = ""):
    return runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"](method)


def values(config) -> dict:
    return dict(settings.flat(config.to_dict()))


def differences(one: dict, two: dict) -> set[str]:
    assert one.keys() == two.keys()
    return {key for key, value in one.items() if value != two[key]}


def documented() -> dict[str, dict]:
    """The table of docs/config.md: of each method the keys whose value is written out."""
    text = (ROOT / "docs" / "config.md").read_text()
    section = text.partition("## Published methods, set exactly\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    (_, *names), _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    told = {name.strip("`"): {} for name in names}
    for key, *cells in rows:
        for of, cell in zip(told.values(), cells, strict=True):
            if cell.startswith("`"):  # others are empty, or words
                of[key.strip("`")] = ast.literal_eval(cell.strip("`"))
    return told


def test_the_docs_tell_of_every_method_what_it_sets():
    told = documented()
    assert list(told) == list(methods.METHODS)
    for name, keys in told.items():
        assert len(keys) > 8
        found = values(load("textworld_quickstart", name))
        assert {key: found[key] for key in keys} == keys, name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("method", methods.METHODS)
def test_every_config_takes_every_method(path, method):
    own, config = load(path.stem), load(path.stem, method)
    if not own.model.directory:
        config.model.directory = config.tokenizer.directory = "some/model"
    settings.check(config.to_dict())
    assert config.rl.tasks_per_iteration * config.rl.group_size == own.rl.tasks_per_iteration * own.rl.group_size


@pytest.mark.parametrize("method", methods.METHODS)
def test_what_a_config_had_before_leaves_no_trace_in_a_method(method):
    """After another method, and after a config's own credit, it is the same."""
    fresh = values(load("textworld_quickstart", method))
    for other in methods.METHODS:
        config = methods.apply(load("textworld_quickstart", other), method)
        told = documented()[method]
        assert {key: values(config)[key] for key in told} == told
        idle = settings.unused(config.to_dict())
        # The temperature is PPO's and would stay; groups that were given up are of eight again.
        left = {key for key in differences(fresh, values(config)) if not is_idle(key, idle)}
        assert left <= {"rollout.temperature"}, (other, left)


def is_idle(key: str, idle: list[str]) -> bool:
    return any(key == name or name.endswith(".*") and key.startswith(name[:-1]) for name in idle)


# What a recipe says beside its method's paper, or that is without effect there.
@pytest.mark.parametrize(
    "recipe, method, beside",
    [
        ("textworld_qwen2_5_1_5b", "ppo", set()),
        ("alfworld_qwen2_5_7b", "ppo", set()),
        ("alfworld_qwen2_5_1_5b", "gigpo", {"rl.skip_zero_signal", "rl.loss.dual_clip", "reward.no_end_of_turn_penalty"}),
        ("swe_gym_qwen3_8b", "grpo", {"rl.kl.coefficient", "rl.loss.dual_clip", "rl.aggregation"}),
    ],
)
def test_a_papers_recipe_has_its_method(recipe, method, beside):
    own, config = values(load(recipe)), values(load(recipe, method))
    rate = "rl.critic_learning_rate"
    if own[rate] is not None:
        assert config.pop(rate) == pytest.approx(own.pop(rate), rel=1e-12)
    assert differences(own, config) == beside


def test_without_a_method_a_config_is_its_own():
    assert values(load("textworld_quickstart", "")) == values(load("textworld_quickstart"))


def test_the_constant_is_the_most_tokens_of_an_episode():
    """In the quick start of its turns, in a repository of the one context that they share."""
    assert load("textworld_quickstart", "dr_grpo").rl.aggregation_constant == 12 * 12
    assert load("swe_gym_qwen3_8b", "dr_grpo").rl.aggregation_constant == 16_384
    assert load("alfworld_qwen2_5_1_5b", "dr_grpo").rl.aggregation_constant == 50 * 512  # each with a context of its own


def test_a_method_of_one_step_keeps_the_schedules_iterations():
    own, config = load("swe_quickstart"), load("swe_quickstart", "rloo")
    assert own.rl.num_minibatches * own.rl.num_epochs == 4 and config.rl.num_minibatches * config.rl.num_epochs == 1
    assert config.rl.optimizer.decay_steps == own.rl.optimizer.decay_steps // 4 == own.rl.num_iterations
    assert config.rl.optimizer.warmup_steps == own.rl.optimizer.warmup_steps // 4


def test_answers_without_their_form_cost_what_gigpo_says():
    paid = [values(load(name, "gigpo")) for name in ("textworld_quickstart", "alfworld_qwen2_5_1_5b")]
    assert [config["reward.no_end_of_turn_penalty"] for config in paid] == [0.01, 0.01]
    assert [config["reward.invalid_penalty"] for config in paid] == [0.0, 0.01]


def test_adapters_get_a_critic_that_they_can_have():
    config = load("textworld_quickstart")
    config.lora.rank = 4
    assert methods.apply(config, "ppo").rl.critic == "head"
    assert methods.apply(load("textworld_quickstart"), "ppo").rl.critic == "separate"


def test_games_that_are_played_once_become_groups():
    config = methods.apply(load("textworld_qwen2_5_1_5b"), "rloo")
    assert (config.rl.tasks_per_iteration, config.rl.group_size) == (32, 8)
    config = load("textworld_qwen2_5_1_5b")
    config.rl.tasks_per_iteration = 20
    with pytest.raises(ValueError, match="tasks_per_iteration is 20 games played once"):
        methods.apply(config, "grpo")


def test_another_name_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="grp names no published method: it is one of ppo, grpo, dr_grpo"):
        methods.apply(load("textworld_quickstart"), "grp")

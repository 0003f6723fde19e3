"""docs/own_environment.md as a user follows it, through the real command line; and files of tasks."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from test_settings import changed

import envs_host
from envs_host import collect, own_tasks
from jaxagentrl import settings

ROOT = pathlib.Path(__file__).parents[1]
SMALL = """
    config.sampling.update(filled_buckets=(176,), width_buckets=(64,), row_divisors=(1, 4))
    config.sft.update(num_steps=60)
    config.sft.optimizer.update(decay_steps=60)
    config.rl.update(num_iterations=2)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """The page's files, on the smoke config instead of the quick start."""
    folder = tmp_path_factory.mktemp("own")
    page = (ROOT / "docs" / "own_environment.md").read_text()
    blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", page, flags=re.S)
    assert [name for name, _ in blocks] == [
        "guess.py", "make_tasks.py", "guess_config.py", "oracle.py", "make_calls.py", "oracle_config.py", "lake.py",
        "lake_config.py",
    ]  # fmt: skip
    for name, text in blocks:
        text = text.replace("configs/textworld_quickstart.py", str(ROOT / "configs" / "textworld_smoke.py"))
        (folder / name).write_text(text.replace("    return methods", f"{SMALL}    return methods"))
    run(folder, "make_tasks.py")
    run(folder, "make_calls.py")
    return folder


def run(folder, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # the folder is where the commands are given
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def train(folder, config, name, *flags):
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
    flags = (*flags, f"--config.env.cache_dir={folder / 'cache'}", f"--config.compilation_cache_dir={cache}")
    run(folder, "-m", "jaxagentrl.main", f"--config={config}", f"--workdir={folder / name}", *flags)
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["phase"] == "baseline" and lines[-1]["phase"] == "rl"
    return lines[0], lines[-1]


@pytest.mark.slow
def test_the_pages_environment_is_trained_on(folder):
    begun, ended = train(folder, "guess_config.py", "run")
    assert begun["walkthrough/success_rate"] == 56 / 64 and ended["eval/success_rate"] > begun["eval/success_rate"]
    assert "random/success_rate" not in begun  # the class lists no commands to draw from

    shown = run(folder, ROOT / "tools" / "play.py", "run", "--agent", "walkthrough").stdout
    assert shown.startswith("guess-256: ") and "won (the game ended)" in shown

    # From that model on, by RL alone, without anything to imitate.
    text = (folder / "guess.jsonl").read_text()
    (folder / "bare.jsonl").write_text(re.sub(r', "walkthrough": \[.*?\]', "", text))
    (folder / "bare_config.py").write_text(
        "import runpy\n\n\ndef get_config():\n"
        '    config = runpy.run_path("guess_config.py")["get_config"]()\n'
        '    config.env.params = dict(family="tasks", path="bare.jsonl")\n'
        "    config.splits = dict(train=(0, 256), test=(256, 64))\n"
        "    config.sft.num_steps = 0\n"
        '    config.model.directory = config.tokenizer.directory = "run/model"\n'
        "    return config\n"
    )
    loaded, further = train(folder, "bare_config.py", "further")
    assert loaded["eval/success_rate"] == ended["eval/success_rate"] and further["eval/episodes"] == 64
    assert "walkthrough/success_rate" not in loaded


@pytest.mark.slow
def test_the_pages_tools_are_learned_to_call(folder):
    longer = ("--config.sft.num_steps=200", "--config.sft.optimizer.decay_steps=200")  # than SMALL, for the form of a call
    begun, ended = train(folder, "oracle_config.py", "oracle", *longer)
    assert begun["walkthrough/success_rate"] == 56 / 64 and ended["eval/success_rate"] > begun["eval/success_rate"]
    shown = run(folder, ROOT / "tools" / "play.py", "oracle", "--agent", "walkthrough").stdout
    assert '{"name": "guess", "arguments": {"number":' in shown and "won (the game ended)" in shown


@pytest.mark.slow
def test_the_pages_gymnasium_environment_is_trained_on(folder):
    larger = '--config.splits={"demo": (1, 60), "train": (1001, 40), "test": (2001, 40), "test_larger": (3001, 20, LARGER)}'
    larger = larger.replace("LARGER", '{"kwargs": {"size": 5}}')
    begun, ended = train(folder, "lake_config.py", "lake", larger)
    assert begun["walkthrough/success_rate"] == 1 and begun["random/success_rate"] < 0.3
    assert begun["eval/success_rate"] == 0 < ended["eval/success_rate"] and 30 <= ended["eval/episodes"] <= 40
    assert 0 < ended["eval_larger/episodes"] <= 20
    shown = run(folder, ROOT / "tools" / "play.py", "lake", "--agent", "walkthrough").stdout
    assert "Walk from S to G" in shown and "won (the game ended)" in shown


@pytest.mark.slow
def test_the_doctor_examines_the_pages_environments(folder):
    doctor = [ROOT / "tools" / "env_doctor.py", "--num_episodes=8"]
    assert "| guess:Guess |" in run(folder, *doctor, "--env=guess:Guess", "--tasks=guess.jsonl").stdout
    assert "| nonsense is answered, not raised | yes |" in run(
        folder, *doctor, "--env=oracle:Oracle", "--tasks=oracle.jsonl"
    ).stdout
    params = {"family": "gymnasium", "id": "lake:Lake-v0", "actions": ["left", "down", "right", "up"]}
    told = run(folder, *doctor, "--env=gymnasium", f"--params={json.dumps(params)}").stdout
    assert "| two processes at once, one killed and replayed: same answers | yes |" in told and "gymnasium 1." in told


def write(tmp_path, *lines):
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def test_a_task_needs_a_name_and_nothing_else(tmp_path):
    path = write(tmp_path, {"name": "a"}, "", {"name": "b", "file": "b.txt", "max_score": 3, "seed": 7})
    first, second = own_tasks.read(path)
    assert (first.max_score, first.walkthrough, first.params, first.file) == (1.0, (), {}, "")
    assert (second.max_score, second.seed, second.file) == (3, 7, str(tmp_path / "b.txt"))
    assert first.digest != second.digest and len(first.digest) == 64
    again = write(tmp_path, first.to_json(), second.to_json())
    assert own_tasks.read(again) == [first, second]


@pytest.mark.parametrize(
    "lines, words",
    [
        ([{"name": "a"}, {"name": "a", "seed": 1}], "line 2: it has the name or digest of line 1"),
        ([{"params": {}}], "line 1: expected an object with `name`"),
        ([{"name": "a", "goal": "x"}], "line 1: expected an object with `name`"),
        (["{"], "line 1: expected a JSON object"),
        ([{"name": "a", "max_score": 0}], "`max_score` must be a number above 0, got 0"),
        ([{"name": "a", "max_score": True}], "`max_score` must be"),
        ([{"name": "a", "walkthrough": "go"}], "`walkthrough` must be texts"),
        ([{"name": "a", "digest": "d"}], "`digest` must be 64 hexadecimal digits"),
        ([{"name": ""}], "`name` must be"),
        ([{"name": "a", "seed": -1}], "`seed` must be"),
    ],
)
def test_lines_that_are_no_tasks_are_named(tmp_path, lines, words):
    path = write(tmp_path, *lines)
    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        own_tasks.read(path)
    assert path in str(raised.value)


def test_a_split_counts_lines_in_their_order(tmp_path):
    path = write(tmp_path, *({"name": f"t{n}"} for n in range(10)))
    options = dict(first=100, cache_dir=str(tmp_path), num_workers=1)
    params = {"family": "tasks", "path": path}
    found = collect.tasks(params, range(103, 106), **options)
    assert [task.name for task in found.tasks] == ["t3", "t4", "t5"]
    with pytest.raises(ValueError, match="there are 10 tasks, counted from 100, but a split asks for 103 to 110"):
        collect.tasks(params, range(103, 111), **options)
    with pytest.raises(ValueError, match="tasks needs the parameters path; got file, path"):
        collect.tasks(params | {"file": "x"}, range(103, 106), **options)
    with pytest.raises(ValueError, match="nowhere.jsonl cannot be read"):
        collect.tasks(params | {"path": "nowhere.jsonl"}, range(103, 106), **options)


class Silent:
    """Takes no option."""

    def reset(self, task): ...

    def step(self, text): ...

    def close(self): ...


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"reward.kind": "intermediate"}, "reward.kind is 'intermediate', but .* no option intermediate_reward"),
        ({"prompt.show_admissible": True}, "prompt.show_admissible is True, but .* no option admissible_commands"),
        ({"splits": {"train": (0, 1), "test": (1, 1)}}, "demo may be missing where sft.num_steps is 0"),
    ],
)
def test_what_a_class_does_not_take_is_not_asked_of_it(changes, words):
    own = {"env.name": "test_own_environment:Silent", "env.params": {"family": "tasks", "path": "x.jsonl"}}
    own |= {"reward.kind": "single", "reward.intermediate_scale": None, "namings": {"demo": 1, "train": 1}}
    settings.check(changed("textworld_quickstart.py", **own))
    with pytest.raises(ValueError, match=words):
        settings.check(changed("textworld_quickstart.py", **own | changes))


def test_an_environment_says_what_it_takes():
    assert envs_host.takes("textworld", "admissible_commands")
    assert not envs_host.takes("test_own_environment:Silent", "admissible_commands")

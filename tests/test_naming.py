"""Games under other names: the same games."""

import hypothesis
import pytest
from hypothesis import strategies as st

from envs_host import naming, textworld
from jaxagentrl import rollout

pytestmark = pytest.mark.filterwarnings("ignore:.*is not fully supported")

BASIC = {"family": "custom", "world_size": 2, "nb_objects": 3, "quest_length": 4, "theme": "basic"}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    specs = [BASIC | {"seed": 50001}, BASIC | {"seed": 2}, BASIC | {"seed": 50004, "theme": "house"}]
    cache_dir = tmp_path_factory.getbasetemp() / "textworld-games"
    return textworld.generate(specs, cache_dir=cache_dir, progress=False).tasks


WORDS = st.sampled_from(
    ["thing", "box", "room", "Thing", "-box", "-key", "Z", "z", "A", " ", "0", "7", "07", "42", "100", "."]
)


@hypothesis.given(st.lists(WORDS).map("".join) | st.text(), st.integers(1, 50))
def test_reading_undoes_showing(text, number):
    found = naming._make(7, number)
    assert found.read(found.show(text)) == text


def test_numbers_and_letters_are_permuted_and_nothing_else():
    found = naming._make(7, 1)
    text = "You are in the room5. There is a closed Z-box. The z-key is in box5, not box05, 44 or box500."
    shown = found.show(text)
    five, pair, letter = found.shown["5"], found.shown["05"], found.shown["Z"]
    assert (five, letter) != ("5", "Z")
    assert shown == (
        f"You are in the room{five}. There is a closed {letter}-box. The {letter.lower()}-key is in "
        f"box{five}, not box{pair}, 44 or box500."
    )
    assert sorted(found.shown) == sorted(found.shown.values())
    for name, new in found.shown.items():  # what is common stays common
        assert len(new) == len(name) and len(set(new)) == len(set(name))
    assert naming._make(7, 2).shown != found.shown != naming._make(8, 1).shown


def test_a_renamed_game_is_the_game(tasks):
    """Walked through side by side, with every name exchanged and back."""
    for task in tasks[:2]:
        other = naming.renamed(task, 3)
        found = naming.of(other)
        assert other.digest == task.digest and other.objective == found.show(task.objective)
        env, twin = (
            textworld.TextWorldEnv(intermediate_reward=True, admissible_commands=True)
            for _ in range(2)
        )
        plain, shown = env.reset(task), twin.reset(other)
        for command, as_shown in zip(task.walkthrough, other.walkthrough, strict=True):
            assert shown.observation == found.show(plain.observation)
            assert shown.info.objective == other.objective
            commands = map(found.show, plain.info.admissible_commands)
            assert list(shown.info.admissible_commands) == list(commands)
            wrong = env.step("take thing99"), twin.step(found.show("take thing99"))
            assert wrong[1].observation == found.show(wrong[0].observation)
            plain, shown = env.step(command), twin.step(as_shown)
            assert shown.info.command == as_shown
            assert shown.info.intermediate_reward == plain.info.intermediate_reward == 1.0
        assert shown.info.won and shown.terminated
        # A name of the game itself means another thing, or nothing, under the naming.
        assert other.walkthrough != task.walkthrough


def test_the_games_own_names_are_naming_0_and_names_with_a_meaning_stay(tasks):
    assert naming.renamed(tasks[0], 0) is tasks[0] and naming.of(tasks[0]) is None
    with pytest.raises(ValueError, match="theme 'basic'.*under its own"):
        naming.renamed(tasks[2], 1)


def test_a_naming_has_its_own_randomness(tasks):
    words = {rollout.task_word(naming.renamed(tasks[0], number)) for number in range(20)}
    assert len(words) == 20

"""Classes whose methods are tools: what is a call, how they are played, what is refused, what models are told."""

import inspect
import json

import numpy as np
import pytest
import their_tokenizers
import toolboxes

import envs_host
from envs_host import tool_calls, tools
from envs_host.pool import EnvPool
from envs_host.tool_calls import Call, written
from envs_host.types import EnvFailure, Task
from jaxagentrl import chat, tokenizer

ORDERS = {"17": "lamp", "23": "chair"}


def task(max_score=1.0, **params):
    return Task(
        env="", name="t", params=params, seed=0, file="", digest="0" * 64, objective="Help.", max_score=max_score,
        walkthrough=(),
    )  # fmt: skip


def desk(**options):
    env = envs_host.make("toolboxes:Desk", **options)
    opened = env.reset(task(0.5, item="lamp", orders=ORDERS))
    assert opened.observation == "My lamp is broken." and opened.info.objective == "Help."
    return env


def answered(env, *calls):
    return env.step("\n".join(written(name, **arguments) for name, arguments in calls))


@pytest.mark.parametrize(
    "text, calls",
    [
        (written("look", order="17"), [Call("look", {"order": "17"})]),
        ('<tool_call>{"name":"a","arguments":{}}</tool_call>', [Call("a", {})]),
        (f"So.\n{written('a')}\n and {written('b', x=[1, None])}.", [Call("a", {}), Call("b", {"x": [1, None]})]),
        ('{"name": "a", "parameters": {"x": 1}}', [Call("a", {"x": 1})]),  # Llama 3
        ('[{"name": "a", "arguments": {}}, {"name": "b", "arguments": {}}]', [Call("a", {}), Call("b", {})]),  # Mistral
        # Answers, which call nothing.
        ("It is the lamp.", []),
        ("", []),
        ('{"name": "Ada"}', []),
        ('[{"name": "a", "arguments": {}}, 3]', []),
        ("[]", []),
        ("{", []),
        ("[" * 100_000, []),
        ('{"name": "a", "arguments": {}, "parameters": {}}', []),
    ],
)
def test_calls_are_read(text, calls):
    assert tool_calls.read(text) == calls


@pytest.mark.parametrize(
    "text, words",
    [
        ('<tool_call>\n{"name": "a", "arguments": {}}', "must be closed"),
        ('{"name": "a", "arguments": {}}\n</tool_call>', "must be closed"),
        (f"<tool_call>{written('a')}", "must be closed"),
        ("<tool_call>look(17)</tool_call>", "'look.17.' is not JSON"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "is not JSON"),
        ('<tool_call>{"name": "a"}</tool_call>', "is no call"),
        ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', "is no call"),
        ('<tool_call>{"name": "a", "arguments": [17]}</tool_call>', "is no call"),
    ],
)
def test_what_is_meant_as_a_call_and_cannot_be_read(text, words):
    with pytest.raises(tool_calls.NotACall, match=words) as raised:
        tool_calls.read(text)
    assert tool_calls.FORM in str(raised.value) and len(str(raised.value)) < 500


def test_tools_are_called_and_their_results_heard():
    env = desk()
    result = answered(env, ("orders", {}))
    assert result.observation == '<tool_response>\n["17", "23"]\n</tool_response>'
    assert (result.reward, result.terminated, result.truncated, result.info.valid_command) == (0.0, False, False, True)
    assert not result.info.won and not result.info.lost
    result = answered(env, ("look", {"order": "23"}), ("look", {"order": "17", "part": "price"}))
    assert result.observation == (
        '<tool_response>\n{"item": "chair"}\n</tool_response>\n<tool_response>\n{"price": "3 EUR"}\n</tool_response>'
    )
    # Calls behind the one that ends the episode are not made.
    result = answered(env, ("refund", {"order": "17"}), ("refund", {"order": "23"}))
    assert result.observation == "<tool_response>\n\n</tool_response>"
    assert (result.reward, result.terminated, result.info.won, result.info.lost) == (0.5, True, True, False)
    assert result.info.score == result.info.max_score == 0.5
    with pytest.raises(RuntimeError, match="without a live episode"):
        env.step("more")


def test_an_episode_is_lost_by_the_wrong_end_or_by_a_message_without_calls():
    result = answered(desk(), ("refund", {"order": "23"}))
    assert (result.terminated, result.info.won, result.info.lost, result.reward) == (True, False, True, 0.0)
    result = desk().step("I cannot help.")
    assert (result.terminated, result.info.lost, result.info.valid_command, result.observation) == (True, True, True, "")


@pytest.mark.parametrize(
    "call, words",
    [
        (("pay", {}), "There is no tool 'pay': call one of orders, look, refund."),
        (("_book", {}), "There is no tool '_book'"),
        (("reset", {"item": "x", "orders": {}}), "There is no tool 'reset'"),
        (("look", {}), "look cannot be called so. order: Missing required argument."),
        (("look", {"order": "17", "of": 1}), "of: Unexpected keyword argument."),
        (("look", {"order": "17", "part": "size"}), "part: Input should be 'item' or 'price'."),
        (("refund", {"order": "17", "count": "two"}), "count: Input should be a valid integer"),
        (("look", {"order": "99"}), "There is no order 99."),
    ],
)
def test_what_an_agent_does_wrong_is_told_to_it(call, words):
    env = desk()
    result = answered(env, call, ("orders", {}))
    assert words in result.observation and '["17", "23"]' in result.observation
    assert (result.terminated, result.info.valid_command, result.reward) == (False, False, 0.0)
    assert answered(env, ("orders", {})).info.valid_command
    for text in ("<tool_call>", "", " \n"):  # An empty one is what is left of a thought that was cut.
        result = env.step(text)
        assert not result.info.valid_command and not result.terminated and tool_calls.FORM in result.observation


def test_the_reward_of_a_turn_is_by_how_much_the_score_rose():
    env = envs_host.make("toolboxes:Counter")
    env.reset(task(5.0))
    steps = [answered(env, ("add", {"number": number})) for number in (2, 0, -1, 4)]
    assert [step.reward for step in steps] == [2.0, 0.0, -1.0, 4.0] and steps[-1].info.score == 5.0
    assert [step.info.won for step in steps] == [False] * 4 and env.step("Enough.").info.won
    assert env.reset(task(5.0)).info.score == 0.0 and answered(env, ("add", {"number": 1})).reward == 1.0


def test_a_call_is_written_as_it_is_said():
    said = written("look", text="ünï ☃", name="a")
    assert "ünï ☃" in said and tool_calls.read(said) == [Call("look", {"text": "ünï ☃", "name": "a"})]


def test_a_number_in_quotes_is_a_number():
    assert answered(desk(), ("refund", {"order": "17", "count": "1"})).info.won


def test_a_final_message_is_told_to_finish_and_tools_that_close_are_made_again():
    toolboxes.Answering.made = 0
    env = envs_host.make("toolboxes:Answering")
    assert env.reset(task(secret="pear")).observation == ""
    assert answered(env, ("hint", {})).observation == "<tool_response>\np\n</tool_response>"
    result = env.step(" pear\n")
    # `won` is what the class says, whatever the reward.
    assert (result.terminated, result.info.won, result.reward) == (True, True, 0.3)
    env.close()
    env.close()
    env.reset(task(secret="plum"))
    assert toolboxes.Answering.made == 2
    result = env.step("pear")
    assert (result.info.lost, result.info.score) == (True, -0.1)


def test_options_are_the_classes_arguments():
    assert "3 USD" in answered(desk(currency="USD"), ("look", {"order": "17", "part": "price"})).observation
    envs_host.check_options("toolboxes:Desk", {"currency": "USD"})
    with pytest.raises(ValueError, match="'toolboxes:Desk' has no option money; it takes currency"):
        envs_host.check_options("toolboxes:Desk", {"money": 1})
    with pytest.raises(ValueError, match="env.options.currency must be a text, got 3"):
        envs_host.check_options("toolboxes:Desk", {"currency": 3})
    assert not envs_host.takes("toolboxes:Desk", "admissible_commands")


@pytest.mark.parametrize(
    "name, words",
    [
        ("Silent", "Silent has no `step`, .* steps of it have no docstring"),
        ("Bare", "Bare has no `step`, .* but it has none"),
        ("Call", "the class has no close, reset, step: .* or `reset` and methods that are tools"),
    ],
)
def test_classes_without_tools_are_named(name, words):
    with pytest.raises(ValueError, match=words):
        envs_host.check_options(f"{'test_tools' if name == 'Call' else 'toolboxes'}:{name}", {})


@pytest.mark.parametrize(
    "oddity, error, words",
    [
        ("no reward", ValueError, "Odd.reset must set reward to 0.0, .* reward is missing, done False"),
        ("not reset", ValueError, "reward is 1.0"),
        ("done at once", ValueError, "done True"),
        ("number", TypeError, "Odd.reset must return a text or None, got 3"),
        ("nan", ValueError, "Odd: a reward must be a number, and a finite one, got nan"),
        ("object", TypeError, "Odd.act must return a text, or what JSON can say, got <object"),
        ("raises", KeyError, "theirs"),
    ],
)
def test_what_a_class_does_wrong_is_its_failure(oddity, error, words):
    env = envs_host.make("toolboxes:Odd", oddity=oddity)
    with pytest.raises(error, match=words):
        env.reset(task())
        answered(env, ("act", {}))


def test_in_a_worker_process():
    limits = dict(step_limit_s=30.0, reset_limit_s=30.0, worker_memory_mb=1000.0)
    with EnvPool("toolboxes:Odd", {"oddity": "raises"}, num_workers=1, max_replays=0, **limits) as pool:
        pool.reset(0, task())
        assert pool.poll()[0][1].observation == "Go."
        pool.step(0, written("act"))
        [(_, failure)] = pool.poll()
    assert isinstance(failure, EnvFailure) and failure.reason == "crash" and "KeyError" in failure.message


def test_models_are_told_of_the_tools():
    assert tools.names(toolboxes.Desk) == ("orders", "look", "refund")
    listed, look, _ = tools.schemas(toolboxes.Desk)
    assert listed["function"]["parameters"] == {"type": "object", "properties": {}}
    parameters = look["function"]["parameters"]
    assert parameters["properties"]["order"] == {"type": "string", "description": "Its number."}
    assert parameters["properties"]["part"]["enum"] == ["item", "price"] and parameters["required"] == ["order"]
    said = tools.instructions(toolboxes.Desk).splitlines()
    assert [json.loads(line)["name"] for line in said[1:4]] == ["orders", "look", "refund"]
    assert "\n".join(said).endswith(tool_calls.FORM)
    with pytest.raises(ValueError, match="a tool of Untyped cannot be described: .*order"):
        tools.schemas(toolboxes.Untyped)


def test_tools_of_base_classes_come_first_and_may_be_taken_away():
    class Shop(toolboxes.Desk):
        refund = None

        def look(self, order: str) -> str:
            """Looks."""

        def ask(self) -> str:
            """Asks."""

        @staticmethod
        def check_here(currency="EUR"):
            raise ValueError("no shop here")

    assert tools.names(Shop) == ("orders", "look", "ask")
    played = tools.played(Shop)
    assert played is tools.played(Shop) and list(inspect.signature(played).parameters) == ["currency"]
    with pytest.raises(ValueError, match="no shop here"):
        played.check_here()


def test_conversations_equal_the_template_with_tools(tmp_path):
    """What is appended is what Qwen's own template makes of messages with `tool_calls` and of the role `tool`."""
    loaded = tokenizer.load(their_tokenizers.make("qwen2.5", tmp_path))
    loaded.chat_template = their_tokenizers.QWEN25_TOOLS
    described = tools.schemas(toolboxes.Desk)
    called = [("look", {"order": "17"}), ("look", {"order": "23", "part": "price"})]
    messages = [
        {"role": "user", "content": "My lamp is broken."},
        {"role": "assistant", "tool_calls": [calling("orders", {})]},
        {"role": "tool", "content": '["17", "23"]'},
        {"role": "assistant", "content": "I look at both.", "tool_calls": [calling(*call) for call in called]},
        {"role": "tool", "content": "lamp"},
        {"role": "tool", "content": "3 EUR"},
        {"role": "assistant", "content": "It is 17."},
    ]
    made = chat.make(loaded, template_options={"tools": described})
    assert made.differences == ()
    both = "\n".join(["I look at both.", *(written(name, **arguments) for name, arguments in called)])
    ids = np.concatenate(
        [
            made.first_prompt("My lamp is broken."),
            made.encode_action(written("orders")),
            made.next_prompt(tool_calls.heard(['["17", "23"]']), ended=True),
            made.encode_action(both),
            made.next_prompt(tool_calls.heard(["lamp", "3 EUR"]), ended=True),
            made.encode_action("It is 17."),
        ]
    )
    theirs = loaded.apply_chat_template(messages, tools=described, tokenize=True, return_dict=True)["input_ids"]
    assert loaded.decode(ids) + "\n" == loaded.decode(theirs) and ids.tolist() == theirs[: len(ids)]
    assert "# Tools" in made.before_first and '"name": "refund"' in made.before_first


def calling(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}

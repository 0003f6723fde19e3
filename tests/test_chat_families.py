"""Append-only conversations in the published families' templates and tokenizers."""

import copy
import json
import shutil

import numpy as np
import pytest
import their_tokenizers
import tokenizers

from jaxagentrl import chat, tokenizer

USERS = ("You are now in the room54.\nThere is a closed Z-box here.", "It is open.  ünïcode ☃",
         "current state: x\n\nyour action:", "You take the Z-key.")
ACTIONS = ("take Z-key from box44", "open Z-box\nwait", "go north")
THOUGHT = "<think>\nThe box is closed, so I open it.\n</think>\n\nopen Z-box"
OPTIONS = {"date_string": "26 Jul 2024"}   # Llama 3.2 would write today's
FAMILY = {"qwen2.5": "chatml", "qwen3": "chatml", "llama3": "llama3", "gemma2": "gemma",
          "gemma3": "gemma", "mistral_v1": "mistral", "mistral_v3": "mistral"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: their_tokenizers.make(name, root / name) for name in their_tokenizers.FAMILIES}


@pytest.fixture(params=their_tokenizers.FAMILIES)
def name(request):
    return request.param


@pytest.fixture
def loaded(folders, name):
    return tokenizer.load(folders[name])


def systems(name):
    return [None] if name in their_tokenizers.WITHOUT_SYSTEM else [None, "Play well."]


def messages_of(system, turns):
    messages = [] if system is None else [{"role": "system", "content": system}]
    return messages + [{"role": ("user", "assistant")[index % 2], "content": text}
                       for index, text in enumerate(turns)]


def template_ids(loaded, system, turns, **options):
    return loaded.apply_chat_template(messages_of(system, turns), add_generation_prompt=True,
                                      tokenize=True, return_dict=True, **OPTIONS, **options)["input_ids"]


def conversation(made, users, actions):
    """Every piece that is appended, in order."""
    pieces = [made.first_prompt(users[0])]
    for action, user in zip(actions, users[1:], strict=True):
        pieces += [made.encode_action(action), made.next_prompt(user, ended=True)]
    return pieces


def test_the_family_is_found(loaded, name):
    made = chat.make(loaded)
    assert made.family == FAMILY[name]
    assert chat.make(loaded, FAMILY[name]).end_of_turn_id == made.end_of_turn_id
    other = "gemma" if FAMILY[name] != "gemma" else "llama3"
    with pytest.raises(chat.TemplateError, match="belongs to another family"):
        chat.make(loaded, other)


def test_the_first_prompt_equals_the_template(loaded, name):
    for system in systems(name):
        made = chat.make(loaded, system=system)
        for user in USERS:
            assert made.first_prompt(user).tolist() == template_ids(loaded, system, [user])


def test_conversations_equal_the_template(loaded, name):
    """Of whole conversations too, wherever the template leaves the history alone."""
    made = chat.make(loaded)
    pieces = conversation(made, USERS, ACTIONS)
    for turn in range(len(USERS)):
        turns = [text for pair in zip(USERS, (*ACTIONS, None), strict=True) for text in pair]
        ids = np.concatenate(pieces[: 2 * turn + 1])
        assert ids.tolist() == template_ids(loaded, None, turns[: 2 * turn + 1])
        assert ids.dtype == np.int32


def test_actions_are_read_as_they_were_written(loaded, name):
    made = chat.make(loaded)
    for text in (*ACTIONS, THOUGHT, "ünï ☃"):
        ids = made.encode_action(text)
        assert ids[-1] == made.end_of_turn_id and made.end_of_turn_id not in ids[:-1]
        assert made.decode_action(ids) == made.decode_action(ids[:-1]) == text


def test_thinking_stays_in_the_history(loaded, name):
    made = chat.make(loaded)
    actions = (THOUGHT, ACTIONS[0], ACTIONS[2])
    ids = np.concatenate(conversation(made, USERS, actions))
    assert "so I open it." in made.decode(ids)
    turns = [USERS[0], THOUGHT, USERS[1], ACTIONS[0], USERS[2], ACTIONS[2], USERS[3]]
    same = ids.tolist() == template_ids(loaded, None, turns)
    assert same == (name != "qwen3")
    assert any("thinking" in text for text in made.differences) == (name == "qwen3")


def test_spaces_around_an_answer_stay_in_the_history(loaded, name):
    made = chat.make(loaded)
    padded = f"\n {ACTIONS[0]} "
    ids = np.concatenate(conversation(made, USERS[:2], [padded]))
    assert made.decode(ids).count(padded) == 1
    trims = name in ("llama3", "gemma2", "gemma3", "mistral_v3")
    theirs = loaded.apply_chat_template(
        messages_of(None, [USERS[0], padded, USERS[1]]), tokenize=False, **OPTIONS)
    assert (padded not in theirs) == trims
    assert any("trims what the assistant said" in text for text in made.differences) == trims
    assert made.keeps_plain_history


def test_what_the_template_would_do_later_is_said(folders):
    moving = tokenizer.load(folders["mistral_v3"])
    made = chat.make(moving, system="Play well.")
    assert ["system message" in text for text in made.differences] == [True, False]
    assert not made.keeps_plain_history
    ids = np.concatenate(conversation(made, USERS, ACTIONS))
    assert made.decode(ids).count("Play well.") == 1
    assert made.decode(ids).index("Play well.") < made.decode(ids).index(USERS[0])

    said = '    {%- if message["role"] == "user" %}\n'
    listing = '        {%- if tools and loop.last %}{{- "[AVAILABLE_TOOLS] " + (tools | tojson) }}{%- endif %}\n'
    assert moving.chat_template.count(said) == 1
    moving.chat_template = moving.chat_template.replace(said, said + listing)
    for system, moves in ((None, "the tools to"), ("Play well.", "the system message and the tools to")):
        made = chat.make(moving, system=system, template_options={"tools": [{"name": "look"}]})
        assert [moves in text for text in made.differences] == [True, False] and not made.keeps_plain_history
        text = made.decode(np.concatenate(conversation(made, USERS, ACTIONS)))
        assert text.startswith('<s>[AVAILABLE_TOOLS] [{"name": "look"}]') and text.count("TOOLS") == 1
        assert text.count("Play well.") == (system is not None)

    qwen3 = tokenizer.load(folders["qwen3"])
    made = chat.make(qwen3, template_options={"enable_thinking": False})
    assert any("opens an answer with '<think>" in text for text in made.differences)
    assert made.first_prompt(USERS[0]).tolist() == template_ids(
        qwen3, None, [USERS[0]], enable_thinking=False)
    assert made.decode(made.next_prompt("x", ended=True)).endswith("<think>\n\n</think>\n\n")


def test_a_demonstration_stands_behind_the_header_and_nothing_else(folders):
    """Also where the header is longer than the history's."""
    qwen3 = tokenizer.load(folders["qwen3"])
    made = chat.make(qwen3, template_options={"enable_thinking": False})
    ids = np.concatenate([made.first_prompt(USERS[0]), made.encode_action(ACTIONS[0])])
    assert made.decode(ids).endswith(f"assistant\n<think>\n\n</think>\n\n{ACTIONS[0]}<|im_end|>")
    assert made.decode_action(made.encode_action(ACTIONS[0])) == ACTIONS[0]


@pytest.fixture
def thinking_only(folders):
    """Qwen3 of 2507 that always thinks, and QwQ: the header opens the thought."""
    loaded = tokenizer.load(folders["qwen3"])
    always = "{{- '<|im_start|>assistant\\n<think>\\n' }}\n{%- endif %}"
    start = loaded.chat_template.index("{{- '<|im_start|>assistant\\n' }}")
    loaded.chat_template = loaded.chat_template[:start] + always
    return chat.make(loaded)


def test_a_demonstration_is_not_told_within_a_thought(thinking_only):
    made = thinking_only
    assert made.header.endswith("<think>\n")
    for text, said in (
        ("open Z-box", "<think>\n\n</think>\n\nopen Z-box"),
        (THOUGHT, THOUGHT),
        ("<think></think><action>look</action>", "<think>\n</think><action>look</action>"),
        ("So.\n</think>\n\nlook", "<think>\nSo.\n</think>\n\nlook"),
    ):
        ids = made.encode_action(text)
        whole = made.decode(np.concatenate([made.first_prompt(USERS[0]), ids]))
        assert whole.endswith(f"<|im_start|>assistant\n{said}<|im_end|>")
        assert made.decode_action(ids) == said
        assert made.encode_action(said).tolist() == ids.tolist()
    cut = made.tokenizer.encode("The box is", add_special_tokens=False)
    assert chat.command(made.decode_action(cut)) == ""


@pytest.mark.parametrize("name", their_tokenizers.WITHOUT_SYSTEM, indirect=True)
def test_a_system_message_that_the_template_refuses(loaded):
    with pytest.raises(chat.TemplateError, match="system message.*first user message"):
        chat.make(loaded, system="Play well.")


def test_a_cut_action_gets_its_end(loaded, name):
    made = chat.make(loaded)
    cut = made.next_prompt("text", ended=False)
    assert cut[0] == made.end_of_turn_id
    assert cut[1:].tolist() == made.next_prompt("text", ended=True).tolist()


def test_the_structure_cannot_be_written_by_a_game(loaded, name):
    made = chat.make(loaded)
    quiet = made.decode(made.next_prompt("You say: win", ended=True))
    for token in {*made.control_tokens}:
        attack = made.next_prompt(f"You say: {token}win", ended=True)
        assert made.decode(attack).count(token) == quiet.count(token), token
        action = made.encode_action(f"say {token}")
        assert action.tolist().count(made.end_of_turn_id) == 1
    assert {made.end_of_turn, *their_tokenizers.FAMILIES[name]["specials"]} <= {*made.control_tokens}


def test_the_date_does_not_depend_on_the_day(folders):
    made = chat.make(tokenizer.load(folders["llama3"]))
    assert "26 Jul 2024" in made.before_first
    other = chat.make(tokenizer.load(folders["llama3"]),
                      template_options={"date_string": "1 Jan 2026"})
    assert "1 Jan 2026" in other.before_first


@pytest.mark.parametrize("option, said", [
    ("enable_thinkng", r"no variable enable_thinkng. It has: .*enable_thinking.*Did you mean enable_thinking\?"),
    ("temperature", r"no variable temperature. It has: [a-z_, ]*\.$"),
    ("messages", "messages is written by the run"),
    ("add_generation_prompt", "add_generation_prompt is written by the run"),
    ("eos_token", "eos_token is written by the run"),
    ("tokenize", "no variable tokenize"),
])
def test_an_option_that_the_template_does_not_read_is_refused(folders, option, said):
    with pytest.raises(ValueError, match=said):
        chat.make(tokenizer.load(folders["qwen3"]), template_options={option: False})


def test_a_template_without_variables_says_so(folders):
    loaded = tokenizer.load(folders["qwen2.5"])
    loaded.chat_template = tokenizer.CHATML_TEMPLATE
    with pytest.raises(ValueError, match="no variable enable_thinking; it has none"):
        chat.make(loaded, template_options={"enable_thinking": False})


def test_variables_are_found_where_published_templates_read_them(folders):
    """Behind tags that transformers knows, and where a template sets its own default."""
    loaded = tokenizer.load(folders["qwen2.5"])
    plain = loaded.chat_template
    loaded.chat_template = (
        "{%- if voice is not defined %}{% set voice = 'calm' %}{% endif %}"
        "{%- set mood = mood | default('mild') %}"
        "{%- if tools %}{{ tools }}{% endif %}"
        "{%- macro quiet(own) %}{{ own }}{% endmacro %}"
        "{%- for m in messages %}{% generation %}{{ late | default('') }}{% endgeneration %}{% break %}{% endfor %}"
        + plain
    )
    for option in ("voice", "mood", "late", "tools"):
        chat.make(loaded, template_options={option: None if option == "tools" else ""})
    for option in ("own", "m", "namespace", "raise_exception", "strftime_now"):
        with pytest.raises(ValueError, match=f"no variable {option}. It has: late, mood, tools, voice\\."):
            chat.make(loaded, template_options={option: "x"})
    loaded.chat_template = "{% if %}"
    with pytest.raises(chat.TemplateError, match="cannot be read"):
        chat.make(loaded, template_options={"voice": "x"})


def test_templates_that_ask_for_today_get_the_same_day(folders):
    """As Mistral Small does in its default system message, and SmolLM3."""
    loaded = tokenizer.load(folders["qwen2.5"])
    plain = loaded.chat_template

    def asking(call):
        loaded.chat_template = plain.replace("You are Qwen, created by Alibaba Cloud.", f"It is ' + {call} + '.")
        return loaded

    made = chat.make(asking('strftime_now("%A, %d %B %Y")'))
    assert "It is Friday, 26 July 2024." in made.before_first
    ids = np.concatenate(conversation(made, USERS, ACTIONS))
    assert made.decode(ids).count("26 July 2024") == 1
    other = chat.make(asking("strftime_now( '%Y-%m-%d' )"), template_options={"date_string": "1 Jan 2026"})
    assert "It is 2026-01-01." in other.before_first
    with pytest.raises(ValueError, match="date_string is '2026-01-01'.* write it as '26 Jul 2024'"):
        chat.make(loaded, template_options={"date_string": "2026-01-01"})
    with pytest.raises(ValueError, match="date_string is 5, but"):
        chat.make(loaded, template_options={"date_string": 5})
    with pytest.raises(ValueError, match="no variable date_string"):  # nor asks for today
        chat.make(tokenizer.load(folders["qwen3"]), template_options={"date_string": "1 Jan 2026"})
    with pytest.raises(chat.TemplateError, match="from day to day"):
        chat.make(asking("strftime_now(form)"))


@pytest.mark.parametrize("name", ["llama3", "gemma3", "mistral_v3"], indirect=True)
@pytest.mark.parametrize("as_file", [True, False], ids=["file", "key"])
def test_a_base_model_takes_the_template_of_its_familys_instruct_model(name, as_file, tmp_path):
    """What the error says is what works."""
    instruct, base = (their_tokenizers.make(name, tmp_path / kind) for kind in ("instruct", "base"))
    template = base / "chat_template.jinja"
    template.unlink()
    with pytest.raises(ValueError, match="no chat template.*instruct.*chat_template.jinja.*base/tokenizer_config"):
        tokenizer.load(base)
    if as_file:
        shutil.copy(instruct / template.name, template)
    else:
        config = json.loads((base / "tokenizer_config.json").read_text())
        config["chat_template"] = (instruct / template.name).read_text()
        (base / "tokenizer_config.json").write_text(json.dumps(config))
    made, theirs = chat.make(tokenizer.load(base)), chat.make(tokenizer.load(instruct))
    assert made.end_of_turn_id == theirs.end_of_turn_id
    for ours, expected in zip(
        conversation(made, USERS, ACTIONS), conversation(theirs, USERS, ACTIONS), strict=True
    ):
        assert ours.tolist() == expected.tolist()


def test_a_template_whose_end_of_turn_the_tokenizer_lacks_is_refused(folders):
    loaded = tokenizer.load(folders["mistral_v1"])
    loaded.chat_template = tokenizer.CHATML_TEMPLATE
    with pytest.raises(chat.TemplateError, match="no sampler can end a turn with it; use the template of"):
        chat.make(loaded)


def with_token(loaded, text, **options):
    """The tokenizer with one more token; its id is the last."""
    more = copy.deepcopy(loaded)
    assert more.add_tokens(tokenizers.AddedToken(text, **options)) == 1
    return more


def test_ids_that_a_text_may_come_to_need_an_embedding(loaded):
    made, size = chat.make(loaded), len(loaded)
    last = loaded.convert_ids_to_tokens(size - 1)
    loaded.add_special_tokens({"pad_token": last})   # so that it is in use, whatever it is
    chat.check_vocabulary(made, size)
    chat.check_vocabulary(made, size + 100)   # embeddings are padded
    with pytest.raises(ValueError, match=f"below {size - 1}, .* may also give {size - 1} "):
        chat.check_vocabulary(made, size - 1)
    with pytest.raises(ValueError, match=r"give 3\d\d '.*', .* and \d+ more: use the tokenizer"):
        chat.check_vocabulary(made, 300)


def test_a_special_token_that_nothing_writes_needs_none(loaded):
    """Gemma 3 of 1B and below: `<image_soft_token>` is the id after the last embedding."""
    size = len(loaded)
    image = with_token(loaded, "<image_soft_token>", special=True)
    made = chat.make(image)
    chat.check_vocabulary(made, size)
    assert (made.first_prompt("see <image_soft_token>") < size).all()
    for used in (
        with_token(loaded, "<image_soft_token>", special=False),   # then a user's text may hold it
        with_token(loaded, made.before_first, special=True),       # a part of every prompt
    ):
        with pytest.raises(ValueError, match=f"may also give {size} "):
            chat.check_vocabulary(chat.make(used), size)
    image.pad_token = "<image_soft_token>"
    with pytest.raises(ValueError, match=f"may also give {size} '<image_soft_token>':"):
        chat.check_vocabulary(made, size)

"""The trained tokenizer: exact, deterministic, cheap for game text, readable by transformers."""

import json
import pathlib

import hypothesis
import hypothesis.strategies as st
import pytest
import transformers

from jaxagentrl import tokenizer

GAME = (
    "You are now in the room54.\nThere is a closed Z-box here. There is an open box44 here. "
    "The box44 contains a Z-key.\nThere is an exit to the north.\nYou are carrying nothing.",
    "You are now in the room5.\nThere is a closed F-box here. There is a closed box7 here.\n"
    "There is an exit to the west.\nYou are carrying: a F-key.",
    "First, take the Z-key from the box44. Next, unlock Z-box with Z-key.",
    "You see a type 3 locker. It's locked!",
    "take Z-key from box44",
    "unlock Z-box with Z-key",
    "open box7",
    "go east",
)
VARIANTS = [
    {"names": names, "phrases": phrases, "glue_tokens": glue}
    for names in ("whole", "parts")
    for phrases in (False, True)
    for glue in (False, True)
]


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def trained(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    return tokenizer.train(GAME * 4, vocab_size=700, directory=directory, **request.param)


def pieces(trained, text):
    return [trained.decode([i]) for i in trained.encode(text, add_special_tokens=False)]


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(text=st.text(max_size=60))
def test_any_text_survives_the_round_trip(trained, text):
    hypothesis.assume("<|" not in text)
    ids = trained.encode(text, add_special_tokens=False)
    assert trained.decode(ids, clean_up_tokenization_spaces=False) == text
    assert all(0 <= i < len(trained) for i in ids)


def test_game_text_survives_the_round_trip(trained):
    for text in GAME:
        assert trained.decode(trained.encode(text)) == text


def test_whole_names_are_one_token(tmp_path):
    trained = tokenizer.train(GAME * 4, vocab_size=700, directory=tmp_path)
    assert pieces(trained, "take Z-key from box44") == ["take", " Z-key", " from", " box44"]
    assert pieces(trained, "see a type 3 locker")[-3:] == [" type", " 3", " locker"]
    # The name costs the same inside a sentence.
    assert " box44" in pieces(trained, "There is an open box44 here.")


def test_parts_of_names_are_shared(tmp_path):
    trained = tokenizer.train(GAME * 4, vocab_size=700, directory=tmp_path, names="parts")
    assert pieces(trained, "take Z-key from box44") == [
        "take", " Z", "-key", " from", " box", "44"
    ]  # fmt: skip
    # A name never seen is cut in the same way.
    assert pieces(trained, " room44") == [" room", "44"]


@pytest.mark.parametrize("names", ["whole", "parts"])
def test_phrases_join_stock_sentences_and_leave_names_apart(tmp_path, names):
    trained = tokenizer.train(
        GAME * 4, vocab_size=700, directory=tmp_path, names=names, phrases=True
    )
    assert pieces(trained, "There is an exit to the north.") == ["There is an exit to the north."]
    got = pieces(trained, "There is a closed Z-box here. There is an open box44 here.")
    names_at = {"whole": {" Z-box", " box44"}, "parts": {" Z", "-box", " box", "44"}}[names]
    assert names_at <= set(got)
    plain = tokenizer.train(GAME * 4, vocab_size=700, directory=tmp_path / "plain", names=names)
    assert len(got) < 0.7 * len(pieces(plain, "".join(got)))


@pytest.mark.parametrize("phrases", [False, True])
def test_a_lexicon_is_one_token_each(tmp_path, phrases):
    numbers = [str(number) for number in range(100)]
    options = {"names": "parts", "phrases": phrases, "directory": tmp_path}
    trained = tokenizer.train(GAME * 4, vocab_size=800, lexicon=numbers, **options)
    assert pieces(trained, " room98") == [" room", "98"]
    assert {len(pieces(trained, number)) for number in numbers} == {1}
    with pytest.raises(ValueError, match="of 100 lexicon entries are more than one token"):
        tokenizer.train(GAME, vocab_size=300, lexicon=numbers, **options)
    with pytest.raises(ValueError, match=r"1 of 1 lexicon .*\['two\\nlines'\]"):
        tokenizer.train(GAME, vocab_size=800, lexicon=["two\nlines"], **options)


def test_special_tokens_and_template(trained):
    assert trained.eos_token == "<|im_end|>"
    assert trained.pad_token == "<|endoftext|>"
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        assert len(trained.encode(token)) == 1
    rendered = trained.apply_chat_template(
        [{"role": "user", "content": "You are"}, {"role": "assistant", "content": "go east"}],
        tokenize=False,
    )
    assert rendered == (
        "<|im_start|>user\nYou are<|im_end|>\n<|im_start|>assistant\ngo east<|im_end|>\n"
    )


def test_glue_tokens_are_cheap_and_the_text_is_chatml(tmp_path):
    glued = tokenizer.train(GAME, vocab_size=500, directory=tmp_path / "glued")
    plain = tokenizer.train(GAME, vocab_size=500, directory=tmp_path / "plain", glue_tokens=False)
    text = "<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    assert len(glued.encode(text)) == 3
    assert len(plain.encode(text)) >= 9
    assert glued.decode(glued.encode(text)) == plain.decode(plain.encode(text)) == text
    assert glued.decode(glued.encode(text), skip_special_tokens=True) == ""


def test_same_texts_give_the_same_files(tmp_path):
    def texts():
        yield from GAME * 50

    for name in ("one", "two"):
        tokenizer.train(texts(), vocab_size=600, directory=tmp_path / name, phrases=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_kill_leaves_no_folder_or_the_whole_one(tmp_path, monkeypatch):
    """`prepare` takes a folder that is there for a finished one."""
    class Killed(BaseException):
        pass

    def killed(*arguments, **options):
        raise Killed

    folder = tmp_path / "tokenizer"
    for target, name in ((pathlib.Path, "write_text"), (tokenizer.os, "rename")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, killed)
            with pytest.raises(Killed):
                tokenizer.train(GAME, vocab_size=400, directory=folder)
        assert not folder.exists()
    trained = tokenizer.train(GAME, vocab_size=400, directory=folder)
    assert trained.encode(GAME[0]) == tokenizer.load(folder).encode(GAME[0])
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_other_files_in_the_folder_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    first = tokenizer.train(GAME, vocab_size=400, directory=tmp_path)
    second = tokenizer.train(GAME, vocab_size=300, directory=tmp_path)
    assert len(second) == 300 < len(first)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "notes.txt", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "mistral"])
def test_beside_a_model_it_is_read_as_it_stands(trained, model_type, tmp_path):
    """transformers 5 takes every tokenizer beside a Qwen2 for Qwen2's own, with its rules for cutting."""
    trained.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    for declared in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps(config | {"tokenizer_class": declared}))
        again = tokenizer.load(tmp_path)
        assert [again.encode(text) for text in GAME] == [trained.encode(text) for text in GAME]


def test_transformers_reads_and_writes_it(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == trained.get_vocab()
    assert again.chat_template == trained.chat_template
    assert (again.eos_token_id, again.pad_token_id) == (trained.eos_token_id, trained.pad_token_id)
    assert tokenizer.load(tmp_path).encode(GAME[0]) == trained.encode(GAME[0])


def test_vocabulary_is_no_larger_than_asked(tmp_path):
    assert len(tokenizer.train(GAME * 9, vocab_size=300, directory=tmp_path)) == 300


def test_halves_of_surrogate_pairs_are_read_as_the_chat_encodes_them(tmp_path):
    made = [
        tokenizer.train([said] * 9, vocab_size=300, directory=tmp_path / str(number))
        for number, said in enumerate(("a box \ud83d", "a box ?"))
    ]
    assert made[0].get_vocab() == made[1].get_vocab()


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="vocab_size is 100"):
        tokenizer.train(GAME, vocab_size=100, directory=tmp_path)
    with pytest.raises(ValueError, match="names must be one of"):
        tokenizer.train(GAME, vocab_size=500, directory=tmp_path, names="wole")
    with pytest.raises(ValueError, match="no text"):
        tokenizer.train([], vocab_size=500, directory=tmp_path)


def test_wrong_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="missing does not exist"):
        tokenizer.load(tmp_path / "missing")
    with pytest.raises(ValueError, match="no tokenizer.json; it holds: nothing"):
        tokenizer.load(tmp_path)
    tokenizer.train(GAME, vocab_size=400, directory=tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="not readable JSON"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 17\n"
    (tmp_path / "tokenizer.json").write_text(pointer)
    with pytest.raises(ValueError, match="tokenizer.json is a pointer of Git LFS.*`git lfs pull`"):
        tokenizer.load(tmp_path)


@pytest.mark.parametrize("file, text", [
    ("tokenizer.json", "[]"),
    ("tokenizer.json", "{}"),
    ("tokenizer.json", '{"added_tokens": [], "model": 3}'),
    ("tokenizer_config.json", "[]"),
    ("tokenizer_config.json", "null"),
    ("tokenizer_config.json", '{"tokenizer_class": 5}'),
    ("tokenizer_config.json", '{"eos_token": 3}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": 3}'),
])
def test_files_that_are_no_tokenizers_are_named(file, text, tmp_path):
    tokenizer.train(GAME, vocab_size=400, directory=tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=f"{file} .*(train|copy).* it again"):
        tokenizer.load(tmp_path)

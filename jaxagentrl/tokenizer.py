"""Tokenizers: one trained on the games' own text, or one that comes with a pretrained model.

Both live in a folder in Hugging Face form (`tokenizer.json`, `tokenizer_config.json`) and are read
by `load`, so a from-scratch run and a pretrained one take the same path from here on.

What makes a trained tokenizer cheap in a text world (each can be switched off):

*   **Names are single tokens.** Words keep their leading space, their digits and their hyphens
    (` box44`, ` Z-key`), so an object costs one token once it is frequent enough to be merged.
    With `names="parts"` they are split into letters, hyphenated tail and number (` box` `44`,
    ` Z` `-key`): more tokens, but every part is seen often and any unseen combination can be
    copied part by part. A `lexicon` names texts that must be one token each, such as the numbers.
*   **Phrases.** With `phrases=True` merges may run across spaces inside a line, up to the next
    name or full stop, so that stock sentences (`There is an exit to the north`) become one or two
    tokens. Names stay apart, whatever stands around them.
*   **Glue tokens.** The fixed text between messages is ChatML byte for byte, but each piece of it
    (`\\n<|im_start|>user\\n`) is one added token: three tokens of overhead per turn instead of ten.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Sequence

import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxagentrl.models import git_lfs

START_OF_TURN = "<|im_start|>"
END_OF_TURN = "<|im_end|>"
PADDING = "<|endoftext|>"

# Longest match wins when special tokens are found, so text is cut the same way with or without
# a piece in this list that does not occur in it.
GLUE = (
    f"{START_OF_TURN}system\n",
    f"{START_OF_TURN}user\n",
    f"\n{START_OF_TURN}user\n",
    f"{END_OF_TURN}\n{START_OF_TURN}assistant\n",
)

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_BYTES = 256  # every byte is a token: nothing is ever unknown

# Alternatives are tried in order. Newlines stand alone in all of them, so that what follows a line
# break, or the header of a message, is cut as at the start of a text.
_NAME = r"\p{L}*\p{N}+|\p{Lu}-\p{L}+"  # thing6, 44, Z-key
_PATTERNS = {
    "whole": r" ?[\p{L}\p{N}]+(?:[-'’][\p{L}\p{N}]+)*| ?[^\s\p{L}\p{N}]+|\n|[^\S\n]+",
    "parts": r" ?\p{L}+|-\p{L}+|['’]\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\n|[^\S\n]+",
}
NAMES = tuple(_PATTERNS)
_PHRASE_PATTERNS = {
    "whole": rf" ?(?:{_NAME})(?![\p{{L}}\p{{N}}])|(?:(?! ?(?:{_NAME})(?![\p{{L}}\p{{N}}]))"
    r"[^\n.:])+[.:]?|[.:]|\n",
    "parts": rf" ?\p{{L}}+(?=\p{{N}})| ?\p{{N}}{{1,3}}| ?\p{{Lu}}(?=-\p{{L}})|-\p{{L}}+|"
    rf"(?:(?! ?(?:{_NAME}))[^\n.:])+[.:]?|[.:]|\n",
}


def check_size(vocab_size: int, *, glue_tokens: bool) -> None:
    """Looks whether a vocabulary has room for what is in all of them, which `train` asks first.

    Raises:
        ValueError: it has not.
    """
    num_special = len(_special_tokens(glue_tokens))
    if vocab_size < _BYTES + num_special:
        raise ValueError(
            f"tokenizer.vocab_size is {vocab_size}, but {_BYTES} bytes and {num_special} special tokens need at least "
            f"{_BYTES + num_special}."
        )


def _special_tokens(glue_tokens: bool) -> list[str]:
    return [PADDING, START_OF_TURN, END_OF_TURN, *(GLUE if glue_tokens else ())]


def train(
    texts: Iterable[str],
    *,
    vocab_size: int,
    directory: str | pathlib.Path,
    names: str = "whole",
    phrases: bool = False,
    glue_tokens: bool = True,
    lexicon: Sequence[str] = (),
) -> transformers.PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer with ChatML special tokens and saves it.

    The same texts in the same order give the same file.

    Args:
        texts: what user messages and actions look like, without template glue.
        vocab_size: ids in all, special tokens and the 256 bytes included. The text may have
            fewer merges to offer, then the vocabulary is smaller.
        directory: where `tokenizer.json` and `tokenizer_config.json` go; made when missing, and then
            a kill at any moment leaves either no folder or the whole one.
        names: "whole" or "parts", see above.
        phrases: whether merges may cross spaces, see above.
        glue_tokens: whether the fixed text between messages is made of single tokens.
        lexicon: texts that must be one token each, with their leading space if they have one,
            however rare they are (`[str(n) for n in range(100)]` for names that end in numbers).

    Returns:
        The tokenizer as `load(directory)` gives it: eos is `<|im_end|>`, pad `<|endoftext|>`.

    Raises:
        ValueError: no text, an unknown `names`, a vocabulary too small for bytes and specials, or
            a lexicon entry that did not become one token.
    """
    if names not in _PATTERNS:
        raise ValueError(
            f"tokenizer.train: names must be one of {sorted(_PATTERNS)}, got {names!r}"
        )
    check_size(vocab_size, glue_tokens=glue_tokens)
    special_tokens = _special_tokens(glue_tokens)
    pattern = (_PHRASE_PATTERNS if phrases else _PATTERNS)[names]
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    counter = _Counted(texts, lexicon)
    bpe.train_from_iterator(counter, trainer)
    if counter.count == 0:
        raise ValueError("tokenizer.train: there is no text to train on")
    split = [text for text in lexicon if len(bpe.encode(text).ids) != 1]
    if split:
        raise ValueError(
            f"tokenizer.train: {len(split)} of {len(lexicon)} lexicon entries are more than one "
            f"token ({split[:5]}): vocab_size {vocab_size} is too small for them, or they hold "
            f"what names={names!r} and phrases={phrases} never join"
        )
    return _save(bpe, pathlib.Path(directory))


def load(directory: str | pathlib.Path) -> transformers.PreTrainedTokenizerBase:
    """Reads a tokenizer folder in Hugging Face form.

    Raises:
        ValueError: the folder or one of its files is missing, cannot be read, or has no chat
            template.
    """
    directory = pathlib.Path(directory).expanduser()
    if not directory.is_dir():
        raise ValueError(
            f"tokenizer folder {directory} does not exist; give a folder with tokenizer.json and "
            "tokenizer_config.json, as tokenizer.train or a Hugging Face model leaves it"
        )
    contents = {}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = directory / name
        if not file.is_file():
            found = ", ".join(sorted(path.name for path in directory.iterdir())) or "nothing"
            raise ValueError(f"tokenizer folder {directory} has no {name}; it holds: {found}")
        if said := git_lfs.advice(file):
            raise ValueError(said)
        try:
            contents[name] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:  # covers both bad JSON and bad UTF-8
            raise ValueError(
                f"{file} is not readable JSON ({error}); train or copy it again"
            ) from error
        if not isinstance(contents[name], dict):
            raise ValueError(
                f"{file} holds {type(contents[name]).__name__}, expected an object; train or copy it again"
            )
    # Beside the config.json of some models (Qwen2) the automatic choice is a class that builds parts
    # of the tokenizer as that model has them, whatever the files say.
    declared = contents["tokenizer_config.json"].get("tokenizer_class")
    as_it_stands = declared in ("PreTrainedTokenizerFast", "TokenizersBackend")
    reader = transformers.PreTrainedTokenizerFast if as_it_stands else transformers.AutoTokenizer
    try:
        tokenizer = reader.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # a plain one is what tokenizers raises, and transformers whatever it comes to
        raise ValueError(
            f"the tokenizer in {directory} cannot be made of its tokenizer.json and tokenizer_config.json "
            f"({type(error).__name__}: {error}); train or copy it again"
        ) from error
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer in {directory} has no chat template, as of a base model; copy that of the "
            "family's instruct model: its file chat_template.jinja, or the key `chat_template` of its "
            f"tokenizer_config.json into {directory / 'tokenizer_config.json'}. The tokens that the "
            "template writes must be in tokenizer.json."
        )
    return tokenizer


# Often enough to be merged before what the text itself has to offer.
_LEXICON_REPEATS = 1_000


class _Counted:
    """Passes texts on and counts them; adds the lexicon, and the glue that every message holds."""

    def __init__(self, texts: Iterable[str], lexicon: Sequence[str]):
        self._texts = texts
        self._lexicon = lexicon
        self.count = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._lexicon:
            # One line each: nothing is merged across lines.
            yield f"{text}\n" * _LEXICON_REPEATS
        for text in self._texts:
            self.count += 1
            yield text.encode(errors="replace").decode()  # as `chat` encodes it
            yield "user\n"
            yield "assistant\n"


def _save(
    bpe: tokenizers.Tokenizer, directory: pathlib.Path
) -> transformers.PreTrainedTokenizerFast:
    directory = directory.absolute()
    temporary = directory.with_name(f".{directory.name}.tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    # Written by hand, not by save_pretrained, whose file differs between releases.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TURN,
        "pad_token": PADDING,
        "additional_special_tokens": [START_OF_TURN],
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,  # the model's own limit is the model's to know
        "chat_template": CHATML_TEMPLATE,
    }
    bpe.save(str(temporary / "tokenizer.json"))
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (temporary / "tokenizer_config.json").write_text(text, encoding="utf-8")
    if directory.exists():   # other files may be in it
        for file in temporary.iterdir():
            os.replace(file, directory / file.name)
        temporary.rmdir()
    else:
        os.rename(temporary, directory)
    return load(directory)

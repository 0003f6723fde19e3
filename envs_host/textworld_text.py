"""Text in and out of a TextWorld game: cleaning of commands and of what the game prints.

Commands come from a language model that may be half trained, so they can be anything. The rule:

1. Only printable ASCII is sent: accents are dropped, every other character becomes a space (control
   characters crash the Z-machine interpreter or hang it for ever), and so does the backslash, which
   the interpreter takes as an escape.
2. Only the first of several commands is sent: the text is cut at the first `.`, `;`, `!`, `?`, comma,
   line end or word `then`. TextWorld's state tracking breaks on joined commands (TextWorld issue 366).
   A comma may stand between things, too, and is cut at all the same: `and` does that, and parts no
   commands. No name in a game has one.
3. Runs of spaces become one space, and the text is cut at the last word that ends within
   `MAX_COMMAND_LENGTH` characters (the games' line buffer is that long).
4. What is left is not sent, and the command counts as not valid, if it is empty or if it starts with
   one of `REFUSED`: verbs that address the interpreter instead of the
   world (`quit` and `restart` open a yes/no prompt that swallows the next command, `verbose`
   changes every later text), `oops`, which can smuggle them in, or TextWorld's debugging commands.
"""

import re
import unicodedata

MAX_COMMAND_LENGTH = 118

# The games' dictionary tells words apart by their first nine characters only.
_WORD_LENGTH = 9
REFUSED = frozenset(
    word[:_WORD_LENGTH]
    for word in (
        # Out-of-world verbs of Inform's Standard Rules.
        "quit q restart restore save script transcript verify version score superbrief short "
        "verbose long brief normal nouns pronouns notify "
        # The parser's own.
        "undo oops o "
        # TextWorld's debugging commands; those that start with "tw-" are refused below.
        "print_state enable disable restrict"
    ).split()
)
_REFUSED_PREFIX = "tw-"
REFUSAL = "That command is not part of the game."
EMPTY = "No command was given."

_NOT_PRINTABLE = re.compile(r"[^\x20-\x7e\r\n]|\\")
_END_OF_COMMAND = re.compile(r"[.;!?,\r\n]|\bthen\b", re.IGNORECASE)
_FIRST_WORD = re.compile(r'[\s"]*([^\s"]*)')

_PROMPT = re.compile(r"\n>[^\n]*\Z")
_STATUS = re.compile(r"\n> *-= (?P<room>.+?) =-")
_HEADER = re.compile(r"-= .+? =-")
_NOISE = re.compile(
    r"^\s*(?:"
    r"Your score has just gone (?:up|down) by .*"
    r"|\*\*\* .* \*\*\*"
    r"|You scored \d+ out of a possible \d+, in .*"
    r"|Would you like to RESTART, .*"
    r")\s*$",
    re.MULTILINE,
)
_SENTENCE_END = (".", "!", "?", '"')


def clean_command(text: str) -> tuple[str, str | None]:
    """Makes a command out of anything, by the rule at the top of this file.

    Args:
        text: what the model wrote.

    Returns:
        The command, and None if it may be sent, else the answer to give in the game's place.
    """
    # In this order: a letter like the ellipsis is several full stops after normalization, and a
    # word is "then" after what clung to it has gone.
    letters = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    printable = _NOT_PRINTABLE.sub(" ", "".join(letters))
    first = _END_OF_COMMAND.split(printable.lstrip(" .;!?,\r\n"), maxsplit=1)[0]
    command = " ".join(first.split())
    if len(command) > MAX_COMMAND_LENGTH:
        command = command[: MAX_COMMAND_LENGTH + 1].rpartition(" ")[0]
    if not command:
        return "", EMPTY
    word = _FIRST_WORD.match(command)[1].lower()
    refused = word[:_WORD_LENGTH] in REFUSED or word.startswith(_REFUSED_PREFIX)
    return command, REFUSAL if refused else None


def room_name(feedback: str, room_names: dict[str, str], default: str) -> str:
    """Reads the player's room from the status line that ends every answer of a game.

    This is the fact `at(P, room)` for free; asking TextWorld for facts costs state tracking.

    Args:
        feedback: what the game printed.
        room_names: lower-cased printed name to the name the game uses.
        default: the room before, for an answer without a status line.
    """
    status = _STATUS.search(feedback)
    if status is None:
        return default
    printed = status["room"].strip().lower()
    return room_names.get(printed, printed)


def clean_feedback(feedback: str, *, opening: bool) -> str:
    """Keeps what a game tells the player and drops banner, prompt, headers and score lines.

    Args:
        feedback: what the game printed.
        opening: it is the first text of a game, whose banner and objective are dropped too.
    """
    text = _PROMPT.sub("", feedback)
    if opening:
        header = _HEADER.search(text)
        text = text[header.end():] if header else text
    text = _NOISE.sub("", _HEADER.sub("", text))
    lines, seen = [], set()
    for line in text.split("\n"):
        line = " ".join(line.split())
        if line and line not in seen:
            seen.add(line)
            lines.append(line)
    return _flow(lines)


def observation(room: str, text: str, inventory: str) -> str:
    """Puts an observation together: the room, what the game told, what is carried.

    The inventory is left out where the text just told it.
    """
    parts = [f"You are now in the {room}.", text]
    inventory = " ".join(inventory.split())
    if inventory not in text:
        parts.append(inventory)
    return _flow([part for part in parts if part])


def _flow(lines: list[str]) -> str:
    """Joins lines by a space after the end of a sentence, else by a newline (as in a recipe)."""
    text = ""
    for line in lines:
        if text:
            text += " " if text.endswith(_SENTENCE_END) else "\n"
        text += line
    return text

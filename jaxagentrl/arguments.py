"""What functions of the core may be given: arrays of a kind and a shape, told by name where they are not."""

from typing import Any

import jax.numpy as jnp
import numpy as np

_KINDS = {float: jnp.floating, int: jnp.integer, bool: jnp.bool_}


def check(**arguments: tuple[Any, type | None, str]) -> None:
    """Checks arrays by the shapes that docstrings give them.

        check(scores=(scores, float, "B"), action_mask=(action_mask, bool, "B L"), values=(values, float, "... L"))

    Args:
        arguments: by name, (array, kind, sizes). Kinds are float, int and bool, of any width, and None for any.
            Sizes are names or numbers with spaces between; a name is the same size wherever it stands, and
            "...", first or alone, is any number of leading sizes, also the same everywhere.

    Raises:
        ValueError: with the argument, what was got and what was expected.
    """
    known: dict[str, tuple[Any, str]] = {}  # by name: its size, and the argument that had it first
    for name, (value, kind, sizes) in arguments.items():
        shape = np.shape(value)
        dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
        words = sizes.split()
        found: dict[str, Any] = {}
        if words[:1] == ["..."]:
            split = max(0, len(shape) - len(words) + 1)
            found["..."] = shape[:split]
            is_right = len(shape) >= len(words) - 1
            pairs = list(zip(words[1:], shape[split:]))
        else:
            is_right = len(shape) == len(words)
            pairs = list(zip(words, shape))
        for word, size in pairs:
            if word.isdecimal():
                is_right &= int(word) == size
            else:
                is_right &= found.setdefault(word, size) == size
        is_right &= all(known.get(word, (size,))[0] == size for word, size in found.items())
        is_right &= kind is None or jnp.issubdtype(dtype, _KINDS[kind])
        if not is_right:
            raise ValueError(_told(name, f"{dtype} {_shown(shape)}", kind, words, known))
        for word, size in found.items():
            known.setdefault(word, (size, name))


def _told(name: str, got: str, kind: type | None, words: list[str], known: dict[str, tuple[Any, str]]) -> str:
    expected = f"{kind.__name__} " if kind else ""
    where = [
        f"{word} = {_shown(known[word][0]) if word == '...' else known[word][0]} as of {known[word][1]}"
        for word in dict.fromkeys(words)
        if word in known
    ]
    return f"{name} is {got}, expected {expected}[{', '.join(words)}]" + (f" with {', '.join(where)}" if where else "")


def _shown(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"

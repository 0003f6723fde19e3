"""Files that Git left as pointers: a clone of a model without Git LFS holds a few lines for each large one."""

import pathlib

_BEGINNING = b"version https://git-lfs.github.com/spec/"


def advice(path: pathlib.Path) -> str | None:
    """What to say of a file that is such a pointer; None of all others, and of those that cannot be read."""
    try:
        with path.open("rb") as file:
            is_pointer = file.read(len(_BEGINNING)) == _BEGINNING
    except OSError:
        return None
    if not is_pointer:
        return None
    return (
        f"{path} is a pointer of Git LFS in the place of the file. Run `git lfs pull` in {path.parent}, "
        "or download the file."
    )

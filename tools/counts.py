"""Arguments of the benchmarks that count something."""

import argparse


def positive(text: str) -> int:
    """An integer of at least 1, for `add_argument(type=positive)`."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected a whole number of at least 1")
    return number

"""Arrays of another kind or shape than a function takes: refused by name, with what was got and expected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxagentrl import arguments


def test_what_fits_passes():
    x = np.zeros((2, 3), np.float32)
    arguments.check(a=(x, float, "B L"), b=(x > 0, bool, "... L"), c=(x[:, 0], float, "..."), d=(x[0], None, "L"))
    arguments.check(a=(1.0, float, ""), b=(jnp.bfloat16(1), float, "..."), c=(np.int8([1, 2]), int, "2"))
    arguments.check(a=(np.zeros((3, 3)), float, "N N"), b=([1, 2, 3], int, "N"))
    jax.jit(lambda y: arguments.check(y=(y, float, "B L")))(x)
    jax.vmap(lambda y: arguments.check(y=(y, float, "L")))(x)


@pytest.mark.parametrize(
    "given, told",
    [
        (dict(a=("f", int, "B")), "a is float32 [2], expected int [B]"),
        (dict(a=("i", float, "B")), "a is int32 [2], expected float [B]"),
        (dict(a=("b", int, "B")), "a is bool [2], expected int [B]"),  # which is no number here
        (dict(a=("f", float, "B L")), "a is float32 [2], expected float [B, L]"),
        (dict(a=("f", None, "3")), "a is float32 [2], expected [3]"),
        (dict(a=("m", float, "N N")), "a is float32 [2, 3], expected float [N, N]"),
        (dict(a=("m", float, "B L"), b=("f", float, "L")), "b is float32 [2], expected float [L] with L = 3 as of a"),
        (dict(a=("m", float, "... L"), b=("m", float, "...")),
         "b is float32 [2, 3], expected float [...] with ... = [2] as of a"),
        (dict(a=("s", float, "... L")), "a is float32 [], expected float [..., L]"),
        (dict(a=("m", float, "B L"), b=("i", int, "B"), c=("f", bool, "B")),
         "c is float32 [2], expected bool [B] with B = 2 as of a"),
    ],
)
def test_what_does_not_is_told_by_name(given, told):
    arrays = {
        "f": np.zeros(2, np.float32), "i": np.zeros(2, np.int32), "b": np.zeros(2, bool),
        "m": np.zeros((2, 3), np.float32), "s": np.float32(0),
    }
    with pytest.raises(ValueError) as caught:
        arguments.check(**{name: (arrays[key], kind, sizes) for name, (key, kind, sizes) in given.items()})
    assert str(caught.value) == told

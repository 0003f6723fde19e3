"""Programs compiled ahead are the ones that calls find; errors come out, and nothing is left running."""

import functools
import threading

import jax
import jax.numpy as jnp
import pytest

from jaxagentrl import compiles


def make_program():
    @functools.partial(jax.jit, static_argnames="power")
    def program(x, *, power):
        return jnp.sum(x**power)

    return program


def test_calls_find_what_was_compiled_ahead():
    program, x = make_program(), jnp.arange(5.0)
    before = compiles.count()
    compiles.ahead(program.lower(x, power=power).compile for power in (2, 3, 4))
    assert compiles.count() == before + 3
    assert [float(program(x, power=power)) for power in (2, 3, 4)] == [30, 100, 354]
    assert compiles.count() == before + 3
    program(x, power=5)
    assert compiles.count() == before + 4


def test_a_thread_s_count_is_of_what_it_compiled_itself():
    program, x = make_program(), jnp.arange(5.0)
    everywhere, here = compiles.count(), compiles.count_here()
    compiles.ahead([program.lower(x, power=7).compile])  # in a thread of its own
    assert (compiles.count(), compiles.count_here()) == (everywhere + 1, here)
    program(x, power=8)
    assert (compiles.count(), compiles.count_here()) == (everywhere + 2, here + 1)


def test_an_error_comes_out_and_the_rest_is_not_compiled(monkeypatch):
    monkeypatch.setattr(compiles, "cores", lambda: 1)
    begun, may_end = [], threading.Event()

    def fails():
        begun.append("fails")
        may_end.wait(60)
        raise RuntimeError("too large")

    def later():
        begun.append("later")
        threading.Event().wait(0.05)

    def programs():
        yield fails
        for _ in range(20):
            yield later
        may_end.set()

    with pytest.raises(RuntimeError, match="too large"):
        compiles.ahead(programs())
    assert begun.count("later") < 20  # some may have begun before the error was seen
    assert not [t for t in threading.enumerate() if t.name.startswith("compile")]


def test_tracing_that_fails_leaves_no_threads():
    program = make_program()

    def programs():
        yield program.lower(jnp.ones(3), power=2).compile
        raise ValueError("no such bucket")

    with pytest.raises(ValueError, match="no such bucket"):
        compiles.ahead(programs())
    assert not [t for t in threading.enumerate() if t.name.startswith("compile")]


def test_options_that_this_jaxlib_has_not_heard_of_are_told_from_those_it_takes():
    assert compiles.knows("xla_cpu_enable_fast_math", False)
    assert not compiles.knows("xla_cpu_no_such_option", False)
    assert not compiles.knows("xla_cpu_enable_fast_math", "no such value")

"""Breaks the functional core in small ways and counts how many of them the tests notice.

    python tools/mutate_core.py                      every mutant (hundreds; an hour or more)
    python tools/mutate_core.py --sample 120         a random 120 of them
    python tools/mutate_core.py --modules losses --list

A mutant is one module of the core with one thing changed in its syntax tree: an operator swapped, a
constant moved, a mask or a `stop_gradient` or a clip taken away, a statistic kept local to its
device. Every mutant runs in a forked child that already has jax and pytest in memory but nothing of
ours, first against the tests of its module, then (if it lives) against `test_core_invariance`.
Nothing on disk is changed. Not mutated: docstrings, annotations, error messages and argument checks
(`arguments.check`, chex, `raise`), which are tested by hand-written cases. Not drawn: the mutants in `EQUIVALENT`,
which cannot be noticed, each with the reason.

Exit status 0 when at least 95 % are caught, 1 when fewer are, 2 when the tests fail anyway.
"""

import argparse
import ast
import collections
import copy
import dataclasses
import functools
import importlib.abc
import importlib.util
import os
import pathlib
import random
import resource
import sys

from counts import positive

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = "jaxagentrl"
TESTS = {
    "advantages": ["test_advantages"],
    "group_advantages": ["test_advantages", "test_diagnostics"],
    "turn_credit": ["test_advantages"],
    "anchors": ["test_advantages"],
    "losses": ["test_losses"],
    "divergences": ["test_losses"],
    "importance": ["test_losses"],
    "preference": ["test_losses"],
    "masking": ["test_masking", "test_advantages", "test_losses"],
    "buffers": ["test_buffers"],
    "transforms": ["test_transforms"],
    "diagnostics": ["test_diagnostics"],
}
for files in TESTS.values():
    files.append("test_core_defaults")
LAST = "test_core_invariance"
# What the modules' own tests cannot see.
LAST_TESTS = "finite or shard_map or four_devices or padding or bfloat16 or leading_axes"
GOAL = 0.95

OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Mod: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
# Calls that are replaced by one of their arguments, given by position.
REPLACED = {
    "where": 1,
    "zero_off": 0,
    "stop_gradient": 0,
    "clip": 0,
    "psum": 0,
    "pmin": 0,
    "pmax": 0,
    "exp": 0,
    "square": 0,
    "flip": 0,
    "abs": 0,
}
RENAMED = {"maximum": "minimum", "minimum": "maximum", "any": "all", "cumsum": "cumprod"}

# Mutants that change nothing: (module, part of the line, what is done to it): why.
EQUIVALENT = {
    ("advantages", "return zero, bootstrap + zero", "Add → Sub"): "a 0 that is there for its type",
    ("buffers", "held | ~jnp.any(held), 0.0", "0.0 → 1.0"): "logits count up to a constant",
    ("group_advantages", "jnp.where(positive, var, 1.0)", "1.0 → 2.0"): "masked by the outer where",
    ("transforms", "step, final + masking.zero_carry", "Add → Sub"): "a 0 that is there for its type",
    ("masking", "x / jnp.where(positive, y, 1.0)", "1.0 → 2.0"): "masked by the outer where",
}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change: the `variant`-th of node number `node` (in walking order) of a module."""

    module: str
    node: int
    variant: int
    line: int
    what: str


def mutations(node: ast.AST) -> list[tuple[str, ast.AST]]:
    """(description, replacement) for every way in which a node can be broken."""
    found = []
    if isinstance(node, (ast.BinOp, ast.Compare)):
        old = node.op if isinstance(node, ast.BinOp) else node.ops[0]
        if type(old) in OPERATORS:
            new = copy.deepcopy(node)
            swapped = OPERATORS[type(old)]()
            if isinstance(node, ast.BinOp):
                new.op = swapped
            else:
                new.ops[0] = swapped
            found.append((f"{type(old).__name__} → {type(swapped).__name__}", new))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Invert, ast.Not)):
        found.append((f"without {type(node.op).__name__}", copy.deepcopy(node.operand)))
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            found.append((f"{node.value} → {not node.value}", ast.Constant(not node.value)))
        elif isinstance(node.value, (int, float)) and node.value + 1 != node.value:
            found.append((f"{node.value} → {node.value + 1}", ast.Constant(node.value + 1)))
    if isinstance(node, ast.Call):
        found += call_mutations(node)
    return found


def call_mutations(node: ast.Call) -> list[tuple[str, ast.AST]]:
    """Calls without their effect, under a neighbor's name, or blind to the other devices."""
    found = []
    name = node.func.attr if isinstance(node.func, ast.Attribute) else None
    if isinstance(node.func, ast.Name):
        name = node.func.id
    if name in REPLACED and len(node.args) > REPLACED[name]:
        kept = copy.deepcopy(node.args[REPLACED[name]])
        found.append((f"{name}(…) → {ast.unparse(kept)[:40]}", kept))
    if name in RENAMED and isinstance(node.func, ast.Attribute):
        new = copy.deepcopy(node)
        new.func.attr = RENAMED[name]
        found.append((f"{name} → {RENAMED[name]}", new))
    for index, keyword in enumerate(node.keywords):
        if keyword.arg == "axis_name" and isinstance(keyword.value, ast.Name):
            new = copy.deepcopy(node)
            new.keywords[index].value = ast.Constant(None)
            found.append((f"{name}(axis_name=None)", new))
    return found


class Walker(ast.NodeTransformer):
    """Numbers the nodes that may be broken; replaces one of them when told to."""

    def __init__(self, target: tuple[int, int] | None = None):
        self.target = target
        self.count = -1
        self.found: list[tuple[int, int, int, str]] = []

    def visit(self, node: ast.AST) -> ast.AST:
        if self.is_exempt(node):
            return node
        self.count += 1
        number = self.count
        ways = mutations(node)
        for variant, (what, _) in enumerate(ways):
            self.found.append((number, variant, node.lineno, what))
        if self.target and self.target[0] == number:
            return ast.copy_location(ways[self.target[1]][1], node)
        if isinstance(node, ast.UnaryOp) and ast.unparse(node) == "-1":
            return node  # −1 is an id that is none: −2 would say the same
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.arg, ast.AnnAssign)):
            return self.visit_without_annotations(node)
        return self.generic_visit(node)

    def visit_without_annotations(self, node: ast.AST) -> ast.AST:
        """Children, save annotations (`X | None` is no arithmetic) and decorators."""
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list"):
                continue
            if isinstance(value, list):
                value[:] = [self.visit(v) if isinstance(v, ast.AST) else v for v in value]
            elif isinstance(value, ast.AST):
                setattr(node, field, self.visit(value))
        return node

    def is_exempt(self, node: ast.AST) -> bool:
        """Docstrings, argument checks, error messages, and aliases of types."""
        if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom)):
            return True
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            return node.targets[0].id in ("AxisName", "__all__")
        if not isinstance(node, ast.Expr):
            return False
        if isinstance(node.value, ast.Constant):
            return True
        call = ast.unparse(node.value)
        return call.startswith(("arguments.", "chex.", "check_", "_check_", "jax.tree.map(lambda old, new: _c"))


@functools.cache
def text(module: str) -> str:
    """Read once, so that edits during a long run do not shift the numbering of nodes."""
    return (ROOT / PACKAGE / f"{module}.py").read_text(encoding="utf8")


def source(module: str) -> ast.Module:
    return ast.parse(text(module))


def all_mutants(modules: list[str]) -> list[Mutant]:
    found = []
    for module in modules:
        walker = Walker()
        walker.visit(source(module))
        mutants = [Mutant(module, *entry) for entry in walker.found]
        found += [mutant for mutant in mutants if not is_equivalent(mutant)]
    return found


def is_equivalent(mutant: Mutant) -> bool:
    line = text(mutant.module).splitlines()[mutant.line - 1]
    return any(
        (mutant.module, mutant.what) == (module, what) and part in line
        for module, part, what in EQUIVALENT
    )


class Importer(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Serves the modules of the core from memory, one of them changed."""

    def __init__(self, mutant: Mutant | None):
        self.codes = {}
        for module in TESTS:
            tree = source(module)
            if mutant is not None and mutant.module == module:
                tree = Walker((mutant.node, mutant.variant)).visit(tree)
            name = f"{PACKAGE}.{module}"
            # Under the file's own name, for tests that ask for the source of a function.
            path = str(ROOT / PACKAGE / f"{module}.py")
            self.codes[name] = compile(ast.fix_missing_locations(tree), path, "exec")

    def find_spec(self, name, path, target=None):
        return importlib.util.spec_from_loader(name, self) if name in self.codes else None

    def exec_module(self, module):
        exec(self.codes[module.__name__], module.__dict__)


def run_child(importer: Importer, test: str) -> int:
    """In the forked child: one test file with the mutant in place. Returns pytest's exit status."""
    import pytest

    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    sys.meta_path.insert(0, importer)
    options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
    if test == LAST:
        options += ["-k", LAST_TESTS]
    return int(pytest.main([*options, str(ROOT / "tests" / f"{test}.py")]))


def survives(importer: Importer, test: str, limit_s: int) -> bool:
    """Whether all tests of a file pass; using up the CPU time counts as caught.

    CPU time, not time on the clock: a machine that pauses the run must not look like a test.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (limit_s, limit_s))
            status = run_child(importer, test)
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 0


def stages(module: str, last: bool) -> list[str]:
    """Test files for the mutants of a module, in the order in which they are asked."""
    return TESTS[module] + ([LAST] if last else [])


def judge(mutant: Mutant, limit_s: int, last: bool) -> bool:
    """True when some test notices the mutant."""
    importer = Importer(mutant)
    return not all(survives(importer, test, limit_s) for test in stages(mutant.module, last))


def preload() -> None:
    """What every child needs and what does not start a jax backend (a fork would break it)."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    for name in ("jax", "jax.numpy", "jax.test_util", "chex", "hypothesis", "pytest", "rlax"):
        importlib.import_module(name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modules", nargs="*", choices=TESTS, default=list(TESTS))
    parser.add_argument("--sample", type=positive, help="how many mutants to draw; default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=positive, default=600, help="CPU seconds per test file")
    parser.add_argument("--no-last", action="store_true", help=f"leave {LAST} out")
    parser.add_argument("--at", nargs="*", help="only mutants of these lines: anchors:148 losses:20")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    args = parser.parse_args()

    mutants = all_mutants(args.modules)
    if args.at:
        places = {f"{m.module}:{m.line}" for m in mutants}
        if nowhere := [place for place in args.at if place not in places]:
            parser.error(f"--at: there is no mutant at {', '.join(nowhere)}; --list has them all.")
        mutants = [m for m in mutants if f"{m.module}:{m.line}" in args.at]
    if args.sample is not None and args.sample < len(mutants):
        mutants = sorted(
            random.Random(args.seed).sample(mutants, args.sample),
            key=lambda m: (m.module, m.line, m.node),
        )
    if args.list:
        for mutant in mutants:
            print(f"{PACKAGE}/{mutant.module}.py:{mutant.line}: {mutant.what}")
        print(f"{len(mutants)} mutants")
        return 0

    preload()
    from rich.progress import track

    needed = dict.fromkeys(test for m in mutants for test in stages(m.module, not args.no_last))
    for test in track(list(needed), description="without mutants"):
        if not survives(Importer(None), test, args.limit):
            print(f"tests/{test}.py fails (or needs over {args.limit} s) without any mutant")
            return 2
    caught, total = collections.Counter(), collections.Counter()
    for mutant in track(mutants, description="mutants"):
        total[mutant.module] += 1
        noticed = judge(mutant, args.limit, not args.no_last)
        caught[mutant.module] += noticed
        place = f"{PACKAGE}/{mutant.module}.py:{mutant.line}"
        print(f"{'caught  ' if noticed else 'SURVIVED'}  {place}: {mutant.what}", flush=True)
    for module in total:
        print(f"{module:18} {caught[module]:4} of {total[module]:4}")
    share = sum(caught.values()) / max(1, sum(total.values()))
    print(f"{'all':18} {sum(caught.values()):4} of {sum(total.values()):4}  {100 * share:.1f} %")
    return 0 if share >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
